#pragma once

#include "fit/fit.h"

namespace torchintro::fit {

// The epochs of linear_statistics_fit, for a checked call.
Losses train_on_moments(const MomentsRun& run);

} // namespace torchintro::fit
