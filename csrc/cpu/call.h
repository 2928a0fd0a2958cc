// What the CPU's two regimes share: tensors as the kernels see them, and sums over blocks of rows.
#pragma once

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/kernels.h"
#include "problem.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <memory>

namespace torchintro::cpu {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::Float64;
    case at::kFloat:
      return DType::Float32;
    case at::kBFloat16:
      return DType::BFloat16;
    default:
      return DType::Float16;
  }
}

inline Strided<const void> strided(const at::Tensor& matrix) {
  return matrix.defined() ? Strided<const void>{matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1)}
                          : Strided<const void>{};
}

inline void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// The tensor, contiguous and in a dtype; itself if it is, which asking the dispatcher would take longer to find out.
inline at::Tensor contiguous_in(at::ScalarType dtype, const at::Tensor& tensor) {
  return (tensor.scalar_type() == dtype ? tensor : tensor.to(dtype)).contiguous();
}

// residual_factor / S, which on the CPU can simply be read.
inline double residual_scale(const Problem& p) {
  return p.weight_sum.defined() ? p.residual_factor / *p.weight_sum.const_data_ptr<double>() : p.residual_factor;
}

// The loss, in target's dtype, from the sum of v r^2.
inline at::Tensor loss_of(const Problem& p, double squares) {
  const double s = p.weight_sum.defined() ? *p.weight_sum.const_data_ptr<double>() : 1.0;
  auto loss = empty_result({}, p.target.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, loss.scalar_type(), "linear_mse_loss", [&] {
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(p.loss_factor / s * squares);
  });
  return loss;
}

// What a block loop runs on.
struct AtenThreads {
  template <typename Run>
  void operator()(int64_t begin, int64_t end, int64_t grain, const Run& run) const {
    at::parallel_for(begin, end, grain, run);
  }
};

} // namespace torchintro::cpu
