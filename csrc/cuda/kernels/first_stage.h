// Few outputs, the first of two stages: kernels that read X and leave partial sums, which few_outputs.cu adds up.
//
// Three ways to do it, each in a file of its own; few_outputs.cu says which is taken when.
#pragma once

#include "cuda/kernels/few_outputs.h"

namespace torchintro::cuda {

// How many partial sums a way leaves, and how much memory it needs besides.
struct Shares {
  int64_t sums = 0; // of the loss and of each g
  int64_t weight_sums = 0; // of linear_weight's gradient
  size_t scratch_bytes = 0;
};

struct FirstStage {
  double* sums; // [1 + O][shares.sums]: sum(v r^2), then the sums of g (only if linear_bias's gradient is wanted)
  void* weight_sums; // [shares.weight_sums][O][D] accumulator type: sums of g' X; null if not wanted
  void* scratch; // aligned to 256
};

// Rows held in shared memory by the threads that work on them (rows.cu).
bool rows_take(const FewOutputsCall& call);
Shares rows_shares(const FewOutputsCall& call);
cudaError_t rows_stage(const FewOutputsCall& call, const Shares& shares, const FirstStage& stage, cudaStream_t stream);

// Tiles of 16 rows multiplied by tensor cores (tiles.cu).
bool tiles_take(const FewOutputsCall& call);
Shares tiles_shares(const FewOutputsCall& call);
cudaError_t tiles_stage(const FewOutputsCall& call, const Shares& shares, const FirstStage& stage, cudaStream_t stream);

// Rows too long for both: two kernels over chunks that stay in the second-level cache (long_rows.cu).
Shares long_rows_shares(const FewOutputsCall& call);
cudaError_t long_rows_stage(
    const FewOutputsCall& call, const Shares& shares, const FirstStage& stage, cudaStream_t stream);

} // namespace torchintro::cuda
