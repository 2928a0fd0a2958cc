// linear_mse_fit made of PyTorch's own operators: for what the kernels do not take, and their oracle.
#pragma once

#include "fit/fit.h"

namespace torchintro::fit {

// Runs a call on the device that its tensors are on. Nothing waits for the device until the results are read back, once.
//
// An update costs, for a batch of n rows: the products X W' and R'X over the weights of all models side by side (each reads
// the batch once, 2 n K O D operations), three passes over the n K O residuals, and 5 to 20 over the K (O D + O) parameters.
Losses decomposed_rows_run(const RowsRun& run);

} // namespace torchintro::fit
