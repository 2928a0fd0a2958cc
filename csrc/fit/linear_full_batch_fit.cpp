// linear_full_batch_fit: a whole training run with full batches in one call: the second moments of the rows, from one pass
// over them, and then all epochs on those, as linear_statistics_fit does it. For a program without Python, and where the
// problem is so small that the calls are most of the time.
//
// Bytes: X and the target once. Operations: N D^2 / 2 and 2 E O D^2, in float64.
#include "cpu/linear_moments.h"
#include "fit/cpu/linear_statistics_fit.h"
#include "fit/fit.h"
#include "fit/linear_moments.h"
#include "problem.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>

namespace torchintro::fit {
namespace {

constexpr const char* kOperator = "linear_full_batch_fit";

// float64, on the CPU, of one model more: (1, *sizes).
at::Tensor to_host(const at::Tensor& parameter) {
  if (parameter.is_cpu() && parameter.scalar_type() == at::kFloat &&
      parameter.is_contiguous()) { // without the dispatcher
    auto sizes = parameter.sizes().vec();
    sizes.insert(sizes.begin(), 1);
    auto host = empty_result(sizes, at::TensorOptions(at::kDouble));
    const float* from = parameter.const_data_ptr<float>();
    std::copy(from, from + parameter.numel(), host.mutable_data_ptr<double>());
    return host;
  }
  return parameter.detach().to(at::kCPU, at::kDouble).contiguous().unsqueeze(0).clone();
}

void write_back(const at::Tensor& host, const at::Tensor& parameter) {
  if (parameter.is_cpu() && parameter.scalar_type() == at::kFloat && parameter.is_contiguous()) {
    const double* from = host.const_data_ptr<double>();
    float* to = parameter.mutable_data_ptr<float>();
    for (int64_t i = 0; i < parameter.numel(); ++i) {
      to[i] = static_cast<float>(from[i]);
    }
    parameter.unsafeGetTensorImpl()->bump_version();
    return;
  }
  parameter.detach().copy_(host.squeeze(0));
}

double largest_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? std::numeric_limits<double>::max()
                              : static_cast<double>(std::numeric_limits<float>::max());
}

LinearMoments moments_of(const at::Tensor& input, const at::Tensor& target) {
  if (input.is_cpu()) {
    return linear_moments_cpu(input, target, std::nullopt);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchintro::_linear_moments", "")
                             .typed<LinearMoments(const at::Tensor&, const at::Tensor&, const OptionalTensor&)>();
  auto [count, mean_x, mean_y, sxx, sxy, syy] = op.call(input, target, std::nullopt);
  return {count.cpu(), mean_x.cpu(), mean_y.cpu(), sxx.cpu(), sxy.cpu(), syy.cpu()};
}

at::Tensor linear_full_batch_fit(
    const at::Tensor& input,
    const at::Tensor& target,
    const at::Tensor& linear_weight,
    const OptionalTensor& linear_bias,
    const at::Tensor& lr,
    std::string_view optimizer,
    at::ArrayRef<double> options) {
  // clang-format off: one line for the condition, one for the sentence.
  const auto dtype = linear_weight.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
      kOperator, ": linear_weight must have dtype float32 or float64, but got ", dtype);
  TORCH_CHECK_TYPE(!linear_bias || linear_bias->scalar_type() == dtype,
      kOperator, ": linear_bias must have linear_weight's dtype, ", dtype, ", but got ", linear_bias->scalar_type());
  TORCH_CHECK_VALUE(linear_weight.dim() == 2,
      kOperator, ": linear_weight must have shape (out_features, in_features), but got ", linear_weight.sizes());
  TORCH_CHECK_VALUE(input.dim() == 2 && input.size(0) > 0 && input.size(1) == linear_weight.size(1),
      kOperator, ": input must have shape (N, ", linear_weight.size(1), ") with at least one row, but got ", input.sizes());
  TORCH_CHECK_VALUE(target.dim() == 2 && target.size(0) == input.size(0) && target.size(1) == linear_weight.size(0),
      kOperator, ": target must have shape (", input.size(0), ", ", linear_weight.size(0), "), but got ", target.sizes());
  TORCH_CHECK_VALUE(!linear_bias || (linear_bias->dim() == 1 && linear_bias->size(0) == linear_weight.size(0)),
      kOperator, ": linear_bias must have shape (", linear_weight.size(0), ",), but got ", linear_bias->sizes());
  TORCH_CHECK_VALUE(lr.dim() == 1 && lr.is_cpu() && lr.scalar_type() == at::kDouble,
      kOperator, ": lr must be float64 on the CPU, one learning rate an epoch, but got ", lr.scalar_type(), " of shape ",
      lr.sizes(), " on ", lr.device());
  TORCH_CHECK_VALUE(options.empty() || options.size() == kOptions,
      kOperator, ": options must hold ", kOptions, " numbers or none, but got ", options.size());
  // clang-format on
  const int64_t d = linear_weight.size(1), o = linear_weight.size(0), parameters = o * d + o;
  const at::TensorOptions in_double(at::kDouble);

  auto [count, mean_x, mean_y, sxx, sxy, syy] = moments_of(input, target);
  const at::Tensor weight = to_host(linear_weight);
  const OptionalTensor bias = linear_bias ? OptionalTensor(to_host(*linear_bias)) : std::nullopt;
  auto option_row = empty_result({1, kOptions}, in_double);
  std::fill_n(option_row.mutable_data_ptr<double>(), kOptions, 0.0);
  std::copy(options.begin(), options.end(), option_row.mutable_data_ptr<double>());
  auto state = empty_result({4, 1, parameters}, in_double);
  std::fill_n(state.mutable_data_ptr<double>(), 4 * parameters, 0.0);
  auto stopped = empty_result({1}, at::TensorOptions(at::kLong));
  *stopped.mutable_data_ptr<int64_t>() = -1;
  const int64_t epochs = lr.size(0), lr_stride = lr.stride(0);
  auto lr_column = empty_result({epochs, 1}, in_double);
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    lr_column.mutable_data_ptr<double>()[epoch] = lr.const_data_ptr<double>()[epoch * lr_stride];
  }
  const std::array<at::Tensor, 6> moments{count, mean_x, mean_y, sxx, sxy, syy};
  auto losses = std::get<0>(train_on_moments(check_moments_run(
      moments,
      {},
      weight,
      bias,
      lr_column,
      option_row,
      state,
      stopped,
      optimizer,
      /*epoch=*/0,
      /*step=*/0,
      /*train_weight=*/true,
      /*train_bias=*/true,
      largest_of(dtype))));
  write_back(weight, linear_weight);
  if (linear_bias) {
    write_back(*bias, *linear_bias);
  }
  losses.unsafeGetTensorImpl()->set_sizes_contiguous({epochs}); // nobody else has it
  return losses;
}

TORCH_LIBRARY_FRAGMENT(torchintro, m) {
  // lr (E) float64: one an epoch. options: one row of linear_mse_fit's, all zero by default. Returns the loss of each epoch
  // (E), before its update; NaN from the epoch on in which it was not finite, and the parameters stay as they were before.
  m.def(
      "linear_full_batch_fit(Tensor input, Tensor target, Tensor(a!) linear_weight, Tensor(b!)? linear_bias, Tensor "
      "lr, "
      "str optimizer=\"sgd\", float[] options=[]) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchintro, CompositeExplicitAutograd, m) {
  m.impl("linear_full_batch_fit", linear_full_batch_fit);
}

} // namespace
} // namespace torchintro::fit
