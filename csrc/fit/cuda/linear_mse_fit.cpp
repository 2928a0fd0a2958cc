// linear_mse_fit on CUDA: one kernel for small problems, PyTorch's operators for the others.
//
// Everything is enqueued on the current stream of input's device; the host waits once, for the results. The orders of the
// rows are drawn on the host, as the plain loop draws them, while the device trains the epochs before.
#include "fit/fit.h"

#include "cuda/kernels/fit.h"
#include "fit/decomposed.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

namespace torchintro::fit {
namespace {

// Row numbers that are drawn and sent together, 32 MB; at least an epoch's.
constexpr int64_t kMostRowNumbers = int64_t{1} << 22;

static_assert(cuda::kFitOptions == kOptions);

cuda::Matrix kernel_matrix(const at::Tensor& tensor) {
  return tensor.defined() ? cuda::Matrix{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)} : cuda::Matrix{};
}

// The call but for what `run` has on the host, and for the results.
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
  call.adam = run.optimizer != Optimizer::Sgd;
  call.decoupled = run.optimizer == Optimizer::AdamW;
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

// What goes to the device and what comes back lie side by side, [lr | options | stopped | losses | validation losses], so that
// one copy takes the first three there and one brings the last three back: a copy takes as long as some ten epochs.
Losses one_launch(const RowsRun& run, cuda::FitRowsCall call) {
  const int64_t lr = 0;
  const int64_t options = lr + run.lr.numel();
  const int64_t stopped = options + run.options.numel();
  const int64_t losses = stopped + run.models;
  const int64_t validation_losses = losses + run.lr.numel();
  const int64_t validation_epochs = call.validation_rows > 0 ? run.epochs : 0;
  const int64_t end = validation_losses + validation_epochs * run.models;

  const auto there = at::empty({losses}, at::kDouble);
  double* const sent = there.mutable_data_ptr<double>();
  std::copy_n(run.lr.const_data_ptr<double>(), run.lr.numel(), sent + lr);
  std::copy_n(run.options.const_data_ptr<double>(), run.options.numel(), sent + options);
  std::memcpy(sent + stopped, run.stopped.const_data_ptr<int64_t>(), static_cast<size_t>(run.models) * sizeof(int64_t));
  const auto memory = at::empty({end}, run.input.options().dtype(at::kDouble));
  // CUDA has read pageable memory when it returns from such a copy.
  memory.narrow(0, 0, losses).copy_(there, /*non_blocking=*/true);

  double* const numbers = memory.mutable_data_ptr<double>();
  call.options = numbers + options;
  call.stopped = reinterpret_cast<int64_t*>(numbers + stopped);
  const int64_t piece = run.shuffle ? std::max<int64_t>(1, kMostRowNumbers / run.rows) : run.epochs;
  for (int64_t first = 0; first < run.epochs; first += piece) {
    call.epochs = std::min(piece, run.epochs - first);
    const auto orders = run.shuffle ? draw_orders(run, call.epochs) : at::Tensor();
    call.order = orders.defined() ? orders.const_data_ptr<int64_t>() : nullptr;
    call.lr = numbers + lr + first * run.models;
    call.epoch = run.epoch + first;
    call.step = run.step + first * run.batches();
    call.losses = numbers + losses + first * run.models;
    call.validation_losses = validation_epochs > 0 ? numbers + validation_losses + first * run.models : nullptr;
    C10_CUDA_CHECK(cuda::fit_rows(call, c10::cuda::getCurrentCUDAStream()));
  }
  count_changes(run);

  const auto back = memory.narrow(0, stopped, end - stopped).cpu();
  std::memcpy(
      run.stopped.mutable_data_ptr<int64_t>(),
      back.const_data_ptr<double>(),
      static_cast<size_t>(run.models) * sizeof(int64_t));
  const auto part = [&](int64_t begin, int64_t epochs) {
    return back.narrow(0, begin - stopped, epochs * run.models).view({epochs, run.models}).clone();
  };
  return {part(losses, run.epochs), part(validation_losses, validation_epochs)};
}

Losses linear_mse_fit_cuda(const RowsRun& run) {
  if (run.epochs == 0) {
    return no_losses(run, run.validation_input.defined());
  }
  const c10::cuda::CUDAGuard guard(run.input.device());
  const at::AutoDispatchBelowAutograd below_autograd;
  const auto call = make_call(run);
  return cuda::fit_rows_takes(call) ? one_launch(run, call) : decomposed_rows_run(run);
}

TORCH_LIBRARY_IMPL(torchintro, CUDA, m) {
  m.impl("linear_mse_fit", rows_operator<linear_mse_fit_cuda>);
}

} // namespace
} // namespace torchintro::fit
