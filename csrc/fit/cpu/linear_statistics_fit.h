#pragma once

#include "fit/cpu/models.h"
#include "fit/fit.h"
#include "fit/linear_moments.h"

namespace torchintro::fit {

// The epochs of linear_statistics_fit, for a checked call.
Losses train_on_moments(const MomentsRun& run);

// The same without validation and without tensors: into `losses` (E, K) goes the loss of each epoch until a model stops.
void train_on_moments(
    const RunSizes& run, const Models<double>& models, const MomentsMemory& moments, double largest, double* losses);

} // namespace torchintro::fit
