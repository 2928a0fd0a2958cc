#include "cuda/many_outputs.h"

#include "cuda/products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace torchintro {
namespace {

// out = alpha * a b + beta * out
void product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha, double beta) {
  if (alpha == 1.0 && beta == 0.0) {
    at::mm_out(out, a, b);
  } else {
    at::addmm_out(out, out, a, b, beta, alpha);
  }
}

} // namespace

std::tuple<at::Tensor, std::array<at::Tensor, 4>> many_outputs(
    const Problem& p, int64_t chunk_rows, ResidualStep residual_step) {
  auto gradients = empty_gradients(p);
  const auto options = p.input.options();
  const auto sum_options = options.dtype(at::kDouble);
  chunk_rows = std::min(chunk_rows, p.rows);
  const bool one_chunk = chunk_rows == p.rows;

  // In 16 bits the chunks' shares are added up in float32: rounded one by one, nothing would be left of shares that cancel.
  // float16's gradient is float32 to the end (gradient_dtype).
  at::Tensor weight_gradient = gradients[kLinearWeight];
  const auto weight_gradient_dtype = weight_gradient.defined() ? weight_gradient.scalar_type() : at::kFloat;
  const bool wide =
      p.mask[kLinearWeight] && options.dtype().itemsize() == 2 && (!one_chunk || weight_gradient_dtype == at::kFloat);
  if (wide && weight_gradient_dtype != at::kFloat) {
    gradients[kLinearWeight].reset(); // its memory can be had again before it is needed
    weight_gradient = at::empty(weight_gradient.sizes(), options.dtype(at::kFloat));
  }

  auto loss_sum = at::zeros({}, sum_options);
  const auto bias_sum = p.mask[kLinearBias] ? at::zeros({p.out_features}, sum_options) : at::Tensor();
  auto prediction_buffer = at::empty({chunk_rows, p.out_features}, options);
  const auto weight_transposed = p.linear_weight.t();

  // Without weights g is the residual times a number, which the products take along.
  const bool subtracts = p.target.scalar_type() == p.input.scalar_type();
  const bool residual_is_g = subtracts && !p.weight.defined();
  const double g_factor = residual_is_g ? p.residual_factor : 1.0;
  const double weight_gradient_factor = p.weight_gradient_factor * g_factor;

  for (int64_t begin = 0; begin < p.rows; begin += chunk_rows) {
    const int64_t count = std::min(chunk_rows, p.rows - begin);
    const auto chunk_of = [&](const at::Tensor& tensor) {
      return one_chunk || !tensor.defined() ? tensor : tensor.narrow(0, begin, count);
    };
    const auto input = chunk_of(p.input);
    const auto target = chunk_of(p.target);
    auto prediction = prediction_buffer.narrow(0, 0, count);
    if (subtracts) {
      if (p.linear_bias.defined()) {
        at::sub_out(prediction, target, p.linear_bias);
      } else {
        prediction.copy_(target);
      }
      product(prediction, input, weight_transposed, 1.0, -1.0);
    } else if (p.linear_bias.defined()) {
      at::addmm_out(prediction, p.linear_bias, input, weight_transposed);
    } else {
      at::mm_out(prediction, input, weight_transposed);
    }
    residual_step(
        p,
        {prediction,
         subtracts ? at::Tensor() : target,
         chunk_of(p.weight),
         chunk_of(gradients[kTarget]),
         loss_sum,
         bias_sum,
         !residual_is_g && (p.mask[kInput] || p.mask[kLinearWeight])});
    if (p.mask[kInput]) {
      auto out = chunk_of(gradients[kInput]);
      product(out, prediction, p.linear_weight, p.input_gradient_factor * g_factor, 0.0);
    }
    const double beta = begin == 0 ? 0.0 : 1.0;
    if (wide) {
      cuda::add_product(weight_gradient, prediction, input, weight_gradient_factor, beta);
    } else if (p.mask[kLinearWeight]) {
      product(weight_gradient, prediction.t(), input, weight_gradient_factor, beta);
    }
  }

  if (wide) {
    gradients[kLinearWeight] = weight_gradient.to(weight_gradient_dtype);
  }
  if (p.mask[kLinearBias]) {
    gradients[kLinearBias].copy_(bias_sum.mul_(p.weight_gradient_factor));
  }
  loss_sum.mul_(p.loss_factor);
  if (p.weight_sum.defined()) {
    loss_sum.div_(p.weight_sum);
  }
  return {loss_sum.to(p.target.scalar_type()), gradients};
}

} // namespace torchintro
