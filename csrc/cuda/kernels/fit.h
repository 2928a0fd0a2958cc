// The whole training loop on rows, all epochs and batches of it in one kernel: for data so small that a step of the loop is
// over before the next kernel could be launched.
#pragma once

#include "cuda/kernels/types.h"

#include <cuda_runtime_api.h>

namespace torchintro::cuda {

inline constexpr int kMaxFitOutputs = 8;
inline constexpr int kFitOptions = 5; // columns of `options`

// K models, N rows, D in_features, O out_features; all pointers are device pointers. What the arguments mean is said in
// csrc/fit/fit.h.
struct FitRowsCall {
  int64_t models; // K >= 1
  int64_t rows; // N >= 1
  int64_t batch_rows; // 1 to N
  int64_t in_features; // D >= 1
  int out_features; // 1 <= O <= kMaxFitOutputs
  Dtype dtype; // Float32 or Float64: of the data, the parameters and the state

  Matrix input; // (N, D)
  Matrix target; // (N, O)
  int64_t validation_rows; // 0 without
  Matrix validation_input;
  Matrix validation_target;
  const int64_t* order; // (E, N) contiguous, the rows in each epoch's order; null: as they lie

  bool adam; // otherwise sgd
  bool decoupled; // adamw
  const double* lr; // (E, K)
  const double* options; // (K, kFitOptions)
  int64_t epochs; // E of this call
  int64_t epoch; // run by earlier calls
  int64_t step; // updates made by earlier calls
  bool train_weight;
  bool train_bias; // only with linear_bias

  void* linear_weight; // (K, O, D)
  void* linear_bias; // (K, O); null without
  void* state; // (S, K, O D + O)
  int64_t* stopped; // (K)
  double* losses; // (E, K); NaN for epochs that a model does not begin
  double* validation_losses; // (E, K); NaN where there is no such loss; null without
};

// Whether the kernel can take a call of these sizes and will be faster than a kernel for every operation of the loop. Looks
// at no pointer.
bool fit_rows_takes(const FitRowsCall& call);

// Enqueues the kernel on `stream` and returns at once. Only for calls that fit_rows_takes.
cudaError_t fit_rows(const FitRowsCall& call, cudaStream_t stream);

} // namespace torchintro::cuda
