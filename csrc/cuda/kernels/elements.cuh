// Elements of target, weight and target's gradient, which have input's dtype or are float32 beside 16 bits.
#pragma once

#include "cuda/kernels/few_outputs.h"
#include "cuda/kernels/scalar.cuh"

namespace torchintro::cuda {

template <typename T>
__device__ inline Accumulator<T> target_element(
    const FewOutputsCall& call, const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t index = row * matrix.row_stride + column * matrix.column_stride;
  return call.target_dtype != call.dtype ? static_cast<const float*>(matrix.data)[index]
                                         : widen(static_cast<const T*>(matrix.data)[index]);
}

template <typename T>
__device__ inline void store_target_gradient(
    const FewOutputsCall& call, int64_t row, int64_t column, Accumulator<T> value) {
  const int64_t index = row * call.out_features + column;
  if (call.target_dtype != call.dtype) {
    static_cast<float*>(call.grad_target)[index] = static_cast<float>(value);
  } else {
    static_cast<T*>(call.grad_target)[index] = narrow<T>(value);
  }
}

} // namespace torchintro::cuda
