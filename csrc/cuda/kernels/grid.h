// How many blocks share out the rows of a call with few outputs.
#pragma once

#include "cuda/kernels/arithmetic.h"

#include <algorithm>

namespace torchintro::cuda {

// Two blocks a multiprocessor: both fit, by shared memory and by registers, on GPUs for data centres, and one computes while
// the other waits. Not yet measured on a GPU.
inline constexpr int64_t kBlocksPerMultiprocessor = 2;
// Rows whose products a sum in float32 takes up before it is a partial sum: longer calls get a multiple of the blocks.
inline constexpr int64_t kMostTerms = 1024;

// For `passes` passes over the rows, in each of which a thread adds `terms` products to its sums.
inline int64_t grid_blocks(int64_t passes, int64_t terms, int multiprocessors) {
  const int64_t together = kBlocksPerMultiprocessor * std::max(1, multiprocessors);
  const int64_t waves = divide_up(passes * terms, kMostTerms * together);
  return std::max<int64_t>(1, std::min(passes, waves * together));
}

} // namespace torchintro::cuda
