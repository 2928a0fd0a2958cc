#pragma once
#include "fit/fit.h"
namespace torchintro::fit {
Losses composed_rows_run(const RowsRun& run);
}
