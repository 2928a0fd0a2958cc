// Few outputs, bfloat16: tiles of 16 rows through the tensor cores. X is read once, by copies in the background.
//
//   p' = W x'                 16 outputs x 8 rows, over 16 columns at a time
//   g' = residual_factor / S * v * (p - t), as the sum of two bfloat16, `high` and `low`: 16 bits of g
//   dW += g' x                16 outputs x 8 columns, over 16 rows
//   dX = g W                  16 rows x 8 columns, over 16 outputs
//
// p' leaves the tensor cores laid out over the lanes as g' is to enter them, so g never leaves its registers but to be
// added up over warps. With up to 8 outputs the lower half of the 16 holds `low` beside `high` above, at no further cost.
// The products of bfloat16 are exact in the float that they are added up in.
//
// Bytes of device memory, with u the size of target's dtype: 2 N D to read X, N O u for t (as much again for v); 2 N D and
// N O u to write dX and dT, where wanted; 2 blocks a multiprocessor leave O D partial sums each. Operations, counting the
// tensor cores' unused rows: 4 N D 16 for p and dW (6 with more than 8 outputs), 2 or 4 N D 16 for dX.
#include "cuda/kernels/arithmetic.h"
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/first_stage.h"
#include "cuda/kernels/grid.h"
#include "cuda/kernels/reduction.cuh"

#include <algorithm>

namespace torchintro::cuda {
namespace {

using T = __nv_bfloat16;

constexpr int kRows = 16; // of a tile
constexpr int kColumns = 128; // of a warp: 64 registers for the sums of g' x
constexpr int kSteps = kColumns / 16;
constexpr int kChunk = 8; // elements in 16 bytes, the unit of copies and of load_matrices
constexpr int kChunks = kColumns / kChunk; // of a warp's row
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 2; // tiles that a warp has in shared memory
constexpr int kTileElements = kRows * kColumns;
constexpr int kRingElements = kWarps * kStages * kTileElements; // 64 KB
constexpr int kWeightElements = 8 * kColumns; // of a part of W, with up to 8 outputs
constexpr int kLeastOutputs = 3; // with fewer, rows.cu has time enough
constexpr int kLeastFeatures = 32; // with fewer, a tile is mostly padding

struct Plan {
  int tile_warps; // warps that share a tile, a power of two
  int64_t passes; // of the grid: kWarps / tile_warps tiles each
  int64_t blocks;
};

Plan make_plan(const FewOutputsCall& call) {
  Plan plan{};
  plan.tile_warps = power_of_two_from(divide_up(call.in_features, kColumns), kWarps);
  plan.passes = divide_up(call.rows, int64_t{kRows} * (kWarps / plan.tile_warps));
  plan.blocks = grid_blocks(plan.passes, kRows, call.multiprocessors);
  return plan;
}

// Where a chunk of a tile's row lies. The eight rows of a matrix would lie 256 bytes apart, all in the same banks of shared
// memory: each row's chunks are swapped in its own way, chunk c with chunk c ^ (row % 8). So place(row, c) ^ step is
// place(row, c ^ step).
__device__ inline int chunk_place(int row, int chunk) {
  return (row * kChunks + row % 8) ^ chunk;
}

// What bfloat16 leaves of two numbers whose bfloat16 are in `high`; of infinity infinity, for 0 times infinity were NaN.
__device__ inline uint32_t pack_rest(float first, float second, uint32_t high) {
  constexpr float kLargest = 3.4028234663852886e38f;
  const float a = first - __uint_as_float(high << 16);
  const float b = second - __uint_as_float(high & 0xffff0000u);
  return pack_bfloat16(fabsf(a) <= kLargest ? a : first, fabsf(b) <= kLargest ? b : second);
}

// W as parts of matrices, for a warp's columns: of step s, W[line, left], W[line, right] and, with more than 8 outputs,
// W[line + 8, left], W[line + 8, right]. Those of up to 8 outputs lie in shared memory: with two blocks a multiprocessor, no
// registers are left for them. Those of more do not fit there on every GPU.
template <bool kMore>
struct Weight;

template <>
struct Weight<true> {
  uint32_t parts[kSteps][4];

  __device__ void load(const FewOutputsCall& call, const Plan& plan, T*, int warp, int lane) {
    const int64_t first_column = int64_t{warp % plan.tile_warps} * kColumns;
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      const int o = lane / 4 + i / 2 % 2 * 8;
      const int64_t column = first_column + i / 4 * 16 + i % 2 * 8 + lane % 4 * 2;
      const T* source = static_cast<const T*>(call.linear_weight) + o * call.in_features + column;
      const bool present = o < call.out_features && column < call.in_features;
      parts[i / 4][i % 4] = present ? *reinterpret_cast<const uint32_t*>(source) : 0u;
    }
  }
  __device__ void step_pair(int pair, uint32_t (&w)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      w[i / 4][i % 4] = parts[2 * pair + i / 4][i % 4];
    }
  }
};

template <>
struct Weight<false> {
  const T* part;
  int place; // the row that this lane tells load_matrices: of left and right of a step, then of the next

  // All threads of the block must call; a barrier must follow.
  __device__ void load(const FewOutputsCall& call, const Plan& plan, T* memory, int warp, int lane) {
    for (int i = static_cast<int>(threadIdx.x); i < plan.tile_warps * kWeightElements / kChunk; i += kThreads) {
      const int chunk = i % kChunks;
      const int o = i / kChunks % 8;
      const int64_t column = int64_t{i / (8 * kChunks)} * kColumns + chunk * kChunk;
      const T* source = static_cast<const T*>(call.linear_weight) + o * call.in_features + column;
      T* destination = memory + i / (8 * kChunks) * kWeightElements + chunk_place(o, chunk) * kChunk;
      copy_async<16>(destination, source, o < call.out_features && column < call.in_features);
    }
    part = memory + warp % plan.tile_warps * kWeightElements;
    place = chunk_place(lane % 8, lane / 8);
  }
  __device__ void step_pair(int pair, uint32_t (&w)[2][4]) const {
    uint32_t both[4];
    load_matrices(both, part + (place ^ (4 * pair)) * kChunk);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      w[i][0] = both[2 * i];
      w[i][1] = both[2 * i + 1];
      w[i][2] = 0;
      w[i][3] = 0;
    }
  }
};

// Work: a block owns neighbouring passes. tile_warps warps own the 16 rows of a tile, kColumns columns each. In registers, as
//   parts of matrices (device.cuh), lane (line, t) has W[o, ..], p[o, n] and g[o, n] of the outputs o = line and line + 8 and of
//   the rows n = 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. A warp copies its part of a tile to shared memory kStages passes ahead, and no
//   other warp reads it there.
// Sums: p in float, in the order of the tensor cores, then over the tile's warps in order; g' x in float over at most kMostTerms
//   rows, then over the block's tiles in order; the loss in double. Fixed order for a given number of multiprocessors.
template <bool kMore> // than 8 outputs
__global__ void __launch_bounds__(kThreads, kMore ? 1 : 2)
    tiles_kernel(const FewOutputsCall call, const Plan plan, double* sums, float* weight_sums) {
  constexpr int kHalves = kMore ? 2 : 1; // of the outputs, 8 each
  constexpr int kOutputs = 8 * kHalves;
  constexpr int kValues =
      4 * kHalves; // of p and g in a lane: [half][j][e] of output line + 8 half and row 8 j + 2 t + e
  __shared__ float share_of_warp[2][kWarps][kValues][32]; // p of tiles that several warps work on; in turn
  __shared__ double sums_of_warp[kWarps][1 + kOutputs];

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int line = lane / 4;
  const int t = lane % 4;
  const int part = warp % plan.tile_warps; // which columns
  const int first_warp = warp - part;
  const int64_t first_column = int64_t{part} * kColumns;
  const int steps =
      static_cast<int>(max(min(call.in_features - first_column, int64_t{kColumns}), int64_t{0}) + 15) / 16;
  const int64_t first_pass = blockIdx.x * plan.passes / plan.blocks;
  const int64_t end_pass = (blockIdx.x + 1) * plan.passes / plan.blocks;
  const auto scale = static_cast<float>(call.residual_factor / (call.weight_sum == nullptr ? 1.0 : *call.weight_sum));
  const bool wants_weight = weight_sums != nullptr;
  const bool wants_input = call.grad_input != nullptr;
  // The rows that this lane tells load_matrices: of the upper left matrix of a step's 16 x 16, then upper right, lower left,
  // lower right; and lower left before upper right.
  int by_rows = chunk_place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  int by_columns = chunk_place(lane / 8 % 2 * 8 + lane % 8, lane / 16);
  T* tiles = dynamic_shared<T>() + warp * kStages * kTileElements;

  Weight<kMore> weight;
  weight.load(call, plan, dynamic_shared<T>() + kRingElements, warp, lane);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  float bias[kHalves];
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int o = line + 8 * half;
    bias[half] = call.linear_bias == nullptr || o >= call.out_features
        ? 0.0f
        : widen(static_cast<const T*>(call.linear_bias)[o]);
  }

  const int passes = static_cast<int>(end_pass - first_pass);
  const auto tile_of = [&](int pass) { return tiles + pass % kStages * kTileElements; };
  const auto first_row_of = [&](int pass) {
    return ((first_pass + pass) * (kWarps / plan.tile_warps) + warp / plan.tile_warps) * kRows;
  };
  const auto copy_pass = [&](int pass) {
    const int chunk = lane % kChunks;
    if (pass < passes && chunk < 2 * steps) { // what no step reads need not be there
      const T* source = static_cast<const T*>(call.input.data) + first_column + chunk * kChunk;
      const bool column_exists = first_column + chunk * kChunk < call.in_features;
#pragma unroll 1
      for (int i = lane / kChunks; i < kRows; i += 32 / kChunks) {
        const int64_t row = first_row_of(pass) + i;
        copy_async<16>(
            tile_of(pass) + chunk_place(i, chunk) * kChunk,
            source + row * call.input.row_stride,
            column_exists && row < call.rows);
      }
    }
    copy_async_commit();
  };

  float target[kValues];
  const auto load_targets = [&](int pass) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int o = line + 8 * (i / 4);
      const int64_t row = first_row_of(pass) + 8 * (i / 2 % 2) + 2 * t + i % 2;
      if (o < call.out_features && row < call.rows) {
        target[i] = target_element<T>(call, call.target, row, o);
      }
    }
  };

  float products[2 * kSteps][4] = {}; // of g' x: [8 columns]
  float g_sums[kHalves] = {};
  double loss = 0;

#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    copy_pass(stage);
  }
  load_targets(0);
  for (int pass = 0; pass < passes; ++pass) {
    forget_origin(by_rows); // sixteen addresses that follow from the two would else be kept in registers
    forget_origin(by_columns);
    T* tile = tile_of(pass);
    const int64_t first_row = first_row_of(pass);
    copy_async_wait<kStages - 1>();
    __syncwarp(); // the copies of the other lanes

    float p[2][4] = {}; // [j]: rows 8 j to 8 j + 7
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      if (2 * pair < steps) { // the same for the whole warp
        uint32_t w[2][4];
        weight.step_pair(pair, w);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int step = 2 * pair + i;
          if (step < steps) {
            const uint32_t a[4] = {w[i][0], w[i][2], w[i][1], w[i][3]};
            uint32_t x[4]; // rows 0 to 7 left and right, rows 8 to 15 left and right
            load_matrices(x, tile + (by_rows ^ (2 * step)) * kChunk);
            multiply_add(p[0], a, x[0], x[1]);
            multiply_add(p[1], a, x[2], x[3]);
          }
        }
      }
    }
    float g[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      g[i] = p[i / 2 % 2][i / 4 * 2 + i % 2];
    }
    if (plan.tile_warps > 1) { // the same for the whole block
      auto& shares = share_of_warp[pass % 2];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        shares[warp][i][lane] = g[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        g[i] = 0;
        for (int k = 0; k < plan.tile_warps; ++k) {
          g[i] += shares[first_warp + k][i][lane];
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kValues; ++i) { // from p to g
      const int o = line + 8 * (i / 4);
      const int64_t row = first_row + 8 * (i / 2 % 2) + 2 * t + i % 2;
      float value = 0;
      if (o < call.out_features && row < call.rows) {
        const float r = g[i] + bias[i / 4] - target[i];
        const float v = call.weight.data == nullptr ? 1.0f : target_element<T>(call, call.weight, row, o);
        value = scale * v * r;
        if (part == 0) { // of the warps that know the same g, one keeps the books
          loss += static_cast<double>(v) * r * r;
          g_sums[i / 4] += value;
          if (call.grad_target != nullptr) {
            store_target_gradient<T>(call, row, o, static_cast<float>(call.target_gradient_factor) * value);
          }
        }
      }
      g[i] = value;
    }
    if (pass + 1 < passes) {
      load_targets(pass + 1); // while the rest of this pass goes on
    }

    if (wants_weight || wants_input) {
      uint32_t high[kHalves][2]; // g as parts: [half][j], outputs 8 half to 8 half + 7, rows 8 j to 8 j + 7
      uint32_t low[kHalves][2];
#pragma unroll
      for (int i = 0; i < kValues; i += 2) {
        high[i / 4][i / 2 % 2] = pack_bfloat16(g[i], g[i + 1]);
        low[i / 4][i / 2 % 2] = pack_rest(g[i], g[i + 1], high[i / 4][i / 2 % 2]);
      }
      if (wants_weight) {
        const auto& below = kMore ? high[kHalves - 1] : low[0];
        const uint32_t a[4] = {high[0][0], below[0], high[0][1], below[1]};
        const uint32_t rest[4] = {low[0][0], low[kHalves - 1][0], low[0][1], low[kHalves - 1][1]};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (step < steps) {
            uint32_t x[4]; // left 8 columns of the upper and lower rows, right 8 columns
            load_matrices_transposed(x, tile + (by_columns ^ (2 * step)) * kChunk);
            multiply_add(products[2 * step], a, x[0], x[1]);
            multiply_add(products[2 * step + 1], a, x[2], x[3]);
            if constexpr (kMore) {
              multiply_add(products[2 * step], rest, x[0], x[1]);
              multiply_add(products[2 * step + 1], rest, x[2], x[3]);
            }
          }
        }
      }
      if (wants_input) {
        uint32_t a[4]; // rows by outputs
        uint32_t rest[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          a[j] = transpose_matrix(high[0][j]);
          a[2 + j] = transpose_matrix(kMore ? high[kHalves - 1][j] : low[0][j]);
          rest[j] = kMore ? transpose_matrix(low[0][j]) : 0u;
          rest[2 + j] = kMore ? transpose_matrix(low[kHalves - 1][j]) : 0u;
        }
        const auto factor = static_cast<float>(call.input_gradient_factor);
        __syncwarp(); // the tile has been read: dX takes its place
#pragma unroll
        for (int pair = 0; pair < kSteps / 2; ++pair) {
          if (2 * pair < steps) {
            uint32_t w[2][4];
            weight.step_pair(pair, w);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (2 * pair + i / 2 < steps) {
                const uint32_t upper = transpose_matrix(w[i / 2][i % 2]);
                const uint32_t lower = kMore ? transpose_matrix(w[i / 2][2 + i % 2]) : upper;
                float gradient[4] = {};
                multiply_add(gradient, a, upper, lower);
                if constexpr (kMore) {
                  multiply_add(gradient, rest, upper, lower);
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  T* place = tile + (chunk_place(line + 8 * j, 0) ^ (4 * pair + i)) * kChunk + 2 * t;
                  *reinterpret_cast<uint32_t*>(place) =
                      pack_bfloat16(factor * gradient[2 * j], factor * gradient[2 * j + 1]);
                }
              }
            }
          }
        }
        __syncwarp();
        const int chunk = lane % kChunks;
        const int64_t column = first_column + chunk * kChunk;
        if (column < call.in_features) {
#pragma unroll 1
          for (int i = lane / kChunks; i < kRows; i += 32 / kChunks) {
            if (first_row + i < call.rows) {
              T* destination = static_cast<T*>(call.grad_input) + (first_row + i) * call.in_features + column;
              *reinterpret_cast<Pack<T, kChunk>*>(destination) =
                  *reinterpret_cast<const Pack<T, kChunk>*>(tile + chunk_place(i, chunk) * kChunk);
            }
          }
        }
      }
    }
    __syncwarp(); // the tile has been read
    copy_pass(pass + kStages);
  }

  for (int offset = 16; offset > 0; offset /= 2) {
    loss += __shfl_xor_sync(0xffffffffu, loss, offset);
  }
  if (lane == 0) {
    sums_of_warp[warp][0] = loss;
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    double value = g_sums[half];
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    value += __shfl_xor_sync(0xffffffffu, value, 2);
    if (t == 0) {
      sums_of_warp[warp][1 + line + 8 * half] = value;
    }
  }
  copy_async_wait<0>();
  __syncthreads(); // also: all tiles have been read
  store_block_sums(sums_of_warp, call.grad_linear_bias == nullptr ? 1 : 1 + call.out_features, sums, plan.blocks);
  if (!wants_weight) {
    return;
  }

  float* shares = dynamic_shared<float>(); // [warp][output][column]
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    float* place = shares + (warp * kOutputs + line) * kColumns + 8 * i + 2 * t;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (kMore) {
        place[e] = products[i][e];
        place[8 * kColumns + e] = products[i][2 + e];
      } else {
        place[e] = products[i][e] + products[i][2 + e];
      }
    }
  }
  __syncthreads();
  float* destination = weight_sums + int64_t{blockIdx.x} * call.out_features * call.in_features;
  const int count = call.out_features * static_cast<int>(call.in_features);
  for (int i = thread; i < count; i += kThreads) {
    const int o = i / static_cast<int>(call.in_features);
    const int column = i % static_cast<int>(call.in_features);
    double total = 0;
    for (int k = column / kColumns; k < kWarps; k += plan.tile_warps) {
      total += shares[(k * kOutputs + o) * kColumns + column % kColumns];
    }
    destination[i] = static_cast<float>(total);
  }
}

} // namespace

bool tiles_take(const FewOutputsCall& call) {
  return call.dtype == Dtype::BFloat16 && call.out_features >= kLeastOutputs && call.in_features >= kLeastFeatures &&
      call.in_features <= kWarps * kColumns && call.in_features % kChunk == 0 && call.input.column_stride == 1 &&
      call.input.row_stride % kChunk == 0 && is_aligned(call.input.data, 16) && is_aligned(call.linear_weight, 16) &&
      is_aligned(call.grad_input, 16);
}

Shares tiles_shares(const FewOutputsCall& call) {
  const auto plan = make_plan(call);
  return {plan.blocks, plan.blocks, 0};
}

cudaError_t tiles_stage(const FewOutputsCall& call, const Shares&, const FirstStage& stage, cudaStream_t stream) {
  const auto plan = make_plan(call);
  auto* weight_sums = static_cast<float*>(stage.weight_sums);
  const bool more = call.out_features > 8;
  const auto kernel = more ? tiles_kernel<true> : tiles_kernel<false>;
  const int elements = kRingElements + (more ? 0 : plan.tile_warps * kWeightElements);
  return launch(kernel, plan.blocks, kThreads, elements * sizeof(T), stream, call, plan, stage.sums, weight_sums);
}

} // namespace torchintro::cuda
