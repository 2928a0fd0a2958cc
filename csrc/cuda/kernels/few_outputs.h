// Loss and gradients for few outputs, where the work is reading X rather than multiplying it.
//
// The call is all that the callers know: how many kernels it takes, and how often they read X, is this file's affair.
#pragma once

#include "cuda/kernels/types.h"

#include <cuda_runtime_api.h>

namespace torchintro::cuda {

inline constexpr int kMaxFewOutputs = 16;

// N rows, D in_features, O out_features; all pointers are device pointers.
struct FewOutputsCall {
  int64_t rows; // N >= 1
  int64_t in_features; // D >= 0
  int out_features; // 1 <= O <= kMaxFewOutputs
  Dtype dtype; // of input, linear_weight, linear_bias and their gradients
  Dtype target_dtype; // of target, weight, loss and grad_target: `dtype`, or Float32 where that has 16 bits

  Matrix input; // (N, D)
  Matrix target; // (N, O)
  Matrix weight; // (N, O); null without
  const void* linear_weight; // (O, D) contiguous
  const void* linear_bias; // (O) contiguous; null without
  const double* weight_sum; // what loss and g are divided by; null for 1

  // As in Problem (csrc/problem.h).
  double loss_factor;
  double residual_factor;
  double weight_gradient_factor;
  double target_gradient_factor;
  double input_gradient_factor;

  int multiprocessors; // of the device: they size the grid

  // Results: contiguous; a null gradient is not computed.
  void* loss; // ()
  void* grad_input; // (N, D)
  void* grad_linear_weight; // (O, D), dtype, or float32 for float16
  void* grad_target; // (N, O)
  void* grad_linear_bias; // (O), the same
};

// Bytes of device memory that the call needs besides its arguments.
size_t few_outputs_workspace(const FewOutputsCall& call);

// Enqueues the kernels on `stream` and returns at once. `workspace`: few_outputs_workspace(call) bytes, aligned to 256.
cudaError_t few_outputs(const FewOutputsCall& call, void* workspace, cudaStream_t stream);

} // namespace torchintro::cuda
