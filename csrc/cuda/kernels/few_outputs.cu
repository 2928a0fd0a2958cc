// Few outputs: a first stage of one of three kinds, and a second that adds up its partial sums.
//
//   tiles.cu      bfloat16, 3 to 16 outputs, rows of 32 to 1024 features in packs: tensor cores; X read once
//   rows.cu       rows whose sums the registers of a block hold: X read once
//   long_rows.cu  everything longer: X read once from memory, and once more from the second-level cache
//
// tiles.cu goes before rows.cu: with several outputs, the multiplications of 16-bit elements take the GPU's other units about
// as long as its memory takes (docs/cuda.md counts).
#include "cuda/kernels/few_outputs.h"

#include "cuda/kernels/arithmetic.h"
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/first_stage.h"
#include "cuda/kernels/reduction.cuh"
#include "cuda/kernels/scalar.cuh"

namespace torchintro::cuda {
namespace {

template <typename T>
struct WeightGradientOf { // what dW and db are stored in: gradient_dtype in linear_mse_loss.h
  using type = T;
};
template <>
struct WeightGradientOf<__half> {
  using type = float;
};

// Adds up the partial sums, scales them and stores the results.
//
//   loss = loss_factor * sum(v r^2) / S     db = weight_gradient_factor * sum g     dW = weight_gradient_factor * g' X
//
// Work: the first blocks own one column of `sums` each, loss then outputs; the others `width` elements of dW each.
// Memory: reads the partial sums once; writes 1 + O + O D results. Sums: see sum_of_partials; fixed order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    finish_kernel(const FewOutputsCall call, const Partials<double> sums, const Partials<Accumulator<T>> weight_sums) {
  using G = typename WeightGradientOf<T>::type;
  __shared__ double scratch[kSumThreads];
  int64_t column = 0;
  double total = 0;
  if (blockIdx.x >= sums.columns) { // the same for the whole block
    if (sum_of_partials(weight_sums, blockIdx.x - sums.columns, scratch, column, total)) {
      static_cast<G*>(call.grad_linear_weight)[column] = narrow<G>(call.weight_gradient_factor * total);
    }
  } else if (sum_of_partials(sums, blockIdx.x, scratch, column, total)) {
    if (column > 0) {
      static_cast<G*>(call.grad_linear_bias)[column - 1] = narrow<G>(call.weight_gradient_factor * total);
    } else {
      const double loss = call.loss_factor * total / (call.weight_sum == nullptr ? 1.0 : *call.weight_sum);
      if (call.target_dtype == call.dtype) {
        *static_cast<T*>(call.loss) = narrow<T>(loss);
      } else {
        *static_cast<float*>(call.loss) = static_cast<float>(loss);
      }
    }
  }
}

template <typename T>
cudaError_t finish(const FewOutputsCall& call, const Shares& shares, const FirstStage& stage, cudaStream_t stream) {
  Partials<double> sums;
  sums.data = stage.sums;
  sums.count = shares.sums;
  sums.columns = call.grad_linear_bias == nullptr ? 1 : 1 + call.out_features;
  sums.partial_stride = 1;
  sums.column_stride = shares.sums;

  Partials<Accumulator<T>> weight_sums;
  if (stage.weight_sums != nullptr) {
    weight_sums.data = static_cast<const Accumulator<T>*>(stage.weight_sums);
    weight_sums.count = shares.weight_sums;
    weight_sums.columns = call.out_features * call.in_features;
    weight_sums.partial_stride = weight_sums.columns;
    weight_sums.column_stride = 1;
    weight_sums.width = power_of_two_from(weight_sums.columns, kMaxSumWidth);
  }
  const int64_t blocks = sums.columns + sum_blocks(weight_sums);
  return launch(finish_kernel<T>, blocks, kSumThreads, 0, stream, call, sums, weight_sums);
}

struct Way {
  Shares (*shares)(const FewOutputsCall&);
  cudaError_t (*run)(const FewOutputsCall&, const Shares&, const FirstStage&, cudaStream_t);
};

Way way_of(const FewOutputsCall& call) {
  if (tiles_take(call)) {
    return {tiles_shares, tiles_stage};
  }
  return rows_take(call) ? Way{rows_shares, rows_stage} : Way{long_rows_shares, long_rows_stage};
}

// Byte offsets in the workspace, and its size.
struct Layout {
  size_t sums;
  size_t weight_sums;
  size_t scratch;
  size_t bytes;
};

bool wants_weight_sums(const FewOutputsCall& call) {
  return call.grad_linear_weight != nullptr && call.in_features > 0;
}

Layout layout_of(const FewOutputsCall& call, const Shares& shares) {
  Layout layout{};
  const auto reserve = [&layout](size_t bytes) {
    const size_t offset = layout.bytes;
    layout.bytes += (bytes + 255) / 256 * 256;
    return offset;
  };
  const size_t accumulator = call.dtype == Dtype::Float64 ? sizeof(double) : sizeof(float);
  layout.sums = reserve(static_cast<size_t>((1 + call.out_features) * shares.sums) * sizeof(double));
  if (wants_weight_sums(call)) {
    layout.weight_sums =
        reserve(static_cast<size_t>(shares.weight_sums * call.out_features * call.in_features) * accumulator);
    layout.scratch = reserve(shares.scratch_bytes);
  }
  return layout;
}

} // namespace

size_t few_outputs_workspace(const FewOutputsCall& call) {
  return layout_of(call, way_of(call).shares(call)).bytes;
}

cudaError_t few_outputs(const FewOutputsCall& call, void* workspace, cudaStream_t stream) {
  const auto way = way_of(call);
  const auto shares = way.shares(call);
  const auto layout = layout_of(call, shares);
  auto* bytes = static_cast<char*>(workspace);
  FirstStage stage{};
  stage.sums = reinterpret_cast<double*>(bytes + layout.sums);
  stage.weight_sums = wants_weight_sums(call) ? bytes + layout.weight_sums : nullptr;
  stage.scratch = bytes + layout.scratch;
  if (const auto error = way.run(call, shares, stage, stream); error != cudaSuccess) {
    return error;
  }
  switch (call.dtype) {
    case Dtype::Float64:
      return finish<double>(call, shares, stage, stream);
    case Dtype::Float32:
      return finish<float>(call, shares, stage, stream);
    case Dtype::BFloat16:
      return finish<__nv_bfloat16>(call, shares, stage, stream);
    case Dtype::Float16:
      return finish<__half>(call, shares, stage, stream);
  }
  return cudaErrorInvalidValue;
}

} // namespace torchintro::cuda
