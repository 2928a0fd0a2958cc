// linear_mse_fit on CUDA: one kernel for small problems, PyTorch's operators for the others.
//
// Everything is enqueued on the current stream of input's device; the host waits once, for the results. The orders of the
// rows are drawn on the host, as the plain loop draws them, while the device trains the epochs before.
#include "fit/fit.h"

#include "cuda/kernels/fit.h"
#include "fit/composed.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

namespace torchintro::fit {
namespace {

// Row numbers that are drawn and sent together, 32 MB; at least an epoch's.
constexpr int64_t kMostRowNumbers = int64_t{1} << 22;

static_assert(cuda::kFitOptions == kOptions);

cuda::Matrix kernel_matrix(const at::Tensor& tensor) {
  return tensor.defined() ? cuda::Matrix{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)} : cuda::Matrix{};
}

// The call but for what is on the host in `run`, and for the results.
cuda::FitRowsCall make_call(const RowsRun& run) {
  cuda::FitRowsCall call{};
  call.models = run.models;
  call.rows = run.rows;
  call.batch_rows = run.batch_rows;
  call.in_features = run.in_features;
  call.out_features = static_cast<int>(std::min<int64_t>(run.out_features, cuda::kMaxFitOutputs + 1));
  call.dtype = run.input.scalar_type() == at::kDouble ? cuda::Dtype::Float64 : cuda::Dtype::Float32;
  call.input = kernel_matrix(run.input);
  call.target = kernel_matrix(run.target);
  call.validation_rows = run.validation_input.defined() ? run.validation_input.size(0) : 0;
  call.validation_input = kernel_matrix(run.validation_input);
  call.validation_target = kernel_matrix(run.validation_target);
  call.adam = run.rule != Rule::Sgd;
  call.decoupled = run.rule == Rule::AdamW;
  call.train_weight = run.train_weight;
  call.train_bias = run.train_bias;
  call.linear_weight = run.linear_weight.mutable_data_ptr();
  call.linear_bias = run.linear_bias.defined() ? run.linear_bias.mutable_data_ptr() : nullptr;
  call.state = run.state.mutable_data_ptr();
  return call;
}

// The orders of the next epochs, (epochs, N) int64 on the device.
at::Tensor draw_orders(const RowsRun& run, int64_t epochs) {
  const auto orders = at::empty({epochs, run.rows}, at::TensorOptions(at::kLong));
  for (int64_t e = 0; e < epochs; ++e) {
    orders[e].copy_(draw_order(run));
  }
  return orders.to(run.input.device(), /*non_blocking=*/true);
}

Losses one_launch(const RowsRun& run, cuda::FitRowsCall call) {
  const auto device = run.input.device();
  const auto lr = run.lr.to(device, /*non_blocking=*/true);
  const auto options = run.options.to(device, /*non_blocking=*/true);
  const auto stopped = run.stopped.to(device, /*non_blocking=*/true);
  const int64_t validation_epochs = call.validation_rows > 0 ? run.epochs : 0;
  // Losses, validation losses, and a row for `stopped`, so that one copy brings all of them.
  const auto results = at::full(
      {run.epochs + validation_epochs + 1, run.models},
      std::numeric_limits<double>::quiet_NaN(),
      run.input.options().dtype(at::kDouble));
  const auto last = results.size(0) - 1;
  results[last].view(at::kLong).copy_(stopped);

  double* losses = results.mutable_data_ptr<double>();
  call.options = options.const_data_ptr<double>();
  call.stopped = results[last].view(at::kLong).mutable_data_ptr<int64_t>();
  const int64_t piece = run.shuffle ? std::max<int64_t>(1, kMostRowNumbers / run.rows) : run.epochs;
  for (int64_t first = 0; first < run.epochs; first += piece) {
    call.epochs = std::min(piece, run.epochs - first);
    const auto orders = run.shuffle ? draw_orders(run, call.epochs) : at::Tensor();
    call.order = orders.defined() ? orders.const_data_ptr<int64_t>() : nullptr;
    call.lr = lr.const_data_ptr<double>() + first * run.models;
    call.epoch = run.epoch + first;
    call.step = run.step + first * run.batches();
    call.losses = losses + first * run.models;
    call.validation_losses = validation_epochs > 0 ? losses + (run.epochs + first) * run.models : nullptr;
    C10_CUDA_CHECK(cuda::fit_rows(call, c10::cuda::getCurrentCUDAStream()));
  }
  count_changes(run);

  const auto read = results.cpu();
  run.stopped.copy_(read[last].view(at::kLong));
  return {read.narrow(0, 0, run.epochs).clone(), read.narrow(0, run.epochs, validation_epochs).clone()};
}

Losses linear_mse_fit_cuda(
    const at::Tensor& input,
    const at::Tensor& target,
    const at::Tensor& linear_weight,
    const OptionalTensor& linear_bias,
    const at::Tensor& lr,
    const at::Tensor& options,
    const at::Tensor& state,
    const at::Tensor& stopped,
    std::string_view optimizer,
    int64_t epoch,
    int64_t step,
    int64_t batch_size,
    bool shuffle,
    const std::optional<at::Generator>& generator,
    const OptionalTensor& validation_input,
    const OptionalTensor& validation_target,
    bool train_weight,
    bool train_bias) {
  const auto run = check_rows_run(
      input,
      target,
      linear_weight,
      linear_bias,
      lr,
      options,
      state,
      stopped,
      optimizer,
      epoch,
      step,
      batch_size,
      shuffle,
      generator,
      validation_input,
      validation_target,
      train_weight,
      train_bias);
  if (run.epochs == 0) {
    return no_losses(run, run.validation_input.defined());
  }
  const c10::cuda::CUDAGuard guard(input.device());
  const at::AutoDispatchBelowAutograd below_autograd;
  const auto call = make_call(run);
  return cuda::fit_rows_takes(call) ? one_launch(run, call) : composed_rows_run(run);
}

TORCH_LIBRARY_IMPL(torchintro, CUDA, m) {
  m.impl("linear_mse_fit", linear_mse_fit_cuda);
}

} // namespace
} // namespace torchintro::fit
