// Shapes and dtypes without data; sizes may be symbolic.
#include "fit/linear_moments.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace torchintro::fit {
namespace {

LinearMoments linear_moments_meta(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight) {
  check_moments_inputs(input, target, weight);
  const auto d = input.sym_size(1), o = target.sym_size(1);
  const auto empty = [options = input.options().dtype(at::kDouble)](c10::SymIntArrayRef sizes) {
    return at::empty_symint(sizes, options);
  };
  return {empty({}), empty({d}), empty({o}), empty({d, d}), empty({d, o}), empty({o})};
}

TORCH_LIBRARY_IMPL(torchintro, Meta, m) {
  m.impl("_linear_moments", linear_moments_meta);
}

} // namespace
} // namespace torchintro::fit
