// The regime of many outputs on the CPU: matrix products over tiles of rows and outputs, with the residual kernel between.
//
// A tile's prediction is a product of PyTorch's; the residual kernel turns it in place into g while it is in cache and adds
// up loss and bias gradient; two more products add to the gradients. No N x O temporary exists, whatever N and O are. 3
// products of 2 N D O operations; the input is read twice, the target once.
#pragma once

#include "problem.h"

namespace torchintro::cpu {

std::tuple<at::Tensor, std::array<at::Tensor, 4>> many_outputs(const Problem& problem);

} // namespace torchintro::cpu
