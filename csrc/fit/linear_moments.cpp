// The schema of _linear_moments and the check of its arguments.
#include "fit/linear_moments.h"

#include <torch/library.h>

#include <sstream>
#include <string>

// As in linear_mse_loss.cpp: a condition on sizes that may be symbolic.
#define CHECK_SHAPE(cond, ...) TORCH_CHECK_VALUE((cond).expect_true(__FILE__, __LINE__), __VA_ARGS__)

namespace torchintro::fit {
namespace {

constexpr const char* kOperator = "_linear_moments";

std::string shape_text(c10::SymIntArrayRef sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i > 0 ? ", " : "") << sizes[i];
  }
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

// clang-format off: one line for the condition, one for the sentence.
void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided,
      kOperator, ": ", name, " must be a dense (strided) tensor, but got layout ", tensor.layout());
  TORCH_CHECK_VALUE(tensor.device() == input.device(),
      kOperator, ": ", name, " must be on input's device, ", input.device(), ", but got ", tensor.device());
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      kOperator, ": ", name, " must have dtype float64, float32, bfloat16 or float16, but got ", dtype);
}

} // namespace

void check_moments_inputs(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight) {
  check_tensor("input", input, input);
  check_tensor("target", target, input);
  TORCH_CHECK_VALUE(input.dim() == 2,
      kOperator, ": input must have shape (N, in_features), but got ", shape_text(input.sym_sizes()));
  const auto rows = input.sym_size(0);
  TORCH_CHECK_VALUE(target.dim() == 2,
      kOperator, ": target must have shape (", rows, ", out_features), but got ", shape_text(target.sym_sizes()));
  CHECK_SHAPE(target.sym_size(0).sym_eq(rows),
      kOperator, ": target must have ", rows, " rows, as input has, but got shape ", shape_text(target.sym_sizes()));
  if (weight) {
    check_tensor("weight", *weight, input);
    TORCH_CHECK_VALUE(weight->dim() == 1,
        kOperator, ": weight must have shape (", rows, ",), one per row, but got ", shape_text(weight->sym_sizes()));
    CHECK_SHAPE(weight->sym_size(0).sym_eq(rows),
        kOperator, ": weight must have shape (", rows, ",), one per row, but got ", shape_text(weight->sym_sizes()));
  }
}
// clang-format on

TORCH_LIBRARY_FRAGMENT(torchintro, m) {
  m.def(
      "_linear_moments(Tensor input, Tensor target, Tensor? weight=None) -> "
      "(Tensor count, Tensor mean_x, Tensor mean_y, Tensor sxx, Tensor sxy, Tensor syy)",
      {at::Tag::pt2_compliant_tag});
}

} // namespace torchintro::fit
