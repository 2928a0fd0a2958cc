// The CUDA key: both operators on kernels of ours for few outputs, and on PyTorch's matrix products for many.
//
// Everything is enqueued on the current stream of input's device, and nothing waits for it: no result is read on the host,
// and all memory comes from PyTorch's allocator, so a CUDA graph can capture the calls.
#include "linear_mse_loss.h"

#include "cuda/kernels/few_outputs.h"
#include "cuda/kernels/residual_step.h"
#include "cuda/many_outputs.h"
#include "loss_per_element.h"
#include "problem.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

namespace torchintro {
namespace {

// Rows of a chunk in the regime of many outputs; not yet measured on a GPU. Enough that a product with D or with O columns
// has a tile for every multiprocessor (2^22 results are 128 tiles of 256 x 128), but not more than 32 MB of g in 16 bits,
// which stay in the L2 cache of a data-centre GPU from A100 on until the next products read them. At least 2048 rows,
// whatever O: each chunk's product for linear_weight's gradient reads and writes all O D of its sums, which takes about as
// long as the multiplications at some hundred rows.
int64_t chunk_rows(int64_t in_features, int64_t out_features) {
  constexpr int64_t kMostElements = int64_t{1} << 24;
  constexpr int64_t kLeastResults = int64_t{1} << 22;
  constexpr int64_t kLeastRows = 2048;
  const int64_t narrower = std::max<int64_t>(1, std::min(in_features, out_features));
  return std::max(kLeastRows, std::min(kMostElements / out_features, kLeastResults / narrower));
}

cuda::Dtype kernel_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return cuda::Dtype::Float64;
    case at::kFloat:
      return cuda::Dtype::Float32;
    case at::kBFloat16:
      return cuda::Dtype::BFloat16;
    default:
      TORCH_INTERNAL_ASSERT(tensor.scalar_type() == at::kHalf);
      return cuda::Dtype::Float16;
  }
}

cuda::Matrix kernel_matrix(const at::Tensor& tensor) {
  return tensor.defined() ? cuda::Matrix{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)} : cuda::Matrix{};
}

void* output_pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

const double* weight_sum_pointer(const Problem& p) {
  return p.weight_sum.defined() ? p.weight_sum.const_data_ptr<double>() : nullptr;
}

at::Tensor empty_workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

std::tuple<at::Tensor, std::array<at::Tensor, 4>> few_outputs(const Problem& p) {
  const auto loss = at::empty({}, p.target.options());
  const auto gradients = empty_gradients(p);
  const auto linear_weight = p.linear_weight.contiguous();
  const auto linear_bias = p.linear_bias.defined() ? p.linear_bias.contiguous() : p.linear_bias;

  cuda::FewOutputsCall call;
  call.rows = p.rows;
  call.in_features = p.in_features;
  call.out_features = static_cast<int>(p.out_features);
  call.dtype = kernel_dtype(p.input);
  call.target_dtype = kernel_dtype(p.target);
  call.input = kernel_matrix(p.input);
  call.target = kernel_matrix(p.target);
  call.weight = kernel_matrix(p.weight);
  call.linear_weight = linear_weight.const_data_ptr();
  call.linear_bias = linear_bias.defined() ? linear_bias.const_data_ptr() : nullptr;
  call.weight_sum = weight_sum_pointer(p);
  call.loss_factor = p.loss_factor;
  call.residual_factor = p.residual_factor;
  call.weight_gradient_factor = p.weight_gradient_factor;
  call.target_gradient_factor = p.target_gradient_factor;
  call.input_gradient_factor = p.input_gradient_factor;
  call.multiprocessors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  call.loss = output_pointer(loss);
  call.grad_input = output_pointer(gradients[kInput]);
  call.grad_linear_weight = output_pointer(gradients[kLinearWeight]);
  call.grad_target = output_pointer(gradients[kTarget]);
  call.grad_linear_bias = output_pointer(gradients[kLinearBias]);

  const auto workspace = empty_workspace(cuda::few_outputs_workspace(call), p.input);
  C10_CUDA_CHECK(cuda::few_outputs(call, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {loss, gradients};
}

void residual_step(const Problem& p, const ResidualChunk& chunk) {
  cuda::ResidualStepCall call;
  call.rows = chunk.prediction.size(0);
  call.out_features = p.out_features;
  call.dtype = kernel_dtype(chunk.prediction);
  call.target_dtype = kernel_dtype(p.target);
  call.prediction = output_pointer(chunk.prediction);
  call.writes_g = chunk.wants_g;
  call.target = kernel_matrix(chunk.target);
  call.weight = kernel_matrix(chunk.weight);
  call.weight_sum = weight_sum_pointer(p);
  call.residual_factor = p.residual_factor;
  call.target_gradient_factor = p.target_gradient_factor;
  call.grad_target = output_pointer(chunk.grad_target);
  call.loss_sum = chunk.loss_sum.mutable_data_ptr<double>();
  call.bias_sum = static_cast<double*>(output_pointer(chunk.bias_sum));

  const auto workspace = empty_workspace(cuda::residual_step_workspace(call), chunk.prediction);
  C10_CUDA_CHECK(cuda::residual_step(call, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, std::array<at::Tensor, 4>> loss_and_gradients(const Problem& p) {
  if (p.rows == 0 || p.out_features == 0) {
    return results_of_nothing(p);
  }
  return p.out_features <= cuda::kMaxFewOutputs
      ? few_outputs(p)
      : many_outputs(p, chunk_rows(p.in_features, p.out_features), residual_step);
}

at::Tensor linear_mse_loss_cuda(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction) {
  const auto parsed = check_inputs(input, linear_weight, target, linear_bias, weight, reduction);
  const c10::cuda::CUDAGuard guard(input.device());
  const auto problem =
      make_problem(input, linear_weight, target, linear_bias, weight, parsed, /*mask=*/{false, false, false, false});
  return parsed == Reduction::None ? loss_per_element(problem, target) : std::get<0>(loss_and_gradients(problem));
}

LossAndGradients linear_mse_loss_grads_cuda(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction,
    GradientMask output_mask) {
  const auto parsed = check_grads_inputs(input, linear_weight, target, linear_bias, weight, reduction, output_mask);
  const c10::cuda::CUDAGuard guard(input.device());
  const auto problem = make_problem(input, linear_weight, target, linear_bias, weight, parsed, output_mask);
  const auto [loss, gradients] = loss_and_gradients(problem);
  return unflatten(loss, gradients, input, target);
}

TORCH_LIBRARY_IMPL(torchintro, CUDA, m) {
  m.impl("linear_mse_loss", linear_mse_loss_cuda);
  m.impl("_linear_mse_loss_grads", linear_mse_loss_grads_cuda);
}

} // namespace
} // namespace torchintro
