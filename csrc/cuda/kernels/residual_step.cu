// The step between the matrix products of the regime of many outputs, over one chunk of rows: two kernels.
//
//   1  residual_step_kernel   r = p - t, g = residual_factor / S * v * r in place of p, dT; partial sums of loss and db
//   2  add_sums_kernel        adds the partial sums to the running sums of all chunks, in double
//
// Device memory in bytes, with s the size of the prediction's dtype and u of target's: reads R O (s + u), and v if given;
// writes R O s for g and R O u for dT where they are wanted. Some 6 operations an element.
#include "cuda/kernels/residual_step.h"

#include "cuda/kernels/arithmetic.h"
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/reduction.cuh"
#include "cuda/kernels/scalar.cuh"

#include <algorithm>

namespace torchintro::cuda {
namespace {

// Not yet measured on a GPU: every constant in this block is reasoned, and to be chosen again by measurement.
constexpr int kWidth = 32; // threads along the outputs: a warp reads neighbours of one row
constexpr int kHeight = 8; // threads along the rows
constexpr int kThreads = kWidth * kHeight;
constexpr int kPack = 4; // outputs per thread and row, where the layout allows it
constexpr int kTargetBlocks = 2048; // blocks before a block gets more rows: some waves on 100 to 200 multiprocessors
constexpr int kMinRowsPerThread = 4; // a block's partial sums stay small beside its elements
constexpr int kMaxRowsPerThread = 64; // as many terms a float accumulator of db takes in a row
constexpr int64_t kMaxGridBlocks = (int64_t{1} << 31) - 1; // CUDA's limit

// How a call is cut into blocks. It depends on the call alone, not on the GPU, and so do the results.
struct Plan {
  bool packed; // whether kPack neighbouring outputs are accessed at once
  int64_t column_tiles;
  int64_t rows_per_split;
  int64_t splits;

  // Byte offsets in the workspace, and its size.
  size_t loss_sums; // [splits * column_tiles] double
  size_t bias_sums; // [splits][O] double
  size_t bytes;
};

Plan make_plan(const ResidualStepCall& call) {
  Plan plan{};
  const auto aligned = [](const void* pointer, Dtype dtype) { return is_aligned(pointer, kPack * size_of(dtype)); };
  const bool no_target = call.target.data == nullptr;
  plan.packed = call.out_features % kPack == 0 && (no_target || call.target.column_stride == 1) &&
      (no_target || call.target.row_stride % kPack == 0) && aligned(call.prediction, call.dtype) &&
      aligned(call.target.data, call.target_dtype) && aligned(call.grad_target, call.target_dtype);
  plan.column_tiles = divide_up(call.out_features, kWidth * (plan.packed ? kPack : 1));
  const int64_t wanted = divide_up(call.rows * plan.column_tiles, kTargetBlocks);
  const int64_t clamped = std::clamp<int64_t>(wanted, kHeight * kMinRowsPerThread, kHeight * kMaxRowsPerThread);
  const int64_t most_splits = std::max<int64_t>(1, kMaxGridBlocks / plan.column_tiles);
  plan.rows_per_split = std::max(clamped, divide_up(call.rows, most_splits));
  plan.splits = divide_up(call.rows, plan.rows_per_split);

  const auto reserve = [&plan](int64_t values) {
    const size_t offset = plan.bytes;
    plan.bytes += (static_cast<size_t>(values) * sizeof(double) + 255) / 256 * 256;
    return offset;
  };
  plan.loss_sums = reserve(plan.splits * plan.column_tiles);
  if (call.bias_sum != nullptr) {
    plan.bias_sums = reserve(plan.splits * call.out_features);
  }
  return plan;
}

// A chunk of predictions to a chunk of g, and what follows from it.
//
//   r = p - t, or p where there is no t     g = residual_factor / S * v * r     dT = target_gradient_factor * g
//
// Shapes: p, and g in its place, and dT (R, O) contiguous; t and v (R, O) of any strides. T is p's dtype, U is t's.
// Work: a block owns kWidth * kCount outputs of rows_per_split rows. Thread (x, y) of kWidth x kHeight owns the kCount
//   neighbouring outputs x * kCount, ... of the rows y, y + kHeight, ...
// Memory: reads p, t and v once, writes g and dT once, where wanted. Some 6 operations an element.
// Sums: sum(v r^2) in double over the thread's elements, then block_sum; one a block. The sums of g in the accumulator type
//   over the thread's rows, at most kMaxRowsPerThread, then a tree over y in double; one a column and split. Fixed order.
template <typename T, typename U, int kCount>
__global__ void __launch_bounds__(kThreads)
    residual_step_kernel(const ResidualStepCall call, const Plan plan, char* workspace) {
  using Acc = Accumulator<T>;
  __shared__ double scratch[kThreads * kCount]; // [kHeight][columns of the block]
  constexpr int kColumns = kWidth * kCount;

  const int thread = static_cast<int>(threadIdx.x);
  const int x = thread % kWidth;
  const int y = thread / kWidth;
  const int64_t split = blockIdx.x / plan.column_tiles;
  const int64_t first_column = blockIdx.x % plan.column_tiles * kColumns;
  const int64_t column = first_column + x * kCount;
  const int64_t begin = split * plan.rows_per_split;
  const int64_t end = min(begin + plan.rows_per_split, call.rows);
  const auto scale = static_cast<Acc>(call.residual_factor / (call.weight_sum == nullptr ? 1.0 : *call.weight_sum));
  const auto target_scale = static_cast<Acc>(call.target_gradient_factor);

  T* prediction = static_cast<T*>(call.prediction);
  const U* __restrict__ target = static_cast<const U*>(call.target.data);
  const U* __restrict__ weight = static_cast<const U*>(call.weight.data);
  U* __restrict__ grad_target = static_cast<U*>(call.grad_target);

  double loss = 0;
  Acc bias_sums[kCount] = {};
  if (column < call.out_features) { // if packed, O is a multiple of kCount: all of the pack or nothing
#pragma unroll 2
    for (int64_t row = begin + y; row < end; row += kHeight) {
      const int64_t index = row * call.out_features + column;
      Acc p[kCount];
      Accumulator<U> t[kCount];
      load_pack(prediction + index, p);
      if (target == nullptr) { // the same for the whole grid
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          t[v] = 0;
        }
      } else {
        load_pack(target + row * call.target.row_stride + column * call.target.column_stride, t);
      }
      Acc g[kCount];
      Accumulator<U> dt[kCount];
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        const Acc r = p[v] - static_cast<Acc>(t[v]);
        const Acc factor = weight == nullptr
            ? Acc(1)
            : widen(weight[row * call.weight.row_stride + (column + v) * call.weight.column_stride]);
        loss += static_cast<double>(factor) * r * r;
        g[v] = scale * factor * r;
        dt[v] = target_scale * g[v];
        bias_sums[v] += g[v];
      }
      if (call.writes_g) {
        store_pack(prediction + index, g);
      }
      if (grad_target != nullptr) {
        store_pack(grad_target + index, dt);
      }
    }
  }

  loss = block_sum(loss, 1, kThreads, scratch);
  if (thread == 0) {
    reinterpret_cast<double*>(workspace + plan.loss_sums)[blockIdx.x] = loss;
  }
  if (call.bias_sum == nullptr) {
    return;
  }
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    scratch[y * kColumns + x * kCount + v] = bias_sums[v];
  }
  for (int half = kHeight / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = thread; i < half * kColumns; i += kThreads) {
      scratch[i] += scratch[i + half * kColumns];
    }
  }
  __syncthreads();
  auto* sums = reinterpret_cast<double*>(workspace + plan.bias_sums) + split * call.out_features + first_column;
  for (int i = thread; i < kColumns; i += kThreads) {
    if (first_column + i < call.out_features) {
      sums[i] = scratch[i];
    }
  }
}

// Adds a chunk's partial sums to the running sums: loss_sum += sum(v r^2), bias_sum += the sum of g over the rows.
//
// Work: the first block owns the loss, the others `width` outputs each. Memory: reads the partial sums once; reads and
//   writes 1 + O sums. Sums: see sum_of_partials; fixed order.
__global__ void __launch_bounds__(kSumThreads) add_sums_kernel(
    const Partials<double> loss_sums,
    const Partials<double> bias_sums,
    double* __restrict__ loss_sum,
    double* __restrict__ bias_sum) {
  __shared__ double scratch[kSumThreads];
  int64_t column = 0;
  double total = 0;
  if (blockIdx.x == 0) { // the same for the whole block
    if (sum_of_partials(loss_sums, 0, scratch, column, total)) {
      *loss_sum += total;
    }
  } else if (sum_of_partials(bias_sums, int64_t{blockIdx.x} - 1, scratch, column, total)) {
    bias_sum[column] += total;
  }
}

template <typename T, typename U>
cudaError_t launch(const ResidualStepCall& call, char* workspace, cudaStream_t stream) {
  const auto plan = make_plan(call);
  const int64_t blocks = plan.column_tiles * plan.splits;
  const auto kernel = plan.packed ? residual_step_kernel<T, U, kPack> : residual_step_kernel<T, U, 1>;
  if (const auto error = launch(kernel, blocks, kThreads, 0, stream, call, plan, workspace); error != cudaSuccess) {
    return error;
  }

  Partials<double> loss_sums;
  loss_sums.data = reinterpret_cast<const double*>(workspace + plan.loss_sums);
  loss_sums.count = blocks;
  loss_sums.columns = 1;
  loss_sums.partial_stride = 1;
  Partials<double> bias_sums;
  if (call.bias_sum != nullptr) {
    bias_sums.data = reinterpret_cast<const double*>(workspace + plan.bias_sums);
    bias_sums.count = plan.splits;
    bias_sums.columns = call.out_features;
    bias_sums.partial_stride = call.out_features;
    bias_sums.column_stride = 1;
    bias_sums.width = kMaxSumWidth;
  }
  return launch(
      add_sums_kernel,
      1 + sum_blocks(bias_sums),
      kSumThreads,
      0,
      stream,
      loss_sums,
      bias_sums,
      call.loss_sum,
      call.bias_sum);
}

} // namespace

size_t residual_step_workspace(const ResidualStepCall& call) {
  return make_plan(call).bytes;
}

cudaError_t residual_step(const ResidualStepCall& call, void* workspace, cudaStream_t stream) {
  auto* bytes = static_cast<char*>(workspace);
  const bool float_target = call.target_dtype == Dtype::Float32;
  switch (call.dtype) {
    case Dtype::Float64:
      return launch<double, double>(call, bytes, stream);
    case Dtype::Float32:
      return launch<float, float>(call, bytes, stream);
    case Dtype::BFloat16:
      return float_target ? launch<__nv_bfloat16, float>(call, bytes, stream)
                          : launch<__nv_bfloat16, __nv_bfloat16>(call, bytes, stream);
    case Dtype::Float16:
      return float_target ? launch<__half, float>(call, bytes, stream) : launch<__half, __half>(call, bytes, stream);
  }
  return cudaErrorInvalidValue;
}

} // namespace torchintro::cuda
