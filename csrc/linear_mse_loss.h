// linear_mse_loss: a linear layer and the mean squared error as one operator.
//
//   prediction P = X W' + b          X: input (*, D)   W: linear_weight (O, D)   b: linear_bias (O)
//   residual   R = P - T             T: target (*, O)
//   loss       L = s * sum(V * R^2)  V: weight, 1 where none is given
//              s = 1 for "sum"; 1 / (N O), or 1 / sum(V) with a weight, for "mean"
//
//   With G = 2 s V * R, of the shape of P:
//   dL/dX = G W      dL/dW = G' X      dL/dT = -G      dL/db = sum of G over the rows
//
// N is the number of rows, the product of the leading sizes; a weight is given per element, (*, O), or per row, (*),
// and then counts for each of the row's O elements.
//
// Two operators. The public one returns the loss. `_linear_mse_loss_grads` returns the loss and, from the same pass over
// X, the gradients that output_mask asks for; autograd calls it in the forward pass and only scales in the backward pass.
//
// This file is the contract: every dispatch key's file includes it, and nothing here depends on a backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace torchintro {

using OptionalTensor = std::optional<at::Tensor>;

// Positions in output_mask and in the tuple of gradients: the schema's order.
enum Gradient : size_t { kInput = 0, kLinearWeight = 1, kTarget = 2, kLinearBias = 3 };
using GradientMask = std::array<bool, 4>;

// The loss, then the gradients in the order of `Gradient`; those not asked for are nullopt.
using LossAndGradients = std::tuple<at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

enum class Reduction { None, Mean, Sum };

// Raises ValueError, TypeError or RuntimeError, with the argument, what was expected and what came, unless the call is
// well formed; returns the parsed reduction. First statement of every entry point, so that no backend words it differently.
// The sentence names the public operator, which is what the user called.
Reduction check_inputs(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction);

// The same and, for `_linear_mse_loss_grads` itself, which has no gradients for "none" and none for a bias that is not there.
Reduction check_grads_inputs(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction,
    const GradientMask& output_mask);

// N: the product of input's leading sizes.
c10::SymInt row_count(const at::Tensor& input);

// The operator in differentiable ATen operators: for what a fused kernel cannot see through (forward-mode tangents,
// functorch transforms, tensor subclasses) and for devices without kernels of ours. Takes checked arguments.
at::Tensor decomposed_loss(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    Reduction reduction);

// The gradients in differentiable ATen operators, times `grad_output` where it is defined: for double backward and for
// `_linear_mse_loss_grads` where there is no kernel. Not defined for Reduction::None. Takes checked arguments.
std::array<at::Tensor, 4> decomposed_gradients(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    Reduction reduction,
    const GradientMask& output_mask);

// What `_linear_mse_loss_grads` returns a gradient in, for an argument of that dtype. In float16 the gradients of
// linear_weight and linear_bias are float32: sums over rows, whose terms may cancel to what float16 does not hold before the
// upstream gradient (a loss scale, say) has multiplied it. Autograd converts what the backward pass returns.
inline at::ScalarType gradient_dtype(Gradient gradient, at::ScalarType dtype) {
  const bool over_rows = gradient == kLinearWeight || gradient == kLinearBias;
  return over_rows && dtype == at::kHalf ? at::kFloat : dtype;
}

// float16 has five exponent bits: a gradient of the mean over many elements leaves its range before the upstream gradient
// could bring it back. So `_linear_mse_loss_grads` returns a gradient that is float16 (input's and target's, see above)
// divided by the unit below, which takes the mean's 1 / N out of it, puts a mean over outputs into the sum's dX, and so
// keeps it at a size that neither N nor O moves; the backward pass multiplies by unit * upstream in float32. For all other
// dtypes the unit is 1 and the gradient is the gradient.
inline bool has_gradient_unit(at::ScalarType gradient_dtype) {
  return gradient_dtype == at::kHalf;
}

// A quotient, kept as its two counts: where they are symbolic, a compiled graph multiplies and divides by integers.
template <typename Count>
struct Unit {
  Count numerator;
  Count denominator;
};

template <typename Count>
Unit<Count> gradient_unit(Gradient gradient, Reduction reduction, const Count& rows, const Count& outputs) {
  const bool mean = reduction == Reduction::Mean;
  if (gradient == kInput) {
    return mean ? Unit<Count>{1, rows} : Unit<Count>{outputs, 1};
  }
  TORCH_INTERNAL_ASSERT_DEBUG_ONLY(gradient == kTarget);
  return mean ? Unit<Count>{1, rows * outputs} : Unit<Count>{1, 1};
}

} // namespace torchintro
