// Few outputs, rows that a block can hold: one kernel reads every row of X once and does all with it.
//
//   p[n, o] = sum_d X[n, d] W[o, d] + b[o]     r = p - t     g = residual_factor / S * v * r
//   dT = target_gradient_factor * g            dX[n, d] = input_gradient_factor * sum_o g[n, o] W[o, d]
//   partial sums of v r^2, of g, and of g' X
//
// Bytes of device memory, with s the size of input's dtype and u of target's: N D s to read X, N O u for t (as much again for
// v); N D s and N O u to write dX and dT, where wanted; 2 blocks a multiprocessor leave O D partial sums each. W comes from
// registers or the first-level cache. Operations: 2 N D O each for p, dW and dX.
#include "cuda/kernels/arithmetic.h"
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/first_stage.h"
#include "cuda/kernels/grid.h"
#include "cuda/kernels/reduction.cuh"

#include <algorithm>

namespace torchintro::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kOwn = 4; // the most values of g that a thread works out in a pass
constexpr int kSumRegisters = 32; // for a thread's sums of g' X, unless a single pack has more
constexpr int kWeightRegisters = 16; // for its share of W; where that is more, W is read anew from the cache

// How X, W and dX are accessed.
enum class Access {
  Wide, // in packs, several of each row in a thread
  Narrow, // in packs, one of each row in a thread: for rows that are too short for more
  Elements, // one by one: rows of any alignment and any strides
};

// How many elements of X a thread holds, and how. All of it follows from the dtype, from O' (out_features rounded up to a
// power of two) and from the access. Without packs in memory, a pack is as many elements.
template <typename Dtype, int kOutputsUp, Access kAccess>
struct Shape {
  using T = Dtype;
  using Acc = Accumulator<T>;
  static constexpr int kOutputs = kOutputsUp;
  // With 16-bit elements and many outputs a pack of 16 bytes would have more sums than there are registers.
  static constexpr int kPackBytes = sizeof(T) == 2 && kOutputs >= 4 ? 8 : 16;
  static constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T)); // elements
  static constexpr int kPackRegisters = kPack * static_cast<int>(sizeof(Acc)) / 4;
  static constexpr bool kPacked = kAccess != Access::Elements;
  static constexpr bool kWide = kAccess == Access::Wide;
  static constexpr int kPacks =
      kWide ? std::clamp(kSumRegisters / (kPackRegisters * kOutputs), 1, 16 / kPackRegisters) : 1;
  static constexpr int kRows = !kWide ? std::clamp(8 / kOutputs, 1, 4) : kPacks == 4 || kOutputs == 16 ? 2 : 4;
  static constexpr int kElements = kPacks * kPack; // of a row, in a thread
  static constexpr int kValues = kRows * kOutputs; // of g, in a group of lanes and a pass
  static constexpr int kLeastLanes = std::max(1, kValues / kOwn);
  // Two blocks a multiprocessor leave a thread 128 registers: too few for these.
  static constexpr int kLeastBlocks = kOutputs == 16 || (sizeof(Acc) == 8 && kOutputs > 1) || !kPacked ? 1 : 2;
  static constexpr bool kWeightInRegisters = kOutputs * kPacks * kPackRegisters <= kWeightRegisters;
  // Enough copies under way: two blocks of 64 KB a multiprocessor, of which half is being computed with.
  static constexpr int kStageBytes = kThreads * kRows * kPacks * kPackBytes;
  static constexpr int kStages = kStageBytes >= 32 << 10 ? 2 : 4;
  static constexpr int kSharedBytes =
      std::max(kStages * kStageBytes, kThreads * kElements * static_cast<int>(sizeof(Acc)));
};

struct Plan {
  int lanes; // threads along a row, a power of two up to kThreads
  int64_t passes; // of the grid: kThreads / lanes * kRows rows each
  int64_t blocks;
};

// The column of element v of a thread's pack c. Neighbouring threads access neighbouring memory either way.
template <typename S>
__device__ int column_of(int lanes, int lane, int c, int v) {
  return S::kPacked ? (c * lanes + lane) * S::kPack + v : (c * S::kPack + v) * lanes + lane;
}

// Begins to copy the thread's packs of a row to its own places in shared memory: no other thread reads them, and so no
// barrier is needed. Zeros beyond the last column, and for rows that do not exist.
template <typename S>
__device__ void copy_row(const FewOutputsCall& call, int lanes, int lane, int64_t row, char* places) {
  using T = typename S::T;
  const T* __restrict__ source = static_cast<const T*>(call.input.data) + row * call.input.row_stride;
  const int columns = row < call.rows ? static_cast<int>(call.in_features) : 0;
#pragma unroll
  for (int c = 0; c < S::kPacks; ++c) {
    char* place = places + c * kThreads * S::kPackBytes;
    if constexpr (S::kPacked) {
      const int column = column_of<S>(lanes, lane, c, 0);
      copy_async<S::kPackBytes>(place, source + column, column < columns);
    } else {
#pragma unroll
      for (int v = 0; v < S::kPack; ++v) {
        const int column = column_of<S>(lanes, lane, c, v);
        T* element = reinterpret_cast<T*>(place) + v;
        if constexpr (sizeof(T) >= 4) {
          copy_async<sizeof(T)>(element, source + column * call.input.column_stride, column < columns);
        } else { // copies in the background begin with 4 bytes
          *element = column < columns ? source[column * call.input.column_stride] : narrow<T>(0.0f);
        }
      }
    }
  }
}

// W[o, ...] of the thread's pack c; zeros beyond the last column and output.
template <typename S>
__device__ void load_weight(
    const FewOutputsCall& call, int lanes, int lane, int o, int c, typename S::Acc (&values)[S::kPack]) {
  using T = typename S::T;
  const int columns = o < call.out_features ? static_cast<int>(call.in_features) : 0;
  const T* __restrict__ source = static_cast<const T*>(call.linear_weight) + o * static_cast<int>(call.in_features);
  if constexpr (S::kPacked) {
    const int column = column_of<S>(lanes, lane, c, 0);
    if (column < columns) {
      load_pack(source + column, values);
    } else {
#pragma unroll
      for (int v = 0; v < S::kPack; ++v) {
        values[v] = 0;
      }
    }
  } else {
#pragma unroll
    for (int v = 0; v < S::kPack; ++v) {
      const int column = column_of<S>(lanes, lane, c, v);
      values[v] = column < columns ? widen(source[column]) : typename S::Acc(0);
    }
  }
}

// Adds kValues numbers up over `lanes` (a power of two up to 32) neighbouring threads, together: at every step a thread keeps
// half of them and gives the other half away, kValues - 1 exchanges for kValues sums. Thread `lane` is left with
// max(1, kValues / lanes) sums, from number `first` on, in the first places; with more lanes than values several threads
// have the same.
// (A recursion: as a loop over kHalf, the compiler leaves the inner loop one, and puts the values in memory.)
template <int kHalf, typename Acc, int kValues>
__device__ void sum_over_lanes(Acc (&values)[kValues], int offset, int lane) {
  if constexpr (kHalf > 0) {
    if (offset > 0) { // the same for the whole block
      const bool upper = (lane & offset) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const Acc first = values[i];
        const Acc second = values[i + kHalf];
        const Acc given = upper ? first : second;
        const Acc kept = upper ? second : first;
        values[i] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
      }
    }
    sum_over_lanes<kHalf / 2>(values, offset / 2, lane);
  } else {
    for (; offset > 0; offset /= 2) {
      values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
    }
  }
}

// A thread's values of g in a pass: which they are, and what they are made of.
template <typename S>
struct Owned {
  using Acc = typename S::Acc;
  int count; // 0 for threads whose values another one has too
  int first; // value i is that of row (first + i) / O' of the pass and of output (first + i) % O'
  Acc target[kOwn];

  __device__ void load(const FewOutputsCall& call, int64_t first_row, int groups) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t row = first_row + (first + i) / S::kOutputs * groups;
      const int o = (first + i) % S::kOutputs;
      if (i < count && row < call.rows && o < call.out_features) {
        target[i] = target_element<typename S::T>(call, call.target, row, o);
      }
    }
  }
};

// Work: a block owns neighbouring passes; in a pass each group of `lanes` neighbouring threads owns kRows rows, `groups`
//   apart. A thread owns kPacks packs of its rows' columns, the same in every pass: it keeps W and the sums of g' X there in
//   registers, copies X there to shared memory kStages passes ahead, and reads it from there twice, for p and for g' X.
// Sums: p in the accumulator type, along the thread's columns in rising order, then over the group's lanes in a tree, then
//   over its warps in order. g' X in the accumulator type over at most kMostTerms rows of a thread, then over the groups of a
//   warp in a tree and over the warps in order. The loss in double. Fixed order for a given number of multiprocessors.
template <typename S>
__global__ void __launch_bounds__(kThreads, S::kLeastBlocks)
    rows_kernel(const FewOutputsCall call, const Plan plan, double* sums, void* weight_sums) {
  using T = typename S::T;
  using Acc = typename S::Acc;
  constexpr int kRows = S::kRows;
  constexpr int kOutputs = S::kOutputs;
  constexpr int kPack = S::kPack;
  constexpr int kValues = S::kValues;
  __shared__ __align__(16) Acc g_of_warp[kWarps][32 * kOwn]; // [group][value]
  __shared__ Acc g_sums[kOwn][kThreads]; // each thread's own: there are no registers left for them
  __shared__ Acc bias[kOutputs];
  __shared__ Acc share_of_warp[2][kWarps][kValues]; // p of rows that several warps work on; in turn
  char* memory = dynamic_shared<char>(); // [stage][row][pack][thread]

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % plan.lanes;
  const int group = thread / plan.lanes;
  const int groups = kThreads / plan.lanes;
  const int warp_lanes = min(plan.lanes, 32); // lanes of the group in this warp
  const int group_warps = max(plan.lanes / 32, 1);
  const int warp_lane = thread % warp_lanes;
  const bool counts = lane < 32; // of the warps that know the same g, the first keeps the books
  const int64_t first_pass = blockIdx.x * plan.passes / plan.blocks;
  const int64_t end_pass = (blockIdx.x + 1) * plan.passes / plan.blocks;
  const int64_t rows_per_pass = int64_t{groups} * kRows;

  const auto scale = static_cast<Acc>(call.residual_factor / (call.weight_sum == nullptr ? 1.0 : *call.weight_sum));
  const bool wants_weight = weight_sums != nullptr;
  const bool wants_input = call.grad_input != nullptr;

  Owned<S> own{};
  const int sharers = max(warp_lanes / kValues, 1);
  own.count = warp_lane % sharers == 0 ? max(kValues / warp_lanes, 1) : 0;
  own.first = warp_lane / sharers * max(kValues / warp_lanes, 1);
  if (thread < kOutputs) {
    bias[thread] = call.linear_bias == nullptr || thread >= call.out_features
        ? Acc(0)
        : widen(static_cast<const T*>(call.linear_bias)[thread]);
  }
  __syncthreads();

  Acc w[S::kWeightInRegisters ? kOutputs : 1][S::kPacks][kPack];
  if constexpr (S::kWeightInRegisters) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int c = 0; c < S::kPacks; ++c) {
        load_weight<S>(call, plan.lanes, lane, o, c, w[o][c]);
      }
    }
  }
  const auto weight_of = [&](int o, int c, Acc(&values)[kPack]) {
    if constexpr (S::kWeightInRegisters) {
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        values[v] = w[o][c][v];
      }
    } else {
      load_weight<S>(call, plan.lanes, lane, o, c, values);
    }
  };

  const int passes = static_cast<int>(end_pass - first_pass);
  const auto place_of = [&](int pass, int r, int c) {
    const int stage = pass % S::kStages;
    return memory + (((stage * kRows + r) * S::kPacks + c) * kThreads + thread) * S::kPackBytes;
  };
  const auto copy_pass = [&](int pass) {
    if (pass < passes) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = (first_pass + pass) * rows_per_pass + r * groups + group;
        copy_row<S>(call, plan.lanes, lane, row, place_of(pass, r, 0));
      }
    }
    copy_async_commit();
  };
  const auto load_x = [&](int pass, int r, int c, Acc(&x)[kPack]) {
    load_pack(reinterpret_cast<const T*>(place_of(pass, r, c)), x);
  };

  Acc products[kOutputs][S::kPacks][kPack] = {}; // of g' X
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    g_sums[i][thread] = 0;
  }
  double loss = 0;

#pragma unroll
  for (int stage = 0; stage < S::kStages; ++stage) {
    copy_pass(stage);
  }
  own.load(call, first_pass * rows_per_pass + group, groups);
  for (int pass = 0; pass < passes; ++pass) {
    const int64_t first_row = (first_pass + pass) * rows_per_pass + group;
    copy_async_wait<S::kStages - 1>();

    Acc p[kValues];
#pragma unroll
    for (int c = 0; c < S::kPacks; ++c) {
      Acc x[kRows][kPack];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load_x(pass, r, c, x[r]);
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        Acc values[kPack];
        weight_of(o, c, values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int v = 0; v < kPack; ++v) {
            const Acc before = c == 0 && v == 0 ? Acc(0) : p[r * kOutputs + o];
            p[r * kOutputs + o] = before + x[r][v] * values[v];
          }
        }
      }
    }
    sum_over_lanes<kValues / 2>(p, warp_lanes / 2, warp_lane);
    if (group_warps > 1) { // the same for the whole block
      auto& shares = share_of_warp[pass % 2];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i < kValues && i < own.count) {
          shares[warp][own.first + i] = p[i];
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i < kValues && i < own.count) {
          p[i] = 0;
          for (int k = 0; k < group_warps; ++k) {
            p[i] += shares[warp / group_warps * group_warps + k][own.first + i];
          }
        }
      }
    }

    Acc* g_of_group = g_of_warp[warp] + thread % 32 / warp_lanes * kValues;
    __syncwarp(); // the pass before has read it
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i < kValues && i < own.count) {
        const int64_t row = first_row + (own.first + i) / kOutputs * groups;
        const int o = (own.first + i) % kOutputs;
        Acc g = 0;
        if (row < call.rows && o < call.out_features) {
          const Acc r = p[i] + bias[o] - own.target[i];
          const Acc v = call.weight.data == nullptr ? Acc(1) : target_element<T>(call, call.weight, row, o);
          g = scale * v * r;
          if (counts) {
            loss += static_cast<double>(v) * r * r;
            g_sums[i][thread] += g;
            if (call.grad_target != nullptr) {
              store_target_gradient<T>(call, row, o, static_cast<Acc>(call.target_gradient_factor) * g);
            }
          }
        }
        g_of_group[own.first + i] = g;
      }
    }
    __syncwarp();
    if (pass + 1 < passes) {
      own.load(call, first_row + rows_per_pass, groups); // while this pass goes on
    }

    if (wants_weight || wants_input) {
      constexpr int kLoad = std::min(kValues, 16 / static_cast<int>(sizeof(Acc)));
      Acc g[kValues];
#pragma unroll
      for (int i = 0; i < kValues; i += kLoad) {
        Acc values[kLoad];
        load_pack(g_of_group + i, values);
#pragma unroll
        for (int k = 0; k < kLoad; ++k) {
          g[i + k] = values[k];
        }
      }
      if (wants_weight) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < S::kPacks; ++c) {
            Acc x[kPack];
            load_x(pass, r, c, x);
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
              for (int v = 0; v < kPack; ++v) {
                products[o][c][v] += g[r * kOutputs + o] * x[v];
              }
            }
          }
        }
      }
      if (wants_input) {
        const auto factor = static_cast<Acc>(call.input_gradient_factor);
#pragma unroll
        for (int c = 0; c < S::kPacks; ++c) {
          Acc gradient[kRows][kPack] = {};
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
            Acc values[kPack];
            weight_of(o, c, values);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
              for (int v = 0; v < kPack; ++v) {
                gradient[r][v] += g[r * kOutputs + o] * values[v];
              }
            }
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int64_t row = first_row + r * groups;
            if (row < call.rows) {
#pragma unroll
              for (int v = 0; v < kPack; ++v) {
                gradient[r][v] *= factor;
              }
              T* destination = static_cast<T*>(call.grad_input) + row * call.in_features;
              if constexpr (S::kPacked) {
                const int column = column_of<S>(plan.lanes, lane, c, 0);
                if (column < call.in_features) {
                  store_pack(destination + column, gradient[r]);
                }
              } else {
#pragma unroll
                for (int v = 0; v < kPack; ++v) {
                  const int column = column_of<S>(plan.lanes, lane, c, v);
                  if (column < call.in_features) {
                    destination[column] = narrow<T>(gradient[r][v]);
                  }
                }
              }
            }
          }
        }
      }
    }
    copy_pass(pass + S::kStages); // to the places that this pass has done with
  }

  // The block's sums. Values of one output lie in threads all over the block.
  __shared__ double sums_of_warp[kWarps][1 + kOutputs];
#pragma unroll
  for (int k = 0; k <= kOutputs; ++k) {
    double value = k == 0 ? loss : 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (k > 0 && i < kValues && i < own.count && (own.first + i) % kOutputs == k - 1) {
        value += g_sums[i][thread];
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    if (thread % 32 == 0) {
      sums_of_warp[warp][k] = value;
    }
  }
  __syncthreads();
  store_block_sums(sums_of_warp, call.grad_linear_bias == nullptr ? 1 : 1 + call.out_features, sums, plan.blocks);
  if (!wants_weight) {
    return;
  }

  copy_async_wait<0>();
  Acc* share = reinterpret_cast<Acc*>(memory); // [element][thread], where only the first group of a warp writes
  Acc* destination = static_cast<Acc*>(weight_sums) + int64_t{blockIdx.x} * call.out_features * call.in_features;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    if (o < call.out_features) { // the same for the whole block
      __syncthreads(); // what is read of `memory` has been read
#pragma unroll
      for (int c = 0; c < S::kPacks; ++c) {
#pragma unroll
        for (int v = 0; v < kPack; ++v) {
          Acc value = products[o][c][v];
          for (int offset = 16; offset >= warp_lanes; offset /= 2) {
            value += __shfl_xor_sync(0xffffffffu, value, offset);
          }
          if (thread % 32 < warp_lanes) {
            share[(c * kPack + v) * kThreads + thread] = value;
          }
        }
      }
      __syncthreads();
      for (int column = thread; column < call.in_features; column += kThreads) {
        const int element = S::kPacked ? column / kPack / plan.lanes * kPack + column % kPack : column / plan.lanes;
        const int owner = S::kPacked ? column / kPack % plan.lanes : column % plan.lanes;
        double total = 0;
        for (int k = owner; k < kThreads; k += max(plan.lanes, 32)) {
          total += share[element * kThreads + k];
        }
        destination[o * call.in_features + column] = static_cast<Acc>(total);
      }
    }
  }
}

template <typename S>
Plan plan_for(const FewOutputsCall& call) {
  Plan plan{};
  plan.lanes = std::max(S::kLeastLanes, power_of_two_from(divide_up(call.in_features, S::kElements), kThreads));
  plan.passes = divide_up(call.rows, int64_t{kThreads / plan.lanes} * S::kRows);
  plan.blocks = grid_blocks(plan.passes, S::kRows, call.multiprocessors);
  return plan;
}

// Calls use(Shape) for the shape of a call.
template <typename T, int kOutputs, typename Use>
auto with_shape(const FewOutputsCall& call, Use use) {
  using Wide = Shape<T, kOutputs, Access::Wide>;
  const bool packed = call.in_features % Wide::kPack == 0 && call.input.column_stride == 1 &&
      call.input.row_stride % Wide::kPack == 0 && is_aligned(call.input.data, Wide::kPackBytes) &&
      is_aligned(call.linear_weight, Wide::kPackBytes) && is_aligned(call.grad_input, Wide::kPackBytes);
  if (!packed) {
    return use(Shape<T, kOutputs, Access::Elements>{});
  }
  // Long enough for all packs of a thread, and for as many lanes as there must be at least.
  const bool wide =
      call.in_features > Wide::kPack * (Wide::kPacks - 1) && call.in_features > Wide::kElements * Wide::kLeastLanes / 2;
  return wide ? use(Wide{}) : use(Shape<T, kOutputs, Access::Narrow>{});
}

template <typename T, typename Use>
auto with_outputs(const FewOutputsCall& call, Use use) {
  switch (power_of_two_from(call.out_features, kMaxFewOutputs)) {
    case 1:
      return with_shape<T, 1>(call, use);
    case 2:
      return with_shape<T, 2>(call, use);
    case 4:
      return with_shape<T, 4>(call, use);
    case 8:
      return with_shape<T, 8>(call, use);
    default:
      return with_shape<T, 16>(call, use);
  }
}

template <typename Use>
auto with_shape_of(const FewOutputsCall& call, Use use) {
  switch (call.dtype) {
    case Dtype::Float64:
      return with_outputs<double>(call, use);
    case Dtype::Float32:
      return with_outputs<float>(call, use);
    case Dtype::BFloat16:
      return with_outputs<__nv_bfloat16>(call, use);
    default:
      return with_outputs<__half>(call, use);
  }
}

} // namespace

bool rows_take(const FewOutputsCall& call) {
  return with_shape_of(call, [&](auto shape) { return call.in_features <= kThreads * decltype(shape)::kElements; });
}

Shares rows_shares(const FewOutputsCall& call) {
  return with_shape_of(call, [&](auto shape) {
    const auto plan = plan_for<decltype(shape)>(call);
    return Shares{plan.blocks, plan.blocks, 0};
  });
}

cudaError_t rows_stage(const FewOutputsCall& call, const Shares&, const FirstStage& stage, cudaStream_t stream) {
  return with_shape_of(call, [&](auto shape) {
    using S = decltype(shape);
    const auto plan = plan_for<S>(call);
    return launch(
        rows_kernel<S>, plan.blocks, kThreads, S::kSharedBytes, stream, call, plan, stage.sums, stage.weight_sums);
  });
}

} // namespace torchintro::cuda
