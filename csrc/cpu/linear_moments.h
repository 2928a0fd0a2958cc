#pragma once

#include "fit/linear_moments.h"

namespace torchintro::fit {

// _linear_moments on the CPU, without the way through the dispatcher.
LinearMoments linear_moments_cpu(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight);

// The same of rows without weights into memory of the caller's. False, and nothing was done, for what only goes by products.
bool gather_moments_cpu(const at::Tensor& input, const at::Tensor& target, const MomentsMemory& moments);

} // namespace torchintro::fit
