// A checked call, flattened to matrices, with its scale factors worked out once for every backend.
#pragma once

#include "linear_mse_loss.h"

namespace torchintro {

struct Problem {
  at::Tensor input; // (N, D), any strides
  at::Tensor linear_weight; // (O, D), any strides
  at::Tensor target; // (N, O), any strides
  at::Tensor linear_bias; // (O), any stride; undefined without
  at::Tensor weight; // (N, O), any strides (stride 0 over the outputs if given per row); undefined without
  int64_t rows; // N
  int64_t in_features; // D
  int64_t out_features; // O
  Reduction reduction;
  GradientMask mask; // the gradients to compute

  // Sum of the weight's N x O elements, float64 on the device, where "mean" divides by it; undefined elsewhere. It stays
  // on the device: a kernel divides by it, the host never waits for it.
  at::Tensor weight_sum;

  // With residuals r = prediction - target and S = *weight_sum or 1:
  double loss_factor; //            loss        = loss_factor / S * sum(v r^2)
  double residual_factor; //        g           = residual_factor / S * v * r
  double weight_gradient_factor; // dW, db      = weight_gradient_factor * (g' X, sum of g)
  double target_gradient_factor; // dT          = target_gradient_factor * g
  double input_gradient_factor; //  dX          = input_gradient_factor * g W
  // For all but float16 g is dL/dP and the other three are 1, -1 and 1; see gradient_unit for float16.
};

// Flattens checked arguments. Copies only where leading sizes cannot be merged into one.
Problem make_problem(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    Reduction reduction,
    const GradientMask& mask);

// An uninitialised, contiguous tensor. On the CPU it does not go through the dispatcher, which costs more than the memory;
// for use below autograd, by a kernel that overwrites all of it.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

// Uninitialised, contiguous gradients of the flattened shapes, for those in the mask; undefined for the others. `empty`
// makes a tensor, where a backend has memory of its own for them.
std::array<at::Tensor, 4> empty_gradients(
    const Problem& problem, at::Tensor (*empty)(at::IntArrayRef, const at::TensorOptions&) = empty_result);

// The loss and the flattened gradients of a problem without elements: nan for a mean, 0 for a sum, and zeros.
std::tuple<at::Tensor, std::array<at::Tensor, 4>> results_of_nothing(const Problem& problem);

// Gives flattened gradients their arguments' shapes.
LossAndGradients unflatten(
    at::Tensor loss, std::array<at::Tensor, 4> gradients, const at::Tensor& input, const at::Tensor& target);

} // namespace torchintro
