// The CPU's part of the regime of many outputs: what is done with a chunk's prediction, and how long a chunk is.
#pragma once

#include "many_outputs.h"

namespace torchintro::cpu {

// Rows of a chunk.
int64_t chunk_rows(const Problem& problem);

void residual_step(const Problem& problem, const ResidualChunk& chunk);

} // namespace torchintro::cpu
