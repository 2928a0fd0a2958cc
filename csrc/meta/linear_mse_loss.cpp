// Shapes and dtypes without data, for torch.compile, torch.export and meta tensors; sizes may be symbolic.
#include "linear_mse_loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace torchintro {
namespace {

at::Tensor linear_mse_loss_meta(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction) {
  const auto parsed = check_inputs(input, linear_weight, target, linear_bias, weight, reduction);
  return parsed == Reduction::None ? at::empty_symint(target.sym_sizes(), target.options())
                                   : at::empty({}, target.options());
}

LossAndGradients linear_mse_loss_grads_meta(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction,
    GradientMask output_mask) {
  check_grads_inputs(input, linear_weight, target, linear_bias, weight, reduction, output_mask);
  // Contiguous, whatever the argument's strides: as the kernels return them.
  const auto gradient = [&](Gradient index, const at::Tensor& like) -> OptionalTensor {
    const auto options = like.options().dtype(gradient_dtype(index, like.scalar_type()));
    return output_mask[index] ? OptionalTensor(at::empty_symint(like.sym_sizes(), options)) : std::nullopt;
  };
  return {
      at::empty({}, target.options()),
      gradient(kInput, input),
      gradient(kLinearWeight, linear_weight),
      gradient(kTarget, target),
      gradient(kLinearBias, linear_bias ? *linear_bias : linear_weight)};
}

TORCH_LIBRARY_IMPL(torchintro, Meta, m) {
  m.impl("linear_mse_loss", linear_mse_loss_meta);
  m.impl("_linear_mse_loss_grads", linear_mse_loss_grads_meta);
}

} // namespace
} // namespace torchintro
