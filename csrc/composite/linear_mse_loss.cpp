// Every device without kernels of ours: the decomposition, on that device's own operators. It is also where a sparse or
// otherwise unsupported tensor lands, whose call then ends in check_inputs.
#include "composite/composite.h"

#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

namespace torchintro {
namespace {

// What a float16 gradient is computed in, before it is divided by its unit.
at::Tensor widened(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf ? tensor.to(at::kFloat) : tensor;
}

OptionalTensor widened(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(widened(*tensor)) : tensor;
}

} // namespace

at::Tensor linear_mse_loss_composite(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction) {
  const auto parsed = check_inputs(input, linear_weight, target, linear_bias, weight, reduction);
  return decomposed_loss(input, linear_weight, target, linear_bias, weight, parsed);
}

LossAndGradients linear_mse_loss_grads_composite(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction,
    GradientMask output_mask) {
  const auto parsed = check_grads_inputs(input, linear_weight, target, linear_bias, weight, reduction, output_mask);
  const auto gradients = decomposed_gradients(
      /*grad_output=*/{},
      widened(input),
      widened(linear_weight),
      widened(target),
      widened(linear_bias),
      widened(weight),
      parsed,
      output_mask);

  const auto rows = row_count(input);
  const auto outputs = linear_weight.sym_size(0);
  const auto finished = [&](Gradient index, const at::Tensor& like) -> OptionalTensor {
    const auto& gradient = gradients[index];
    if (!gradient.defined()) {
      return std::nullopt;
    }
    const auto dtype = gradient_dtype(index, like.scalar_type());
    if (!has_gradient_unit(dtype)) {
      return gradient.to(dtype);
    }
    const auto unit = gradient_unit(index, parsed, rows, outputs);
    return at::div(at::mul(gradient, at::Scalar(unit.denominator)), at::Scalar(unit.numerator)).to(dtype);
  };
  return {
      decomposed_loss(input, linear_weight, target, linear_bias, weight, parsed),
      finished(kInput, input),
      finished(kLinearWeight, linear_weight),
      finished(kTarget, target),
      finished(kLinearBias, linear_bias ? *linear_bias : linear_weight)};
}

TORCH_LIBRARY_IMPL(torchintro, CompositeImplicitAutograd, m) {
  m.impl("_linear_mse_loss_decomposed", linear_mse_loss_composite);
  m.impl("_linear_mse_loss_grads_decomposed", linear_mse_loss_grads_composite);
}

TORCH_LIBRARY_IMPL(torchintro, CompositeExplicitAutograd, m) {
  m.impl("linear_mse_loss", linear_mse_loss_composite);
  m.impl("_linear_mse_loss_grads", linear_mse_loss_grads_composite);
}

} // namespace torchintro
