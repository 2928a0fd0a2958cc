// Reduction::None, for every backend.
#pragma once

#include "problem.h"

namespace torchintro {

// The loss is as large as the prediction, so it is made in its place. Returns it in the shape and dtype of `target`, the
// unflattened one.
at::Tensor loss_per_element(const Problem& problem, const at::Tensor& target);

// The input of a 16-bit product on the CPU, whose rows lie side by side. Where they do not and have an odd length, torch 2.13
// on a processor with AMX multiplies what lies between them by zero, and NaN stays NaN.
at::Tensor without_gaps(const at::Tensor& input);

} // namespace torchintro
