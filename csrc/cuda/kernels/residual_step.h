// The step between the matrix products of the regime of many outputs: a chunk of predictions becomes a chunk of g.
#pragma once

#include "cuda/kernels/types.h"

#include <cuda_runtime_api.h>

namespace torchintro::cuda {

// R rows, O out_features; all pointers are device pointers.
struct ResidualStepCall {
  int64_t rows; // R >= 1
  int64_t out_features; // O >= 1
  Dtype dtype; // of prediction
  Dtype target_dtype; // of target, weight and grad_target: `dtype`, or Float32 where that has 16 bits

  void* prediction; // (R, O) contiguous
  bool writes_g; // whether g replaces the prediction
  Matrix target; // (R, O); null where `prediction` is the residual already
  Matrix weight; // (R, O); null without
  const double* weight_sum; // what g is divided by; null for 1

  // As in Problem (csrc/problem.h).
  double residual_factor;
  double target_gradient_factor;

  void* grad_target; // (R, O) contiguous; null if not wanted
  double* loss_sum; // (): sum(v r^2) is added
  double* bias_sum; // (O): the sum of g over the rows is added; null if not wanted
};

// Bytes of device memory that the call needs besides its arguments.
size_t residual_step_workspace(const ResidualStepCall& call);

// Enqueues the kernels on `stream` and returns at once. `workspace`: residual_step_workspace(call) bytes, aligned to 256.
cudaError_t residual_step(const ResidualStepCall& call, void* workspace, cudaStream_t stream);

} // namespace torchintro::cuda
