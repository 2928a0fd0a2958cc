// The training loop for few outputs and little data: a block trains a model from the first batch of the call to the last.
//
//   p[n, o] = sum_d X[n, d] W[o, d] + b[o]     r = p - y     loss = sum(r^2) / (n O)
//   dW = 2 / (n O) r' X,  db = 2 / (n O) sum(r), then the update of fit/rule.h
//
// Work: a group of L neighbouring lanes, L a power of two up to 32, owns a row; a thread owns the columns lane, lane + L, ...
//   of every row that its group meets, up to kColumns of them: its part of W and its sums of r' X are in registers. The
//   parameters lie in shared memory beside the optimizer's rows; thread t owns every `threads`-th of them from t on, of
//   those that are trained.
// A step: every warp leaves its sums in shared memory; barrier; every thread adds up the loss (all in the same order, so that
//   all decide alike) and the owners the gradients, and update; barrier. Nothing else waits.
// Latency of a step, estimated for sm_90, 100 x 1 -> 1 in float32: one warp, 4 rows a lane. Loads from the first-level cache
//   40 cycles, residuals and sums 100, 5 exchanges of three sums in double 230, shared memory and barriers 100, update 60 to
//   100: about 550 cycles, a third of a microsecond. Eager PyTorch launches some 15 kernels a step, 100 microseconds.
// Bytes: X and y are read once a step by every model's block, from the first or second-level cache (s (D + O) a row, and 8
//   for its number if the rows are shuffled). Operations: 4 D O a row.
// Sums: over a thread's rows in the parameters' dtype (the loss in double), across threads in double; in a fixed order that
//   depends on the call's sizes alone. No atomics.
#include "cuda/kernels/fit.h"

#include "cuda/kernels/arithmetic.h"
#include "cuda/kernels/device.cuh"
#include "fit/rule.h"

#include <algorithm>
#include <limits>

namespace torchintro::cuda {
namespace {

// Not yet measured on a GPU: every constant in this block is reasoned, and to be chosen again by measurement.
constexpr int kMaxThreads = 256; // so that a thread may have 255 registers
constexpr int kRowsPerThread = 4; // before a block gets more warps: their loads are under way together
constexpr int kMostSums = 16; // columns x outputs of a thread
constexpr int kFewColumns = 4; // of a thread, as long as kFewLanes lanes suffice for a row
constexpr int kFewLanes = 8;
constexpr int kAhead = 32; // updates whose factors are worked out together, a lane each

// What a step may read: a block reads perhaps 50 GB/s from the second-level cache, all of them together some TB/s, and one
// kernel for every operation takes some 100 microseconds.
constexpr int64_t kMostBatchBytes = int64_t{1} << 20;
constexpr int64_t kMostStepBytes = int64_t{1} << 28; // of all models
constexpr int64_t kMostDataBytes = int64_t{1} << 24; // so that X stays in the second-level cache

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffff;

int outputs_up(const FitRowsCall& call) {
  return power_of_two_from(call.out_features, kMaxFitOutputs);
}

// A thread's columns.
int columns(const FitRowsCall& call) {
  const int most = kMostSums / outputs_up(call);
  const int few = std::min(kFewColumns, most);
  return call.in_features == 1 ? 1 : call.in_features <= few * kFewLanes ? few : most;
}

struct Plan {
  int lanes; // of a row
  int threads;
  size_t shared_bytes;
};

// All that a block has in shared memory. P = O D + O.
template <typename T>
struct Shared {
  double* losses; // [warps]
  double* validation_losses; // [warps]
  double* gradients; // [warps][P]
  T* parameters; // [P], weights, then biases; the following alike
  T* last_finite; // [P]
  T* memory; // [3][P]
  T* steps; // [kAhead], as the following: of each update ahead, Update's fields of these names
  T* shrinks;
  T* second_roots;

  static constexpr size_t bytes(int64_t warps, int64_t parameters) {
    return static_cast<size_t>(warps * (2 + parameters)) * sizeof(double) +
        static_cast<size_t>(5 * parameters + 3 * kAhead) * sizeof(T);
  }
  __device__ Shared(double* begin, int warps, int count) {
    losses = begin;
    validation_losses = losses + warps;
    gradients = validation_losses + warps;
    parameters = reinterpret_cast<T*>(gradients + warps * count);
    last_finite = parameters + count;
    memory = last_finite + count;
    steps = memory + 3 * count;
    shrinks = steps + kAhead;
    second_roots = shrinks + kAhead;
  }
};

// A thread's part of the parameters and of their gradients, without the factor 2 / (n O).
template <typename T, int kColumns, int kOutputs>
struct Weights {
  T w[kOutputs][kColumns];
  T b[kOutputs];

  // Zeros beyond D and O, so that what lies there adds nothing.
  __device__ void load(const T* parameters, int in_features, int out_features, int lanes, int lane) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = c * lanes + lane;
        w[o][c] = o < out_features && column < in_features ? parameters[o * in_features + column] : T(0);
      }
      b[o] = o < out_features ? parameters[out_features * in_features + o] : T(0);
    }
  }
};

template <typename T, int kColumns, int kOutputs>
struct Sums {
  double loss = 0;
  T w[kOutputs][kColumns] = {};
  T b[kOutputs] = {};
};

// Over the lanes of a warp that own the same columns; every one of them returns the sum.
__device__ inline double sum_over_groups(double value, int lanes) {
  for (int half = kWarpLanes / 2; half >= lanes; half /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, half);
  }
  return value;
}

// Adds the rows begin .. end in `order` (null: as they lie) to the thread's sums; all lanes of the warp must call.
template <bool kGradients, typename T, int kColumns, int kOutputs>
__device__ inline void add_rows(
    const Matrix& input,
    const Matrix& target,
    const int64_t* __restrict__ order,
    int64_t begin,
    int64_t end,
    int in_features,
    int out_features,
    int lanes,
    const Weights<T, kColumns, kOutputs>& weights,
    Sums<T, kColumns, kOutputs>& sums) {
  // Rows whose loads are under way together.
  constexpr int kRows = kColumns * kOutputs >= kMostSums ? 1
      : kColumns * kOutputs >= kMostSums / 2             ? 2
                                                         : kRowsPerThread;
  const T* __restrict__ x_data = static_cast<const T*>(input.data);
  const T* __restrict__ y_data = static_cast<const T*>(target.data);
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  for (int64_t first = begin; first < end; first += groups * kRows) { // the same for the whole block
    T x[kRows][kColumns];
    T p[kRows][kOutputs];
    T y[kRows][kOutputs];
    bool present[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t position = first + u * groups + group;
      present[u] = position < end;
      const int64_t row = !present[u] ? 0 : order == nullptr ? position : order[position];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = c * lanes + lane;
        x[u][c] =
            present[u] && column < in_features ? x_data[row * input.row_stride + column * input.column_stride] : T(0);
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        y[u][o] = present[u] && o < out_features ? y_data[row * target.row_stride + o * target.column_stride] : T(0);
      }
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        p[u][o] = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          p[u][o] += x[u][c] * weights.w[o][c];
        }
      }
    }
    for (int half = lanes / 2; half > 0; half /= 2) {
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          p[u][o] += __shfl_xor_sync(kAllLanes, p[u][o], half);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const T r = present[u] ? p[u][o] + weights.b[o] - y[u][o] : T(0);
        sums.loss += static_cast<double>(r) * r;
        if constexpr (kGradients) {
          sums.b[o] += r;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            sums.w[o][c] += r * x[u][c];
          }
        }
      }
    }
  }
}

template <typename T>
__device__ inline T updated(const fit::Update<T>& u, T p, T g, T* memory, int stride) {
  switch (u.kind) { // the same for the whole block
    case fit::UpdateRule::Sgd:
      return fit::updated<fit::UpdateRule::Sgd>(u, p, g, memory, stride);
    case fit::UpdateRule::Momentum:
      return fit::updated<fit::UpdateRule::Momentum>(u, p, g, memory, stride);
    case fit::UpdateRule::Nesterov:
      return fit::updated<fit::UpdateRule::Nesterov>(u, p, g, memory, stride);
    case fit::UpdateRule::Adam:
      return fit::updated<fit::UpdateRule::Adam>(u, p, g, memory, stride);
    case fit::UpdateRule::AdamAmsgrad:
      return fit::updated<fit::UpdateRule::AdamAmsgrad>(u, p, g, memory, stride);
  }
  return p;
}

__device__ inline int memory_rows(fit::UpdateRule kind) {
  return kind == fit::UpdateRule::Sgd        ? 0
      : kind == fit::UpdateRule::Adam        ? 2
      : kind == fit::UpdateRule::AdamAmsgrad ? 3
                                             : 1;
}

// A model's loss from the sums of the block's warps.
struct Loss {
  double value; // infinite or NaN where it is that in T
  bool finite;
};

template <typename T>
__device__ inline Loss loss_of(const double* sums, int warps, int64_t rows, int out_features) {
  double total = 0;
  for (int warp = 0; warp < warps; ++warp) {
    total += sums[warp];
  }
  const double loss = total / (static_cast<double>(rows) * out_features);
  const T rounded = static_cast<T>(loss);
  const bool finite = rounded - rounded == T(0);
  return {finite ? loss : static_cast<double>(rounded), finite};
}

// NaN for a model's epochs from `first` on.
__device__ inline void fill_losses(const FitRowsCall& call, double* losses, int64_t model, int64_t first) {
  for (int64_t e = first + threadIdx.x; e < call.epochs; e += blockDim.x) {
    losses[e * call.models + model] = std::numeric_limits<double>::quiet_NaN();
  }
}

// Block k trains model k, as the head of this file says.
template <typename T, int kColumns, int kOutputs>
__global__ void __launch_bounds__(kMaxThreads, 1) fit_rows_kernel(const FitRowsCall call, const int lanes) {
  const int64_t model = blockIdx.x;
  if (call.stopped[model] >= 0) { // the same for the whole block
    fill_losses(call, call.losses, model, 0);
    if (call.validation_rows > 0) {
      fill_losses(call, call.validation_losses, model, 0);
    }
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarpLanes;
  const int warps = threads / kWarpLanes;
  const int lane = thread % lanes;
  const int d = static_cast<int>(call.in_features);
  const int o_count = call.out_features;
  const int weight_count = o_count * d;
  const int state_count = weight_count + o_count;
  const bool first_group = thread % kWarpLanes < lanes;
  const Shared<T> shared(dynamic_shared<double>(), warps, state_count);

  T* const weight = static_cast<T*>(call.linear_weight) + model * weight_count;
  T* const bias = call.linear_bias == nullptr ? nullptr : static_cast<T*>(call.linear_bias) + model * o_count;
  const int first_trained = call.train_weight ? 0 : weight_count;
  const int end_trained = call.train_bias ? state_count : weight_count; // no more than first_trained where none are
  T* const state = static_cast<T*>(call.state) + model * state_count;
  const int64_t state_stride = call.models * state_count;
  const double* const options = call.options + model * kFitOptions;
  auto u = fit::make_update<T>(call.adam, call.decoupled, options, 0, false, 0, 0);
  const int remembered = memory_rows(u.kind);

  for (int i = thread; i < state_count; i += threads) {
    const T p = i < weight_count ? weight[i] : bias != nullptr ? bias[i - weight_count] : T(0);
    shared.parameters[i] = p;
    // Before any loss is known, a model falls back to where it began.
    shared.last_finite[i] = call.step == 0 ? p : state[i];
    for (int row = 0; row < remembered; ++row) {
      shared.memory[row * state_count + i] = state[(1 + row) * state_stride + i];
    }
  }
  __syncthreads();

  const int64_t batches = divide_up(call.rows, call.batch_rows);
  const int64_t updates = call.epochs * batches;
  int64_t index = 0; // of the update, in this call
  int64_t begun = 0; // epochs
  int64_t validated = 0;
  bool finite = true;
  Weights<T, kColumns, kOutputs> weights;
  for (int64_t e = 0; e < call.epochs && finite; ++e) {
    ++begun;
    const int64_t* const order = call.order == nullptr ? nullptr : call.order + e * call.rows;
    double epoch_sum = 0;
    for (int64_t begin = 0; begin < call.rows && finite; begin += call.batch_rows, ++index) {
      const int ahead = static_cast<int>(index % kAhead);
      if (ahead == 0 && thread < kAhead && index + thread < updates) {
        // What these hold was last read before the last barrier.
        const int64_t then = index + thread;
        const auto power = static_cast<double>(call.step + then + 1);
        const auto at = fit::make_update<T>(
            call.adam,
            call.decoupled,
            options,
            call.lr[then / batches * call.models + model],
            false,
            call.adam ? pow(options[0], power) : 0.0,
            call.adam ? pow(options[1], power) : 0.0);
        shared.steps[thread] = at.step;
        shared.shrinks[thread] = at.shrink;
        shared.second_roots[thread] = at.second_root;
      }
      const int64_t end = min(begin + call.batch_rows, call.rows);
      weights.load(shared.parameters, d, o_count, lanes, lane);
      Sums<T, kColumns, kOutputs> sums;
      add_rows<true>(call.input, call.target, order, begin, end, d, o_count, lanes, weights, sums);

      const double loss_sum = sum_over_groups(sums.loss, lanes);
      if (thread % kWarpLanes == 0) {
        shared.losses[warp] = loss_sum;
      }
      double* const gradients = shared.gradients + warp * state_count;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const double b = sum_over_groups(sums.b[o], lanes);
        if (thread % kWarpLanes == 0 && o < o_count) {
          gradients[weight_count + o] = b;
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const double w = sum_over_groups(sums.w[o][c], lanes);
          const int column = c * lanes + lane;
          if (first_group && o < o_count && column < d) {
            gradients[o * d + column] = w;
          }
        }
      }
      __syncthreads();

      const auto loss = loss_of<T>(shared.losses, warps, end - begin, o_count);
      epoch_sum += loss.value * static_cast<double>(end - begin);
      finite = loss.finite;
      if (finite) {
        u.step = shared.steps[ahead];
        u.shrink = shared.shrinks[ahead];
        u.second_root = shared.second_roots[ahead];
        u.first = call.step + index == 0;
        const double factor = 2.0 / (static_cast<double>(end - begin) * o_count);
        for (int i = first_trained + thread; i < end_trained; i += threads) {
          const T p = shared.parameters[i];
          shared.last_finite[i] = p;
          double total = 0;
          for (int w = 0; w < warps; ++w) {
            total += shared.gradients[w * state_count + i];
          }
          shared.parameters[i] = updated(u, p, static_cast<T>(total * factor), shared.memory + i, state_count);
        }
      }
      __syncthreads();
    }
    if (thread == 0) {
      call.losses[e * call.models + model] = epoch_sum / static_cast<double>(call.rows);
    }
    if (finite && call.validation_rows > 0) {
      weights.load(shared.parameters, d, o_count, lanes, lane);
      Sums<T, kColumns, kOutputs> sums;
      add_rows<false>(
          call.validation_input,
          call.validation_target,
          nullptr,
          0,
          call.validation_rows,
          d,
          o_count,
          lanes,
          weights,
          sums);
      const double loss_sum = sum_over_groups(sums.loss, lanes);
      if (thread % kWarpLanes == 0) {
        shared.validation_losses[warp] = loss_sum; // read before the last step's barriers
      }
      __syncthreads();
      const auto loss = loss_of<T>(shared.validation_losses, warps, call.validation_rows, o_count);
      finite = loss.finite;
      ++validated;
      if (thread == 0) {
        call.validation_losses[e * call.models + model] = loss.value;
      }
    }
    if (!finite && thread == 0) {
      call.stopped[model] = call.epoch + e;
    }
  }

  fill_losses(call, call.losses, model, begun);
  if (call.validation_rows > 0) {
    fill_losses(call, call.validation_losses, model, validated);
  }
  // Each thread what it owns, which no other thread has written.
  for (int i = first_trained + thread; i < end_trained; i += threads) {
    const T p = finite ? shared.parameters[i] : shared.last_finite[i];
    (i < weight_count ? weight[i] : bias[i - weight_count]) = p;
    state[i] = shared.last_finite[i];
    for (int row = 0; row < remembered; ++row) {
      state[(1 + row) * state_stride + i] = shared.memory[row * state_count + i];
    }
  }
}

Plan make_plan(const FitRowsCall& call) {
  Plan plan{};
  plan.lanes = power_of_two_from(divide_up(call.in_features, columns(call)), kWarpLanes);
  const int64_t wanted = divide_up(call.batch_rows * plan.lanes, kRowsPerThread);
  plan.threads = std::max(kWarpLanes, power_of_two_from(wanted, kMaxThreads));
  const int64_t parameters = call.out_features * (call.in_features + 1);
  const auto warps = plan.threads / kWarpLanes;
  plan.shared_bytes =
      call.dtype == Dtype::Float64 ? Shared<double>::bytes(warps, parameters) : Shared<float>::bytes(warps, parameters);
  return plan;
}

template <typename T, int kOutputs>
cudaError_t launch(const FitRowsCall& call, cudaStream_t stream) {
  constexpr int kMost = kMostSums / kOutputs;
  constexpr int kFew = std::min(kFewColumns, kMost);
  const auto plan = make_plan(call);
  const int own = columns(call);
  const auto kernel = own == 1 ? fit_rows_kernel<T, 1, kOutputs>
      : own == kFew            ? fit_rows_kernel<T, kFew, kOutputs>
                               : fit_rows_kernel<T, kMost, kOutputs>;
  return launch(kernel, call.models, plan.threads, plan.shared_bytes, stream, call, plan.lanes);
}

template <typename T>
cudaError_t launch(const FitRowsCall& call, cudaStream_t stream) {
  switch (outputs_up(call)) {
    case 1:
      return launch<T, 1>(call, stream);
    case 2:
      return launch<T, 2>(call, stream);
    case 4:
      return launch<T, 4>(call, stream);
    default:
      return launch<T, 8>(call, stream);
  }
}

} // namespace

bool fit_rows_takes(const FitRowsCall& call) {
  if (call.out_features > kMaxFitOutputs || call.in_features > kWarpLanes * (kMostSums / outputs_up(call))) {
    return false;
  }
  const int64_t row_bytes = (call.in_features + call.out_features) * static_cast<int64_t>(size_of(call.dtype));
  return call.batch_rows <= kMostBatchBytes / row_bytes && call.rows <= kMostDataBytes / row_bytes &&
      call.validation_rows <= kMostBatchBytes / row_bytes &&
      call.models <= kMostStepBytes / (row_bytes * call.batch_rows);
}

cudaError_t fit_rows(const FitRowsCall& call, cudaStream_t stream) {
  switch (call.dtype) {
    case Dtype::Float64:
      return launch<double>(call, stream);
    case Dtype::Float32:
      return launch<float>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

} // namespace torchintro::cuda
