#include "cpu/few_outputs.h"

#include "cpu/call.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace torchintro::cpu {
namespace {

// Blocks of the few-outputs kernel: at least so many rows, so that a block's sums (8 O D bytes) stay small beside its rows,
// and at most so many blocks, so that all sums do. Fixed by the sizes, never by the number of threads.
constexpr int64_t kRowsPerBlock = 256;
constexpr int64_t kRowsPerBlockAndOutput = 32;
constexpr int64_t kMaximumBlocks = 128;

// From here on the rows of dx are stored past the caches: what is smaller may still be there when it is read.
constexpr int64_t kPastCachesBytes = int64_t{32} << 20;

void write_scaled(const at::Tensor& to, const double* from, double scale) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, to.scalar_type(), "linear_mse_loss", [&] {
    auto* data = to.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < to.numel(); ++i) {
      data[i] = static_cast<scalar_t>(scale * from[i]);
    }
  });
}

} // namespace

std::tuple<at::Tensor, std::array<at::Tensor, 4>> few_outputs(const Problem& p) {
  auto gradients = empty_gradients(p);
  const auto accumulator = p.input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto linear_weight = p.linear_weight.to(accumulator).contiguous();
  const auto linear_bias = p.linear_bias.defined() ? p.linear_bias.to(accumulator).contiguous() : at::Tensor();

  FewOutputs call{};
  call.input = strided(p.input);
  call.linear_weight = linear_weight.const_data_ptr();
  call.linear_bias = linear_bias.defined() ? linear_bias.const_data_ptr() : nullptr;
  call.target = strided(p.target);
  call.weight = strided(p.weight);
  call.in_features = p.in_features;
  call.out_features = p.out_features;
  call.residual_scale = residual_scale(p);
  call.target_scale = p.target_gradient_factor;
  call.input_scale = p.input_gradient_factor;
  call.grad_input = data_or_null(gradients[kInput]);
  call.grad_target = data_or_null(gradients[kTarget]);
  call.wants_weight_gradient = p.mask[kLinearWeight];
  call.past_caches = p.mask[kInput] && static_cast<int64_t>(gradients[kInput].nbytes()) >= kPastCachesBytes;
  at::Tensor transposed;
  if (wants_transposed(p.rows, p.in_features, p.out_features)) {
    transposed = at::zeros({p.in_features, transposed_stride(p.out_features)}, linear_weight.options());
    transposed.narrow(1, 0, p.out_features).copy_(linear_weight.t());
    call.linear_weight_transposed = transposed.const_data_ptr();
  }

  const int64_t block_rows = std::max(kRowsPerBlock, kRowsPerBlockAndOutput * p.out_features);
  const int64_t blocks = std::clamp<int64_t>(p.rows / block_rows, 1, kMaximumBlocks);
  const int64_t weights = p.mask[kLinearWeight] ? p.out_features * p.in_features : 0;
  const auto kernel = find_kernels(dtype_of(p.input), dtype_of(p.target)).few_outputs;
  const auto sums = sum_blocks(
      p.rows,
      blocks,
      p.in_features * p.out_features,
      1 + p.out_features + weights,
      few_outputs_scratch_bytes(call),
      [&](int64_t begin, int64_t end, double* partial, void* scratch) { kernel(call, begin, end, partial, scratch); });

  if (p.mask[kLinearBias]) {
    write_scaled(gradients[kLinearBias], sums.get() + 1, p.weight_gradient_factor);
  }
  if (p.mask[kLinearWeight]) {
    write_scaled(gradients[kLinearWeight], sums.get() + 1 + p.out_features, p.weight_gradient_factor);
  }
  const auto loss = at::empty({}, p.target.options());
  const double s = p.weight_sum.defined() ? *p.weight_sum.const_data_ptr<double>() : 1.0;
  write_scaled(loss, sums.get(), p.loss_factor / s);
  return {loss, gradients};
}

} // namespace torchintro::cpu
