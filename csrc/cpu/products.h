// The matrix products of the many-outputs regime on the CPU: PyTorch's, by the route that is faster on this processor.
//
//   prediction       (R, Q) = x w'     x: (R, D)  w: (Q, D)
//   input gradient   (R, D) = g w      g: (R, Q)
//   weight gradient  (Q, D) = g' x
//
// Called from one thread a product is computed by all of them; inside at::parallel_for by the one that called.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchintro::cpu {

// Into `buffer`, (R, Q) contiguous, or into memory of its own: what is returned is contiguous. `linear_bias` (Q), which may
// be undefined, is added.
at::Tensor product_with_transposed(
    const at::Tensor& buffer, const at::Tensor& x, const at::Tensor& w, const at::Tensor& linear_bias);

// out = factor * a b, or added to `out`. Without `add`, and where `whole`, `out` may become another tensor.
void product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double factor, bool add, bool whole);

// sum += g' x with g (R, Q) contiguous and x (R, D) of one 16-bit dtype, and sum (Q, D) contiguous in float32, into which
// nothing is rounded on the way: PyTorch's own products round their result to the operands' dtype.
void add_wide_product(const at::Tensor& sum, const at::Tensor& g, const at::Tensor& x);

} // namespace torchintro::cpu
