// Sums in a fixed order: no atomics, and no order that depends on the GPU or on what else runs on it, so that a result
// is the same to the bit from run to run.
//
// Two stages. A kernel's blocks write partial sums to a workspace; a second kernel, launched behind it on the same stream,
// adds them up with `sum_of_partials`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace torchintro::cuda {

// One value a thread, `threads` (a power of two) in the block; thread t < keep (a power of two) returns the sum of the
// values of the threads t, t + keep, t + 2 keep, ...; the others return something unspecified. The order is a tree: the
// upper half is added to the lower half until `keep` are left. `scratch` holds one double a thread; it is free for reuse
// on return. All threads of the block must call.
__device__ inline double block_sum(double value, int keep, int threads, double* scratch) {
  const int t = static_cast<int>(threadIdx.x);
  scratch[t] = value;
  for (int half = threads / 2; half >= keep; half /= 2) {
    __syncthreads();
    if (t < half) {
      scratch[t] += scratch[t + half];
    }
  }
  const double sum = scratch[t]; // a thread below `keep` wrote this itself
  __syncthreads();
  return sum;
}

// The block's partial sums, from those of its warps in order: sums[column * blocks + block] for the first `columns`, a thread
// each. A barrier must lie between the warps' writing and this.
template <int kWarps, int kColumns>
__device__ inline void store_block_sums(
    const double (&sums_of_warp)[kWarps][kColumns], int columns, double* sums, int64_t blocks) {
  const int column = static_cast<int>(threadIdx.x);
  if (column < columns) {
    double total = 0;
    for (int k = 0; k < kWarps; ++k) {
      total += sums_of_warp[k][column];
    }
    sums[column * blocks + blockIdx.x] = total;
  }
}

// Partial sums to be added up: `count` of them for each of `columns` results. Partial i of column c lies at
// data[i * partial_stride + c * column_stride].
template <typename T>
struct Partials {
  const T* data = nullptr;
  int64_t count = 0;
  int64_t columns = 0;
  int64_t partial_stride = 0;
  int64_t column_stride = 0;
  int width = 1; // columns per block, a power of two that divides kSumThreads
};

inline constexpr int kSumThreads = 512;
inline constexpr int kMaxSumWidth = 32; // a warp then reads 128 or 256 neighbouring bytes

// Blocks that the columns take.
template <typename T>
int64_t sum_blocks(const Partials<T>& partials) {
  return (partials.columns + partials.width - 1) / partials.width;
}

// With kSumThreads threads in the block: thread x < width of block b owns column c = b * width + x, stores c in `column`
// and returns true with the column's total if that column exists; all other threads return false. Thread (x, y) of the
// width x (kSumThreads / width) threads adds the partials y, y + height, y + 2 height, ... of its column in that order, in
// double, and block_sum adds the rows of threads. All threads of the block must call.
template <typename T>
__device__ inline bool sum_of_partials(
    const Partials<T>& partials, int64_t block, double* scratch, int64_t& column, double& total) {
  const int x = static_cast<int>(threadIdx.x) % partials.width;
  const int y = static_cast<int>(threadIdx.x) / partials.width;
  const int height = kSumThreads / partials.width;
  column = block * partials.width + x;
  double sum = 0;
  if (column < partials.columns) {
    const T* __restrict__ data = partials.data + column * partials.column_stride;
#pragma unroll 4
    for (int64_t i = y; i < partials.count; i += height) {
      sum += static_cast<double>(data[i * partials.partial_stride]);
    }
  }
  total = block_sum(sum, partials.width, kSumThreads, scratch);
  return y == 0 && column < partials.columns;
}

} // namespace torchintro::cuda
