#include "cuda/products.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/Exceptions.h>
#include <cublas_v2.h>

#include <algorithm>
#include <cstdint>

namespace torchintro::cuda {
namespace {

// A matrix with its rows one after the other, and how far apart they are, at least a row.
struct RowMajor {
  at::Tensor tensor;
  int stride;
};

RowMajor row_major(const at::Tensor& matrix) {
  const auto tensor = matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1) && matrix.stride(0) <= INT32_MAX
      ? matrix
      : matrix.contiguous();
  return {tensor, static_cast<int>(std::max<int64_t>(tensor.stride(0), tensor.size(1)))};
}

} // namespace

void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, double alpha, double beta) {
  TORCH_INTERNAL_ASSERT_DEBUG_ONLY(sum.is_contiguous() && sum.scalar_type() == at::kFloat);
  if (sum.numel() == 0) {
    return;
  }
  const auto left = row_major(a);
  const auto right = row_major(b);
  const auto type = a.scalar_type() == at::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  const auto alpha_float = static_cast<float>(alpha);
  const auto beta_float = static_cast<float>(beta);
  // cuBLAS reads by columns: it sees b' (D, R) and a' (O, R), and multiplies b' by the transposed a' into sum' (D, O).
  TORCH_CUDABLAS_CHECK(cublasGemmEx(
      at::cuda::getCurrentCUDABlasHandle(),
      CUBLAS_OP_N,
      CUBLAS_OP_T,
      static_cast<int>(sum.size(1)),
      static_cast<int>(sum.size(0)),
      static_cast<int>(a.size(0)),
      &alpha_float,
      right.tensor.const_data_ptr(),
      type,
      right.stride,
      left.tensor.const_data_ptr(),
      type,
      left.stride,
      &beta_float,
      sum.mutable_data_ptr<float>(),
      CUDA_R_32F,
      static_cast<int>(sum.size(1)),
      CUBLAS_COMPUTE_32F,
      CUBLAS_GEMM_DEFAULT));
}

} // namespace torchintro::cuda
