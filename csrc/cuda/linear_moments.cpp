// The CUDA key of _linear_moments: cuBLAS's float64 products. Everything is enqueued on the current stream of input's device,
// and nothing waits for it.
#include "fit/linear_moments.h"

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace torchintro::fit {
namespace {

LinearMoments linear_moments_cuda(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight) {
  check_moments_inputs(input, target, weight);
  const c10::cuda::CUDAGuard guard(input.device());
  return moments_by_products(input, target, weight);
}

TORCH_LIBRARY_IMPL(torchintro, CUDA, m) {
  m.impl("_linear_moments", linear_moments_cuda);
}

} // namespace
} // namespace torchintro::fit
