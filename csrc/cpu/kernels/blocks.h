// Sums over blocks of rows: which thread computes what. Knows no threads itself: the operator brings ATen's, the tests under
// ThreadSanitizer std::thread. Not for the levels' files, which may not use the standard library.
#pragma once

#include "cpu/kernels/kernels.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

namespace torchintro::cpu {

// Multiplications that are worth waking a thread for (ATen's own grain size).
constexpr int64_t kOperationsPerThread = 32768;

// A kernel's scratch: on the stack up to a size that a small problem stays within, whose time an aligned allocation and its
// release would be felt in.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof(small_))) {
      large_.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t(kScratchAlignment)));
    }
  }

  void* get() {
    return large_ ? large_.get() : small_;
  }

 private:
  struct DeleteAligned {
    void operator()(void* memory) const {
      ::operator delete(memory, std::align_val_t(kScratchAlignment));
    }
  };
  alignas(kScratchAlignment) std::byte small_[8192];
  std::unique_ptr<void, DeleteAligned> large_;
};

// Sums of blocks, side by side.
struct BlockSums {
  std::unique_ptr<double[]> sums;
  int64_t blocks;
};

// Runs kernel(begin, end, partial, scratch) over at most `blocks` blocks of rows; each leaves its `size` sums.
// `parallel_for(begin, end, grain, run)` is as ATen's: it cuts the range into pieces of `grain` or more and calls
// run(begin, end) for each, from any thread. There is at least one row.
template <typename ParallelFor, typename Kernel>
BlockSums run_blocks(
    const ParallelFor& parallel_for,
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
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    ScratchMemory scratch(scratch_bytes);
    for (int64_t block = begin; block < end; ++block) {
      kernel(block * block_rows, std::min(rows, (block + 1) * block_rows), sums.get() + block * size, scratch.get());
    }
  });
  return {std::move(sums), blocks};
}

// The same, and the blocks' sums added up, in block order: the first `size` values of what is returned.
template <typename ParallelFor, typename Kernel>
std::unique_ptr<double[]> sum_blocks(
    const ParallelFor& parallel_for,
    int64_t rows,
    int64_t most_blocks,
    int64_t operations_per_row,
    int64_t size,
    int64_t scratch_bytes,
    const Kernel& kernel) {
  auto [sums, blocks] = run_blocks(parallel_for, rows, most_blocks, operations_per_row, size, scratch_bytes, kernel);
  double* const first = sums.get();
  if (blocks > 1) {
    const int64_t count = blocks;
    parallel_for(0, size, kOperationsPerThread / count + 1, [=](int64_t begin, int64_t end) {
      for (int64_t block = 1; block < count; ++block) {
        for (int64_t i = begin; i < end; ++i) {
          first[i] += first[block * size + i];
        }
      }
    });
  }
  return std::move(sums);
}

} // namespace torchintro::cpu
