// The regime of many outputs on a device whose results the host does not read: matrix products over chunks of rows, with one
// residual step of the backend's own between. (The CPU has a loop of its own, which may read, and cuts outputs, too.)
//
// A chunk's target less the bias goes into a buffer, and the first product subtracts it from the prediction as it stores
// that: X W' - 1 (T - b) = R, rounded once. The residual step reads R and adds up loss and bias gradient; two more products
// make the chunk's gradients from R itself, with the scale factor in front of the product. Only row or element weights, and
// a target of another dtype than the input's, need a g of its own, which the residual step writes in R's place. So no N x O
// temporary exists, whatever N is, and the chunk's residual is still in cache when it is used. 3 products of 2 N D O
// operations; X is read twice, T once.
#pragma once

#include "problem.h"

#include <c10/util/FunctionRef.h>

namespace torchintro {

// What a backend does with one chunk of R rows.
struct ResidualChunk {
  at::Tensor prediction; // (R, O) contiguous, input's dtype; overwritten by g where `wants_g`
  at::Tensor target; // (R, O), any strides; undefined where `prediction` is the residual already
  at::Tensor weight; // (R, O), any strides; undefined without
  at::Tensor grad_target; // (R, O) contiguous, to be written; undefined if not asked for
  at::Tensor loss_sum; // (), float64: add sum(v r^2)
  at::Tensor bias_sum; // (O), float64: add the sum of g over the rows; undefined if not asked for
  bool wants_g; // whether g is used afterwards
};

using ResidualStep = c10::function_ref<void(const Problem&, const ResidualChunk&)>;

// Returns the loss and fills the flattened gradients. `chunk_rows` is the backend's: see there for what chose it.
std::tuple<at::Tensor, std::array<at::Tensor, 4>> many_outputs(
    const Problem& problem, int64_t chunk_rows, ResidualStep residual_step);

} // namespace torchintro
