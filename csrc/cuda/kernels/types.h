// What the CUDA kernels and their callers say to each other about data: a dtype, and a matrix of any strides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torchintro::cuda {

enum class Dtype { Float64, Float32, BFloat16, Float16 };

inline constexpr size_t size_of(Dtype dtype) {
  return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2;
}

// A matrix that is only read. Strides are in elements and may be 0.
struct Matrix {
  const void* data = nullptr; // null: there is none
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

} // namespace torchintro::cuda
