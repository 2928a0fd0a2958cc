// The regime of many outputs on a device whose results the host does not read: matrix products over chunks of rows, with one
// residual step of the backend's own between. (The CPU has a loop of its own, which may read, and cuts outputs, too.)
//
// The prediction of a chunk is a product of PyTorch's; the residual step turns it in place into g, adds up loss and bias
// gradient, and two more products make the chunk's gradients. So no N x O temporary exists, whatever N is, and the
// chunk's residual is still in cache when it is used. 3 products of 2 N D O operations; X and the chunk are read twice.
#pragma once

#include "problem.h"

#include <c10/util/FunctionRef.h>

namespace torchintro {

// What a backend does with one chunk of R rows.
struct ResidualChunk {
  at::Tensor prediction; // (R, O) contiguous, input's dtype; overwritten by g where a gradient is wanted
  at::Tensor target; // (R, O), any strides
  at::Tensor weight; // (R, O), any strides; undefined without
  at::Tensor grad_target; // (R, O) contiguous, to be written; undefined if not asked for
  at::Tensor loss_sum; // (), float64: add sum(v r^2)
  at::Tensor bias_sum; // (O), float64: add the sum of g over the rows; undefined if not asked for
  bool wants_residual; // whether g is used afterwards
};

using ResidualStep = c10::function_ref<void(const Problem&, const ResidualChunk&)>;

// Returns the loss and fills the flattened gradients. `chunk_rows` is the backend's: see there for what chose it.
std::tuple<at::Tensor, std::array<at::Tensor, 4>> many_outputs(
    const Problem& problem, int64_t chunk_rows, ResidualStep residual_step);

} // namespace torchintro
