// Few outputs, rows longer than a block can hold: chunks of rows that stay in the second-level cache, two kernels for each.
//
//   1  residual_kernel          p = x W' + b, g = residual_factor / S * v * (p - t); dT, dX; partial sums of loss and db
//   2  weight_gradient_kernel   partial sums of g' X; only if linear_weight's gradient is asked for
//
// Device memory in bytes, with s the size of input's dtype, u of target's, a of the accumulator's, and O' for O rounded up
// to a power of two: X is read by 1 (N D s), and by 2 from the cache; t is read (N O u), v if given; a chunk's g is written
// by 1 and read by 2; dX (N D s) and dT (N O u) are written if asked for. Operations: 2 N D O for p, as many for dW and dX.
#include "cuda/kernels/arithmetic.h"
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/first_stage.h"
#include "cuda/kernels/reduction.cuh"

#include <algorithm>

namespace torchintro::cuda {
namespace {

// Not yet measured on a GPU: every constant in this block is reasoned, and to be chosen again by measurement.
constexpr int kThreads = 256;
constexpr int kPackBytes = 16; // the widest access that one thread makes
constexpr int kTargetBlocks = 1024; // blocks before a block gets more work: some waves on 100 to 200 multiprocessors
constexpr int64_t kElementsPerBlock = 65536; // residual_kernel: elements of X that a block reads, if N allows
constexpr int64_t kChunkBytes = int64_t{24} << 20; // of X: half of the second-level cache of an H100
constexpr int kMinRowsPerThread = 8; // weight_gradient_kernel
constexpr int kMaxRowsPerThread = 256; // weight_gradient_kernel: as many terms a float accumulator takes in a row
constexpr int kTileValues = 8; // residual_kernel: values of g per thread in shared memory

__host__ __device__ constexpr int smaller(int a, int b) {
  return a < b ? a : b;
}

// Rows that a group of lanes works on at once, so that an element of W is loaded once for all of them.
__host__ __device__ constexpr int rows_per_group(int tile) {
  return tile <= 8 ? 4 : 2;
}

// Columns whose O' accumulators a thread of weight_gradient_kernel holds.
__host__ __device__ constexpr int columns_per_thread(int tile, int size) {
  return smaller(kPackBytes / size, 64 / tile);
}

// How a call is cut into chunks, and a chunk into blocks. It depends on the call alone, not on the GPU.
struct Plan {
  int tile; // O': out_features rounded up to a power of two
  bool packed; // whether X, W and dX are accessed in packs of kPackBytes
  int64_t chunk_rows;
  int64_t chunks;

  int lanes; // residual_kernel: threads along a row, a power of two up to 32
  int64_t rows_per_block;
  int64_t chunk_residual_blocks; // the last chunk may have fewer
  int64_t residual_blocks; // of all chunks

  int width; // weight_gradient_kernel: threads along D, a power of two
  int64_t column_tiles;
  int64_t rows_per_split;
  int64_t chunk_splits; // the last chunk may have fewer
  int64_t splits; // of all chunks
};

Plan make_plan(const FewOutputsCall& call) {
  Plan plan{};
  const int size = static_cast<int>(size_of(call.dtype));
  const int pack = kPackBytes / size;
  plan.tile = power_of_two_from(call.out_features, kMaxFewOutputs);
  plan.packed = call.in_features % pack == 0 && call.input.column_stride == 1 && call.input.row_stride % pack == 0 &&
      is_aligned(call.input.data, kPackBytes) && is_aligned(call.linear_weight, kPackBytes) &&
      is_aligned(call.grad_input, kPackBytes);
  // A column-major X: neighbouring threads then take neighbouring rows.
  const bool transposed = call.input.row_stride == 1 && call.input.column_stride != 1 && call.rows >= kThreads;
  const int64_t features = std::max<int64_t>(1, call.in_features);
  const int64_t chunk_rows = std::clamp<int64_t>(kChunkBytes / (features * size), 1, call.rows);

  const int min_lanes = std::max(1, rows_per_group(plan.tile) * plan.tile / kTileValues);
  plan.lanes = transposed ? min_lanes : 32;
  const int64_t rows_per_pass = int64_t{kThreads / plan.lanes} * rows_per_group(plan.tile);
  const int64_t most_passes = std::max<int64_t>(1, kElementsPerBlock / rows_per_pass / features);
  const int64_t passes = std::clamp<int64_t>(divide_up(chunk_rows, rows_per_pass * kTargetBlocks), 1, most_passes);
  plan.rows_per_block = passes * rows_per_pass;

  const int columns = columns_per_thread(plan.tile, size);
  plan.width = transposed ? 1 : power_of_two_from(divide_up(call.in_features, columns), 32);
  const int64_t height = kThreads / plan.width;
  plan.column_tiles = divide_up(call.in_features, plan.width * columns);
  // Enough rows that a split's sums, O values a column, stay small beside the rows they were made from.
  const int64_t least = std::max<int64_t>(height * kMinRowsPerThread, 16 * plan.tile);
  const int64_t wanted = divide_up(chunk_rows * plan.column_tiles, kTargetBlocks);
  plan.rows_per_split = std::clamp(wanted, least, std::max(least, height * kMaxRowsPerThread));

  plan.chunk_rows = std::min(call.rows, divide_up(chunk_rows, plan.rows_per_block) * plan.rows_per_block);
  plan.chunks = divide_up(call.rows, plan.chunk_rows);
  plan.chunk_residual_blocks = divide_up(plan.chunk_rows, plan.rows_per_block);
  plan.chunk_splits = divide_up(plan.chunk_rows, plan.rows_per_split);
  const int64_t last_rows = call.rows - (plan.chunks - 1) * plan.chunk_rows;
  plan.residual_blocks = (plan.chunks - 1) * plan.chunk_residual_blocks + divide_up(last_rows, plan.rows_per_block);
  plan.splits = (plan.chunks - 1) * plan.chunk_splits + divide_up(last_rows, plan.rows_per_split);
  return plan;
}

// A chunk of rows, and where its kernels leave their sums.
struct Chunk {
  int64_t begin;
  int64_t end;
  double* sums; // [1 + O][plan.residual_blocks], from the chunk's first block on
  void* weight_sums; // [splits][O][D], from the chunk's first split on
  void* g; // [rows][O'] accumulator type; zero in the columns beyond O
};

// Adds x W' of kRows rows of X to `dots`, over the columns of this lane: packs lane, lane + lanes, ... of the row.
template <int kPack, typename T, int kRows, int kTile>
__device__ void add_products(
    const FewOutputsCall& call,
    const int64_t (&rows)[kRows],
    int lane,
    int lanes,
    Accumulator<T> (&dots)[kRows][kTile]) {
  const T* __restrict__ input = static_cast<const T*>(call.input.data);
  const T* __restrict__ linear_weight = static_cast<const T*>(call.linear_weight);
  for (int64_t d = int64_t{lane} * kPack; d < call.in_features; d += int64_t{lanes} * kPack) {
    Accumulator<T> x[kRows][kPack];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      load_pack(input + rows[i] * call.input.row_stride + d * call.input.column_stride, x[i]);
    }
#pragma unroll
    for (int o = 0; o < kTile; ++o) {
      if (o < call.out_features) {
        Accumulator<T> w[kPack];
        load_pack(linear_weight + o * call.in_features + d, w);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int v = 0; v < kPack; ++v) {
            dots[i][o] += x[i][v] * w[v];
          }
        }
      }
    }
  }
}

// Stores dX = input_gradient_factor * g W of kRows rows, those below `end`, in the columns of this lane.
template <int kPack, typename T, int kRows, int kTile>
__device__ void store_input_gradient(
    const FewOutputsCall& call,
    const int64_t (&rows)[kRows],
    int64_t end,
    int lane,
    int lanes,
    const Accumulator<T> (&g)[kRows][kTile]) {
  const T* __restrict__ linear_weight = static_cast<const T*>(call.linear_weight);
  T* __restrict__ grad_input = static_cast<T*>(call.grad_input);
  const auto factor = static_cast<Accumulator<T>>(call.input_gradient_factor);
  for (int64_t d = int64_t{lane} * kPack; d < call.in_features; d += int64_t{lanes} * kPack) {
    Accumulator<T> gradient[kRows][kPack] = {};
#pragma unroll
    for (int o = 0; o < kTile; ++o) {
      if (o < call.out_features) {
        Accumulator<T> w[kPack];
        load_pack(linear_weight + o * call.in_features + d, w);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int v = 0; v < kPack; ++v) {
            gradient[i][v] += g[i][o] * w[v];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (rows[i] < end) {
#pragma unroll
        for (int v = 0; v < kPack; ++v) {
          gradient[i][v] *= factor;
        }
        store_pack(grad_input + rows[i] * call.in_features + d, gradient[i]);
      }
    }
  }
}

// Predictions, g, and what follows from g alone.
//
//   p[n, o] = sum_d X[n, d] W[o, d] + b[o]     r = p - t     g = residual_factor / S * v * r
//   dT = target_gradient_factor * g            dX[n, d] = input_gradient_factor * sum_o g[n, o] W[o, d]
//
// Shapes: X (N, D), t and v (N, O) of any strides; W (O, D), dX (N, D), dT (N, O) contiguous; g (N, O') contiguous.
// Work: a block owns rows_per_block rows and passes over them, kThreads / lanes * kRows rows at a time. In a pass a group
//   of `lanes` neighbouring threads owns kRows rows, first to compute p and at the end to store dX; in between, where p and
//   g lie in shared memory, thread t owns output t % O' of the rows t / O', t / O' + kThreads / O', ...
// Memory: reads X and t, and v if given; writes g, dT and dX if asked for; W comes from the caches. Operations: 2 N D O,
//   and as many for dX.
// Sums: p in the accumulator type, along the lane's columns in rising order, then a butterfly over the lanes (the same sum
//   in each); sum(v r^2) and the sums of g in double, per thread over the block's rows in rising order, then block_sum. One
//   partial sum per block. Fixed order.
template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads)
    residual_kernel(const FewOutputsCall call, const Plan plan, const Chunk chunk) {
  using Acc = Accumulator<T>;
  constexpr int kRows = rows_per_group(kTile);
  constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
  __shared__ Acc tile[kThreads * kTileValues]; // [rows of the pass][O']: p without bias, then g
  __shared__ double scratch[kThreads];

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % plan.lanes;
  const int group = thread / plan.lanes;
  const int groups = kThreads / plan.lanes;
  const int rows_per_pass = groups * kRows;
  const int output = thread % kTile;
  const auto scale = static_cast<Acc>(call.residual_factor / (call.weight_sum == nullptr ? 1.0 : *call.weight_sum));
  const auto target_scale = static_cast<Acc>(call.target_gradient_factor);
  const Acc bias = call.linear_bias == nullptr || output >= call.out_features
      ? Acc(0)
      : widen(static_cast<const T*>(call.linear_bias)[output]);
  Acc* g_out = static_cast<Acc*>(chunk.g);

  double loss = 0;
  double g_sum = 0;
  const int64_t begin = chunk.begin + blockIdx.x * plan.rows_per_block;
  const int64_t end = min(begin + plan.rows_per_block, chunk.end);
  for (int64_t first = begin; first < end; first += rows_per_pass) {
    int64_t rows[kRows];
    {
      // Rows past the end are computed as the last one and then dropped.
      int64_t present[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rows[i] = first + i * groups + group;
        present[i] = min(rows[i], call.rows - 1);
      }
      Acc dots[kRows][kTile] = {};
      if (plan.packed) {
        add_products<kPack, T>(call, present, lane, plan.lanes, dots);
      } else {
        add_products<1, T>(call, present, lane, plan.lanes, dots);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int o = 0; o < kTile; ++o) {
          for (int offset = plan.lanes / 2; offset > 0; offset /= 2) {
            dots[i][o] += __shfl_xor_sync(0xffffffffu, dots[i][o], offset);
          }
          if (((i * kTile + o) & (plan.lanes - 1)) == lane) { // each lane stores its share
            tile[(i * groups + group) * kTile + o] = dots[i][o];
          }
        }
      }
    }
    __syncthreads();

    for (int i = thread; i < rows_per_pass * kTile; i += kThreads) { // kThreads is a multiple of O': `output` stays
      const int64_t row = first + i / kTile;
      Acc g = 0;
      if (row < end && output < call.out_features) {
        const Acc r = tile[i] + bias - target_element<T>(call, call.target, row, output);
        const Acc v = call.weight.data == nullptr ? Acc(1) : target_element<T>(call, call.weight, row, output);
        g = scale * v * r;
        loss += static_cast<double>(v) * r * r;
        g_sum += g;
        if (call.grad_target != nullptr) {
          store_target_gradient<T>(call, row, output, target_scale * g);
        }
      }
      tile[i] = g;
      if (g_out != nullptr && row < end) {
        g_out[(first - chunk.begin) * kTile + i] = g;
      }
    }

    if (call.grad_input != nullptr) {
      __syncthreads();
      Acc g[kRows][kTile];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int o = 0; o < kTile; ++o) {
          g[i][o] = tile[(i * groups + group) * kTile + o];
        }
      }
      if (plan.packed) {
        store_input_gradient<kPack, T>(call, rows, end, lane, plan.lanes, g);
      } else {
        store_input_gradient<1, T>(call, rows, end, lane, plan.lanes, g);
      }
    }
    __syncthreads(); // the next pass writes `tile`
  }

  double* sums = chunk.sums + blockIdx.x;
  loss = block_sum(loss, 1, kThreads, scratch);
  if (thread == 0) {
    sums[0] = loss;
  }
  if (call.grad_linear_bias != nullptr) {
    g_sum = block_sum(g_sum, kTile, kThreads, scratch);
    if (thread < call.out_features) {
      sums[(1 + thread) * plan.residual_blocks] = g_sum;
    }
  }
}

// Partial sums of linear_weight's gradient.
//
//   weight_sums[split, o, d] = sum of g[n, o] X[n, d] over the split's rows
//
// Shapes: g (N, O') contiguous; X (N, D) of any strides; weight_sums (splits, O, D) contiguous.
// Work: a block owns width * kColumns columns and rows_per_split rows. Thread (x, y) of width x height owns kColumns of the
//   columns (neighbours if `packed`, else `width` apart) and the rows y, y + height, ...; it keeps O' sums a column in
//   registers.
// Memory: reads X once and g once per column tile (from the second on most likely from L2); writes O D sums a split.
//   Operations: 2 N D O.
// Sums: in the accumulator type over at most kMaxRowsPerThread rows of a thread, in rising order (more only where N times
//   the column tiles exceeds 2^31 blocks), then a tree over y in double, then rounded to the accumulator type. Fixed order.
template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(const FewOutputsCall call, const Plan plan, const Chunk chunk) {
  using Acc = Accumulator<T>;
  constexpr int kColumns = columns_per_thread(kTile, sizeof(T));
  constexpr int kPack = smaller(kTile, kPackBytes / static_cast<int>(sizeof(Acc)));
  constexpr int kUnroll = kTile * kColumns >= 32 ? 2 : 4; // rows in flight
  __shared__ double scratch[kThreads * kColumns]; // [height][columns of the block]

  const int thread = static_cast<int>(threadIdx.x);
  const int x = thread % plan.width;
  const int y = thread / plan.width;
  const int height = kThreads / plan.width;
  const int columns = plan.width * kColumns;
  const int64_t split = blockIdx.x / plan.column_tiles;
  const int64_t first_column = blockIdx.x % plan.column_tiles * columns;
  const int64_t begin = chunk.begin + split * plan.rows_per_split;
  const int64_t end = min(begin + plan.rows_per_split, chunk.end);
  // The thread's column v, counted from first_column.
  const auto column = [&](int v) { return plan.packed ? x * kColumns + v : v * plan.width + x; };

  Acc sums[kTile][kColumns] = {};
  const T* __restrict__ input = static_cast<const T*>(call.input.data) + first_column * call.input.column_stride;
  const Acc* __restrict__ g_in = static_cast<const Acc*>(chunk.g);
  if (first_column + column(0) < call.in_features) {
#pragma unroll kUnroll
    for (int64_t row = begin + y; row < end; row += height) {
      Acc values[kColumns];
      if (plan.packed) {
        load_pack(input + row * call.input.row_stride + x * kColumns, values);
      } else {
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          values[v] = first_column + column(v) < call.in_features
              ? widen(input[row * call.input.row_stride + column(v) * call.input.column_stride])
              : Acc(0);
        }
      }
#pragma unroll
      for (int o = 0; o < kTile; o += kPack) {
        Acc g[kPack];
        load_pack(g_in + (row - chunk.begin) * kTile + o, g);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
#pragma unroll
          for (int v = 0; v < kColumns; ++v) {
            sums[o + k][v] += g[k] * values[v];
          }
        }
      }
    }
  }

  auto* weight_sums = static_cast<Acc*>(chunk.weight_sums);
#pragma unroll
  for (int o = 0; o < kTile; ++o) {
    if (o < call.out_features) { // the same for the whole block
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        scratch[y * columns + column(v)] = sums[o][v];
      }
      for (int half = height / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int i = thread; i < half * columns; i += kThreads) {
          scratch[i] += scratch[i + half * columns];
        }
      }
      __syncthreads();
      for (int i = thread; i < columns; i += kThreads) {
        if (first_column + i < call.in_features) {
          weight_sums[(split * call.out_features + o) * call.in_features + first_column + i] =
              static_cast<Acc>(scratch[i]);
        }
      }
      __syncthreads(); // the next output writes `scratch`
    }
  }
}

template <typename T, int kTile>
cudaError_t run(const FewOutputsCall& call, const Plan& plan, const FirstStage& stage, cudaStream_t stream) {
  const int64_t split_values = call.out_features * call.in_features;
  for (int64_t i = 0; i < plan.chunks; ++i) {
    Chunk chunk{};
    chunk.begin = i * plan.chunk_rows;
    chunk.end = std::min(chunk.begin + plan.chunk_rows, call.rows);
    chunk.sums = stage.sums + i * plan.chunk_residual_blocks;
    chunk.g = stage.weight_sums == nullptr ? nullptr : stage.scratch;
    const int64_t rows = chunk.end - chunk.begin;
    const int64_t blocks = divide_up(rows, plan.rows_per_block);
    auto error = launch(residual_kernel<T, kTile>, blocks, kThreads, 0, stream, call, plan, chunk);
    if (error == cudaSuccess && stage.weight_sums != nullptr) {
      chunk.weight_sums = static_cast<Accumulator<T>*>(stage.weight_sums) + i * plan.chunk_splits * split_values;
      const int64_t tiles = plan.column_tiles * divide_up(rows, plan.rows_per_split);
      error = launch(weight_gradient_kernel<T, kTile>, tiles, kThreads, 0, stream, call, plan, chunk);
    }
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t run(const FewOutputsCall& call, const FirstStage& stage, cudaStream_t stream) {
  const auto plan = make_plan(call);
  switch (plan.tile) {
    case 1:
      return run<T, 1>(call, plan, stage, stream);
    case 2:
      return run<T, 2>(call, plan, stage, stream);
    case 4:
      return run<T, 4>(call, plan, stage, stream);
    case 8:
      return run<T, 8>(call, plan, stage, stream);
    default:
      return run<T, 16>(call, plan, stage, stream);
  }
}

} // namespace

Shares long_rows_shares(const FewOutputsCall& call) {
  const auto plan = make_plan(call);
  const size_t accumulator = call.dtype == Dtype::Float64 ? sizeof(double) : sizeof(float);
  return {plan.residual_blocks, plan.splits, static_cast<size_t>(plan.chunk_rows * plan.tile) * accumulator};
}

cudaError_t long_rows_stage(const FewOutputsCall& call, const Shares&, const FirstStage& stage, cudaStream_t stream) {
  switch (call.dtype) {
    case Dtype::Float64:
      return run<double>(call, stage, stream);
    case Dtype::Float32:
      return run<float>(call, stage, stream);
    case Dtype::BFloat16:
      return run<__nv_bfloat16>(call, stage, stream);
    case Dtype::Float16:
      return run<__half>(call, stage, stream);
  }
  return cudaErrorInvalidValue;
}

} // namespace torchintro::cuda
