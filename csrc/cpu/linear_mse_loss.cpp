// CPU: registration, the choice of regime, and the threads. The arithmetic is in cpu/kernels/.
#include "cpu/kernels/kernels.h"
#include "many_outputs.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>

namespace torchintro {
namespace {

// Up to here one pass of our kernel over the input, beyond it matrix products. Where the border should lie depends on the
// shape and is not settled: of two cases with 16 outputs, 65536 x 1024 in float32 is 1.3 times as fast as eager, and
// 65536 x 64 in bfloat16 half as fast (benchmarks/results).
constexpr int64_t kFewOutputs = 16;
static_assert(kFewOutputs <= cpu::kMaximumFewOutputs);

// Blocks of the few-outputs kernel: at least so many rows, so that a block's sums (8 O D bytes) stay small beside its rows,
// and at most so many blocks, so that all sums do. Fixed by the sizes, never by the number of threads.
constexpr int64_t kRowsPerBlock = 256;
constexpr int64_t kRowsPerBlockAndOutput = 32;
constexpr int64_t kMaximumBlocks = 128;
// Multiplications that are worth waking a thread for (ATen's own grain size).
constexpr int64_t kOperationsPerThread = 32768;

// Many outputs: a chunk's residual of this size is still in the outer cache when the two products for the gradients read
// it. But every chunk adds to the whole weight gradient, 8 O D bytes beside 2 R O D operations: with 256 rows a step of
// 2048 x 512 -> 32768 took 2.7 times eager's time, with 1024 rows 0.8 of it (float32, 2 cores, AMD Zen 4, with other work
// on the machine: the order is sure, the digits are not).
constexpr int64_t kChunkBytes = int64_t{4} << 20;
constexpr int64_t kMinimumChunkRows = 1024;
constexpr int64_t kResidualBlocks = 16;

cpu::DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return cpu::DType::Float64;
    case at::kFloat:
      return cpu::DType::Float32;
    case at::kBFloat16:
      return cpu::DType::BFloat16;
    default:
      return cpu::DType::Float16;
  }
}

cpu::Strided<const void> strided(const at::Tensor& matrix) {
  return matrix.defined() ? cpu::Strided<const void>{matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1)}
                          : cpu::Strided<const void>{};
}

void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// residual_factor / S, which on the CPU can simply be read.
double residual_scale(const Problem& p) {
  return p.weight_sum.defined() ? p.residual_factor / *p.weight_sum.const_data_ptr<double>() : p.residual_factor;
}

// Runs kernel(begin, end, partial, scratch) over blocks of rows and adds the blocks' `size` sums up, in block order. The
// sums are the first `size` values of what is returned.
template <typename Kernel>
std::unique_ptr<double[]> sum_blocks(
    int64_t rows,
    int64_t blocks,
    int64_t operations_per_row,
    int64_t size,
    int64_t scratch_bytes,
    const Kernel& kernel) {
  const int64_t block_rows = (rows + blocks - 1) / blocks;
  blocks = (rows + block_rows - 1) / block_rows;
  const int64_t grain =
      std::max<int64_t>(1, kOperationsPerThread / std::max<int64_t>(1, operations_per_row * block_rows));
  std::unique_ptr<double[]> sums(new double[blocks * size]);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[(scratch_bytes + 7) / 8]);
    for (int64_t block = begin; block < end; ++block) {
      kernel(block * block_rows, std::min(rows, (block + 1) * block_rows), sums.get() + block * size, scratch.get());
    }
  });
  if (blocks > 1) {
    at::parallel_for(0, size, kOperationsPerThread / blocks + 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t i = begin; i < end; ++i) {
          sums[i] += sums[block * size + i];
        }
      }
    });
  }
  return sums;
}

void write_scaled(const at::Tensor& to, const double* from, double scale) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, to.scalar_type(), "linear_mse_loss", [&] {
    auto* data = to.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < to.numel(); ++i) {
      data[i] = static_cast<scalar_t>(scale * from[i]);
    }
  });
}

std::tuple<at::Tensor, std::array<at::Tensor, 4>> few_outputs(const Problem& p) {
  auto gradients = empty_gradients(p);
  const auto accumulator = p.input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto linear_weight = p.linear_weight.to(accumulator).contiguous();
  const auto linear_bias = p.linear_bias.defined() ? p.linear_bias.to(accumulator).contiguous() : at::Tensor();

  cpu::FewOutputs call{};
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

  const int64_t block_rows = std::max(kRowsPerBlock, kRowsPerBlockAndOutput * p.out_features);
  const int64_t blocks = std::clamp<int64_t>(p.rows / block_rows, 1, kMaximumBlocks);
  const int64_t weights = p.mask[kLinearWeight] ? p.out_features * p.in_features : 0;
  const auto kernel = cpu::find_kernels(dtype_of(p.input), dtype_of(p.target)).few_outputs;
  const auto sums = sum_blocks(
      p.rows,
      blocks,
      p.in_features * p.out_features,
      1 + p.out_features + weights,
      cpu::few_outputs_scratch_bytes(call),
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

void residual_step(const Problem& p, const ResidualChunk& chunk) {
  cpu::Residual call{};
  call.prediction = chunk.prediction.mutable_data_ptr();
  call.target = strided(chunk.target);
  call.weight = strided(chunk.weight);
  call.out_features = p.out_features;
  call.residual_scale = residual_scale(p);
  call.target_scale = p.target_gradient_factor;
  call.grad_target = data_or_null(chunk.grad_target);
  call.wants_residual = chunk.wants_residual;
  call.wants_bias_gradient = chunk.bias_sum.defined();

  const auto kernel = cpu::find_kernels(dtype_of(p.input), dtype_of(p.target)).residual;
  const int64_t outputs = call.wants_bias_gradient ? p.out_features : 0;
  const auto sums = sum_blocks(
      chunk.prediction.size(0),
      kResidualBlocks,
      p.out_features,
      1 + outputs,
      cpu::residual_scratch_bytes(call),
      [&](int64_t begin, int64_t end, double* partial, void* scratch) { kernel(call, begin, end, partial, scratch); });
  *chunk.loss_sum.mutable_data_ptr<double>() += sums[0];
  for (int64_t o = 0; o < outputs; ++o) {
    chunk.bias_sum.mutable_data_ptr<double>()[o] += sums[1 + o];
  }
}

std::tuple<at::Tensor, std::array<at::Tensor, 4>> loss_and_gradients(const Problem& p) {
  if (p.rows == 0 || p.out_features == 0) {
    return results_of_nothing(p);
  }
  if (p.out_features <= kFewOutputs) {
    return few_outputs(p);
  }
  const int64_t row_bytes = p.out_features * static_cast<int64_t>(p.input.element_size());
  return many_outputs(p, std::max(kMinimumChunkRows, kChunkBytes / row_bytes), residual_step);
}

at::Tensor linear_mse_loss_cpu(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction) {
  const auto parsed = check_inputs(input, linear_weight, target, linear_bias, weight, reduction);
  const auto problem = make_problem(input, linear_weight, target, linear_bias, weight, parsed, /*mask=*/{});
  return parsed == Reduction::None ? loss_per_element(problem, target) : std::get<0>(loss_and_gradients(problem));
}

LossAndGradients linear_mse_loss_grads_cpu(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction,
    GradientMask output_mask) {
  const auto parsed = check_grads_inputs(input, linear_weight, target, linear_bias, weight, reduction, output_mask);
  const auto problem = make_problem(input, linear_weight, target, linear_bias, weight, parsed, output_mask);
  const auto [loss, gradients] = loss_and_gradients(problem);
  return unflatten(loss, gradients, input, target);
}

TORCH_LIBRARY_IMPL(torchintro, CPU, m) {
  m.impl("linear_mse_loss", linear_mse_loss_cpu);
  m.impl("_linear_mse_loss_grads", linear_mse_loss_grads_cpu);
}

} // namespace
} // namespace torchintro
