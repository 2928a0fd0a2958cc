#include "cpu/few_outputs.h"

#include "cpu/call.h"
#include "cpu/gradient_memory.h"

namespace torchintro::cpu {
namespace {

// Blocks of the few-outputs kernel. Every block has sums of its own (8 O D bytes), which cost as much as some fifteen rows:
// at least so many rows, for a few threads' sake, and more for more blocks than that; and never so many blocks that their
// sums together leave the caches. Fixed by the sizes, never by the number of threads.
constexpr int64_t kFewestRows = 64;
constexpr int64_t kFewBlocks = 8;
constexpr int64_t kRowsPerBlock = 256;
constexpr int64_t kRowsPerBlockAndOutput = 32;
constexpr int64_t kMaximumBlocks = 128;
constexpr int64_t kManyBlocks = 16;
constexpr int64_t kSumsBytes = int64_t{4} << 20;

int64_t count_blocks(const Problem& p, int64_t sums) {
  const int64_t rows = std::max(kRowsPerBlock, kRowsPerBlockAndOutput * p.out_features);
  const int64_t most = std::clamp(kSumsBytes / (8 * sums), kManyBlocks, kMaximumBlocks);
  const int64_t few = std::clamp<int64_t>(p.rows / kFewestRows, 1, kFewBlocks);
  return std::clamp(p.rows / rows, few, most);
}

// From here on the rows of dx are stored past the caches: what is smaller may still be there when it is read.
constexpr int64_t kPastCachesBytes = int64_t{32} << 20;

} // namespace

std::tuple<at::Tensor, std::array<at::Tensor, 4>> few_outputs(const Problem& p) {
  auto gradients = empty_gradients(p, empty_gradient);
  const auto accumulator = p.input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto linear_weight = contiguous_in(accumulator, p.linear_weight);
  const auto linear_bias = p.linear_bias.defined() ? contiguous_in(accumulator, p.linear_bias) : at::Tensor();

  FewOutputs call{};
  call.input = strided(p.input);
  call.linear_weight = linear_weight.const_data_ptr();
  call.linear_bias = linear_bias.defined() ? linear_bias.const_data_ptr() : nullptr;
  call.target = strided(p.target);
  call.weight = strided(p.weight);
  call.rows = p.rows;
  call.in_features = p.in_features;
  call.out_features = p.out_features;
  call.models = 1;
  call.residual_scale = residual_scale(p);
  call.target_scale = p.target_gradient_factor;
  call.input_scale = p.input_gradient_factor;
  call.grad_input = data_or_null(gradients[kInput]);
  call.grad_target = data_or_null(gradients[kTarget]);
  call.wants_weight_gradient = p.mask[kLinearWeight];
  call.past_caches = p.mask[kInput] && static_cast<int64_t>(gradients[kInput].nbytes()) >= kPastCachesBytes;

  const int64_t size = 1 + p.out_features + (p.mask[kLinearWeight] ? p.out_features * p.in_features : 0);
  const auto kernels = find_kernels(dtype_of(p.input), dtype_of(p.target));
  const auto [sums, blocks] = run_blocks(
      AtenThreads{},
      p.rows,
      count_blocks(p, size),
      p.in_features * p.out_features,
      size,
      few_outputs_scratch_bytes(call),
      [&](int64_t begin, int64_t end, double* partial, void* scratch) {
        kernels.few_outputs(call, begin, end, partial, scratch);
      });

  const auto add_up = [&, first = sums.get(), count = blocks](int64_t offset, const at::Tensor& gradient) {
    void* const to = gradient.mutable_data_ptr();
    const auto kernel = find_kernels(dtype_of(gradient), dtype_of(gradient)).add_up;
    at::parallel_for(0, gradient.numel(), kOperationsPerThread / count + 1, [&](int64_t begin, int64_t end) {
      kernel(first + offset, count, size, begin, end, p.weight_gradient_factor, to);
    });
  };
  if (p.mask[kLinearBias]) {
    add_up(1, gradients[kLinearBias]);
  }
  if (p.mask[kLinearWeight]) {
    add_up(1 + p.out_features, gradients[kLinearWeight]);
  }
  double squares = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    squares += sums[block * size];
  }
  return {loss_of(p, squares), std::move(gradients)};
}

} // namespace torchintro::cpu
