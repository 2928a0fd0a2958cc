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
#include <limits>
#include <utility>
#include <vector>

namespace torchintro::fit {
namespace {

constexpr const char* kOperator = "linear_full_batch_fit";

bool is_plain(const at::Tensor& parameter) { // copied without the dispatcher
  return parameter.is_cpu() && parameter.scalar_type() == at::kFloat && parameter.is_contiguous();
}

void read(const at::Tensor& parameter, double* to) {
  const at::Tensor given = is_plain(parameter) ? parameter : parameter.detach().to(at::kCPU, at::kDouble).contiguous();
  if (given.scalar_type() == at::kFloat) {
    std::copy_n(given.const_data_ptr<float>(), given.numel(), to);
  } else {
    std::copy_n(given.const_data_ptr<double>(), given.numel(), to);
  }
}

void write_back(const double* from, const at::Tensor& parameter) {
  if (is_plain(parameter)) {
    float* to = parameter.mutable_data_ptr<float>();
    for (int64_t i = 0; i < parameter.numel(); ++i) {
      to[i] = static_cast<float>(from[i]);
    }
    parameter.unsafeGetTensorImpl()->bump_version();
    return;
  }
  auto host = empty_result(parameter.sizes(), at::TensorOptions(at::kDouble));
  std::copy_n(from, parameter.numel(), host.mutable_data_ptr<double>());
  parameter.detach().copy_(host);
}

double largest_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? std::numeric_limits<double>::max()
                              : static_cast<double>(std::numeric_limits<float>::max());
}

void gather(const at::Tensor& input, const at::Tensor& target, const MomentsMemory& to) {
  if (input.is_cpu() && gather_moments_cpu(input, target, to)) {
    return;
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchintro::_linear_moments", "")
                             .typed<LinearMoments(const at::Tensor&, const at::Tensor&, const OptionalTensor&)>();
  const auto [count, mean_x, mean_y, sxx, sxy, syy] = op.call(input, target, std::nullopt);
  const std::pair<const at::Tensor&, double*> parts[] = {
      {count, to.count}, {mean_x, to.mean_x}, {mean_y, to.mean_y}, {sxx, to.sxx}, {sxy, to.sxy}, {syy, to.syy}};
  for (const auto& [part, memory] : parts) {
    read(part, memory);
  }
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
  TORCH_CHECK_VALUE(linear_weight.dim() == 2 && linear_weight.numel() > 0,
      kOperator, ": linear_weight must have shape (out_features, in_features), none of them 0, but got ",
      linear_weight.sizes());
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
  RunSizes run{};
  run.optimizer = parse_optimizer(kOperator, optimizer);
  run.models = 1;
  run.out_features = linear_weight.size(0);
  run.in_features = linear_weight.size(1);
  run.epochs = lr.size(0);
  run.train_weight = true;
  run.train_bias = linear_bias.has_value();
  const int64_t d = run.in_features, o = run.out_features;

  // Everything in one piece of memory: a tensor costs some hundred nanoseconds, and with one each this took twice as long.
  std::vector<double> memory(kOptions + run.epochs + 5 * run.parameters() + MomentsMemory::size(d, o));
  double* const option_row = memory.data();
  double* const lrs = option_row + kOptions;
  double* const parameters = lrs + run.epochs;
  double* const state = parameters + run.parameters(); // four rows
  const MomentsMemory moments(state + 4 * run.parameters(), d, o);
  std::copy(options.begin(), options.end(), option_row);
  for (int64_t epoch = 0; epoch < run.epochs; ++epoch) {
    lrs[epoch] = lr.const_data_ptr<double>()[epoch * lr.stride(0)];
  }
  gather(input, target, moments);
  read(linear_weight, parameters);
  double* const bias = linear_bias ? parameters + o * d : nullptr;
  if (bias) {
    read(*linear_bias, bias);
  }
  int64_t stopped = -1;
  auto losses = empty_result({run.epochs}, at::TensorOptions(at::kDouble));
  auto* loss = losses.mutable_data_ptr<double>();
  std::fill_n(loss, run.epochs, std::numeric_limits<double>::quiet_NaN());
  const Models<double> models(run, parameters, bias, state, option_row, lrs, &stopped);
  train_on_moments(run, models, moments, largest_of(linear_weight.scalar_type()), loss);
  write_back(parameters, linear_weight);
  if (bias) {
    write_back(bias, *linear_bias);
  }
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
