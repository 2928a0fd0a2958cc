#include "cpu/residual_step.h"

#include "cpu/call.h"

namespace torchintro::cpu {
namespace {

// Many outputs: a chunk's residual of this size is still in the outer cache when the two products for the gradients read
// it. But every chunk adds to the whole weight gradient, 8 O D bytes beside 2 R O D operations: with 256 rows a step of
// 2048 x 512 -> 32768 took 2.7 times eager's time, with 1024 rows 0.8 of it (float32, 2 cores, AMD Zen 4, with other work
// on the machine: the order is sure, the digits are not).
constexpr int64_t kChunkBytes = int64_t{4} << 20;
constexpr int64_t kMinimumChunkRows = 1024;
constexpr int64_t kResidualBlocks = 16;

} // namespace

int64_t chunk_rows(const Problem& p) {
  const int64_t row_bytes = p.out_features * static_cast<int64_t>(p.input.element_size());
  return std::max(kMinimumChunkRows, kChunkBytes / row_bytes);
}

void residual_step(const Problem& p, const ResidualChunk& chunk) {
  Residual call{};
  call.prediction = chunk.prediction.mutable_data_ptr();
  call.target = strided(chunk.target);
  call.weight = strided(chunk.weight);
  call.out_features = p.out_features;
  call.residual_scale = residual_scale(p);
  call.target_scale = p.target_gradient_factor;
  call.grad_target = data_or_null(chunk.grad_target);
  call.wants_residual = chunk.wants_residual;
  call.wants_bias_gradient = chunk.bias_sum.defined();

  const auto kernel = find_kernels(dtype_of(p.input), dtype_of(p.target)).residual;
  const int64_t outputs = call.wants_bias_gradient ? p.out_features : 0;
  const auto sums = sum_blocks(
      AtenThreads{},
      chunk.prediction.size(0),
      kResidualBlocks,
      p.out_features,
      1 + outputs,
      residual_scratch_bytes(call),
      [&](int64_t begin, int64_t end, double* partial, void* scratch) { kernel(call, begin, end, partial, scratch); });
  *chunk.loss_sum.mutable_data_ptr<double>() += sums[0];
  for (int64_t o = 0; o < outputs; ++o) {
    chunk.bias_sum.mutable_data_ptr<double>()[o] += sums[1 + o];
  }
}

} // namespace torchintro::cpu
