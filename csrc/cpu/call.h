// What the CPU's two regimes share: tensors as the kernels see them, and sums over blocks of rows.
#pragma once

#include "cpu/kernels/kernels.h"
#include "problem.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace torchintro::cpu {

// Multiplications that are worth waking a thread for (ATen's own grain size).
constexpr int64_t kOperationsPerThread = 32768;

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::Float64;
    case at::kFloat:
      return DType::Float32;
    case at::kBFloat16:
      return DType::BFloat16;
    default:
      return DType::Float16;
  }
}

inline Strided<const void> strided(const at::Tensor& matrix) {
  return matrix.defined() ? Strided<const void>{matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1)}
                          : Strided<const void>{};
}

inline void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// residual_factor / S, which on the CPU can simply be read.
inline double residual_scale(const Problem& p) {
  return p.weight_sum.defined() ? p.residual_factor / *p.weight_sum.const_data_ptr<double>() : p.residual_factor;
}

struct FreeScratch {
  void operator()(void* memory) const {
    std::free(memory);
  }
};

inline std::unique_ptr<void, FreeScratch> scratch_memory(int64_t bytes) {
  void* memory = std::aligned_alloc(kScratchAlignment, round_up(std::max<int64_t>(bytes, 1), kScratchAlignment));
  TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr, "linear_mse_loss: no memory for ", bytes, " bytes of scratch");
  return std::unique_ptr<void, FreeScratch>(memory);
}

// Runs kernel(begin, end, partial, scratch) over blocks of rows and adds the blocks' `size` sums up, in block order. The
// sums are the first `size` values of what is returned.
template <typename Kernel>
std::unique_ptr<double[]> sum_blocks(
    int64_t rows,
    int64_t blocks,
    int64_t operations_per_row,
    int64_t size,
    int64_t scratch_bytes,
    const Kernel& kernel) {
  const int64_t block_rows = (rows + blocks - 1) / blocks;
  blocks = (rows + block_rows - 1) / block_rows;
  const int64_t grain =
      std::max<int64_t>(1, kOperationsPerThread / std::max<int64_t>(1, operations_per_row * block_rows));
  std::unique_ptr<double[]> sums(new double[blocks * size]);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_memory(scratch_bytes);
    for (int64_t block = begin; block < end; ++block) {
      kernel(block * block_rows, std::min(rows, (block + 1) * block_rows), sums.get() + block * size, scratch.get());
    }
  });
  if (blocks > 1) {
    at::parallel_for(0, size, kOperationsPerThread / blocks + 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t i = begin; i < end; ++i) {
          sums[i] += sums[block * size + i];
        }
      }
    });
  }
  return sums;
}

} // namespace torchintro::cpu
