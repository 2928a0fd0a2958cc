// Autocast: the matrix product in the autocast dtype, the loss in float32, as PyTorch treats linear and mse_loss.
#include "linear_mse_loss.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace torchintro {
namespace {

template <at::DeviceType device, c10::DispatchKey key>
at::Tensor linear_mse_loss_autocast(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchintro::linear_mse_loss", "")
                             .typed<decltype(linear_mse_loss_autocast<device, key>)>();
  // Autocast leaves float64 alone; with such an input the call is a float64 one and stays so.
  if (input.scalar_type() == at::kDouble) {
    return op.call(input, linear_weight, target, linear_bias, weight, reduction);
  }
  const auto cast = [](at::ScalarType dtype, const auto& argument) {
    return at::autocast::cached_cast(dtype, argument, device);
  };
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return op.call(
      cast(dtype, input),
      cast(dtype, linear_weight),
      cast(at::kFloat, target),
      cast(dtype, linear_bias),
      cast(at::kFloat, weight),
      reduction);
}

TORCH_LIBRARY_IMPL(torchintro, AutocastCPU, m) {
  m.impl("linear_mse_loss", linear_mse_loss_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(torchintro, AutocastCUDA, m) {
  m.impl("linear_mse_loss", linear_mse_loss_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

} // namespace
} // namespace torchintro
