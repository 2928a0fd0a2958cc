#pragma once

#include "fit/linear_moments.h"

namespace torchintro::fit {

// _linear_moments on the CPU, without the way through the dispatcher.
LinearMoments linear_moments_cpu(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight);

} // namespace torchintro::fit
