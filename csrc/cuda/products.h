// Matrix products that ATen has no operator for.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchintro::cuda {

// sum = alpha a' b + beta sum, added up in float32, on the current stream: sum (O, D) float32 and contiguous; a (R, O) and
// b (R, D) bfloat16 or float16. (ATen's products into float32 do not take float32 to be added to in all releases of torch.)
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b, double alpha, double beta);

} // namespace torchintro::cuda
