// The operators' schemas, the check of their arguments, and their decomposition to ATen.
#include "linear_mse_loss.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/div.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <c10/core/SymBool.h>
#include <torch/library.h>

#include <sstream>
#include <string>

// A condition on sizes, which may be symbolic: a guard or a run-time assertion then, as with TORCH_SYM_CHECK, but a ValueError.
#define CHECK_SHAPE(cond, ...) TORCH_CHECK_VALUE((cond).expect_true(__FILE__, __LINE__), __VA_ARGS__)

namespace torchintro {
namespace {

constexpr const char* kOperator = "linear_mse_loss";
constexpr const char* kGradsOperator = "_linear_mse_loss_grads";

// "(8, 1)", "(8,)", "()": as Python prints a tuple.
std::string shape_text(c10::SymIntArrayRef sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i > 0 ? ", " : "") << sizes[i];
  }
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

std::string dtype_text(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kBool:
      return "bool";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    default:
      return c10::toString(tensor.scalar_type());
  }
}

bool is_16_bit(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}

// Whether `sizes` are `leading` and then, if given, `last`. Symbolic sizes become guards, or run-time assertions.
c10::SymBool same_shape(c10::SymIntArrayRef sizes, c10::SymIntArrayRef leading, const c10::SymInt* last) {
  if (sizes.size() != leading.size() + (last != nullptr)) {
    return false;
  }
  c10::SymBool same = true;
  for (size_t i = 0; i < leading.size(); ++i) {
    same = same.sym_and(sizes[i].sym_eq(leading[i]));
  }
  return last == nullptr ? same : same.sym_and(sizes.back().sym_eq(*last));
}

// clang-format off: one line for the condition, one for the sentence, reads best in the checks.
void check_layout_and_device(const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK_TYPE(tensor.defined(), kOperator, ": ", name, " must be a tensor, but got an undefined one");
  TORCH_CHECK_TYPE(
      tensor.layout() == at::kStrided,
      kOperator, ": ", name, " must be a dense (strided) tensor, but got layout ", tensor.layout());
  TORCH_CHECK_VALUE(
      tensor.device() == input.device(),
      kOperator, ": ", name, " must be on input's device, ", input.device(), ", but got ", tensor.device());
}

} // namespace

Reduction check_inputs(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction) {
  const auto parsed = reduction == "mean" ? Reduction::Mean : reduction == "sum" ? Reduction::Sum : Reduction::None;
  TORCH_CHECK_VALUE(parsed != Reduction::None || reduction == "none",
      kOperator, ": reduction must be 'mean', 'sum' or 'none', but got '", reduction, "'");

  check_layout_and_device("input", input, input);
  check_layout_and_device("linear_weight", linear_weight, input);
  check_layout_and_device("target", target, input);
  if (linear_bias) check_layout_and_device("linear_bias", *linear_bias, input);
  if (weight) check_layout_and_device("weight", *weight, input);

  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || is_16_bit(dtype),
      kOperator, ": input must have dtype float64, float32, bfloat16 or float16, but got ", dtype_text(input));
  TORCH_CHECK_TYPE(linear_weight.scalar_type() == dtype,
      kOperator, ": linear_weight must have input's dtype, ", dtype_text(input), ", but got ", dtype_text(linear_weight));
  TORCH_CHECK_TYPE(!linear_bias || linear_bias->scalar_type() == dtype,
      kOperator, ": linear_bias must have input's dtype, ", dtype_text(input), ", but got ", dtype_text(*linear_bias));
  TORCH_CHECK_TYPE(target.scalar_type() == dtype || (is_16_bit(dtype) && target.scalar_type() == at::kFloat),
      kOperator, ": target must have input's dtype, ", dtype_text(input), is_16_bit(dtype) ? ", or float32, but got " : ", but got ",
      dtype_text(target));
  TORCH_CHECK_TYPE(!weight || weight->scalar_type() == target.scalar_type(),
      kOperator, ": weight must have target's dtype, ", dtype_text(target), ", but got ", dtype_text(*weight));

  const auto sizes = input.sym_sizes();
  const auto weight_sizes = linear_weight.sym_sizes();
  TORCH_CHECK_VALUE(!sizes.empty(),
      kOperator, ": input must have shape (*, in_features), but got ()");
  TORCH_CHECK_VALUE(weight_sizes.size() == 2,
      kOperator, ": linear_weight must have shape (out_features, in_features), but got ", shape_text(weight_sizes));
  CHECK_SHAPE(weight_sizes[1].sym_eq(sizes.back()),
      kOperator, ": linear_weight must have shape (out_features, ", sizes.back(), ") to match input ", shape_text(sizes),
      ", but got ", shape_text(weight_sizes));

  const auto leading = sizes.slice(0, sizes.size() - 1);
  const auto expected = [&] { // called where a sentence is made: it allocates
    auto shape = leading.vec();
    shape.push_back(weight_sizes[0]);
    return shape_text(shape);
  };
  CHECK_SHAPE(same_shape(target.sym_sizes(), leading, &weight_sizes[0]),
      kOperator, ": target must have shape ", expected(), ", the prediction's, but got ", shape_text(target.sym_sizes()));
  if (linear_bias) {
    CHECK_SHAPE(same_shape(linear_bias->sym_sizes(), weight_sizes.slice(0, 1), nullptr),
        kOperator, ": linear_bias must have shape (", weight_sizes[0], ",), one per output, but got ",
        shape_text(linear_bias->sym_sizes()));
  }
  if (weight) {
    CHECK_SHAPE(
        weight->dim() == target.dim() ? same_shape(weight->sym_sizes(), leading, &weight_sizes[0])
                                      : same_shape(weight->sym_sizes(), leading, nullptr),
        kOperator, ": weight must have shape ", expected(), " (per element) or ", shape_text(leading),
        " (per row), but got ", shape_text(weight->sym_sizes()));
    TORCH_CHECK_VALUE(!(weight->requires_grad() && at::GradMode::is_enabled()),
        kOperator, ": weight must not require a gradient (it has none), but got one with requires_grad=True; pass weight.detach()");
  }
  return parsed;
}
// clang-format on

Reduction check_grads_inputs(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction,
    const GradientMask& output_mask) {
  const auto parsed = check_inputs(input, linear_weight, target, linear_bias, weight, reduction);
  TORCH_CHECK_VALUE(
      parsed != Reduction::None, kGradsOperator, ": reduction must be 'mean' or 'sum', but got '", reduction, "'");
  TORCH_CHECK_VALUE(
      linear_bias || !output_mask[kLinearBias],
      kGradsOperator,
      ": output_mask[3] must be False without a linear_bias, but got True");
  return parsed;
}

namespace {

// P - T in at least float32: squares and sums of 16-bit residuals would overflow or drown in rounding.
at::Tensor residual(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias) {
  auto prediction = at::linear(input, linear_weight, linear_bias);
  if (is_16_bit(prediction.scalar_type())) {
    prediction = prediction.to(at::kFloat);
  }
  return at::sub(prediction, target);
}

// The weight, as a factor of the residual: (*, O) or (*, 1), in the residual's dtype.
at::Tensor weight_factor(const at::Tensor& weight, const at::Tensor& residual) {
  return (weight.dim() < residual.dim() ? weight.unsqueeze(-1) : weight).to(residual.scalar_type());
}

// What "mean" divides a weighted sum by: the weights' sum over all N x O elements.
at::Tensor weight_sum(const at::Tensor& factor, const at::Tensor& residual) {
  return at::sum(factor.expand_symint(residual.sym_sizes()));
}

} // namespace

c10::SymInt row_count(const at::Tensor& input) {
  c10::SymInt rows = 1; // not numel / D, which an input without features does not have
  for (const auto& size : input.sym_sizes().slice(0, input.dim() - 1)) {
    rows *= size;
  }
  return rows;
}

at::Tensor decomposed_loss(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    Reduction reduction) {
  const auto r = residual(input, linear_weight, target, linear_bias);
  auto loss = at::mul(r, r);
  at::Tensor factor;
  if (weight) {
    factor = weight_factor(*weight, r);
    loss = at::mul(loss, factor);
  }
  if (reduction == Reduction::Mean) {
    loss = weight ? at::div(at::sum(loss), weight_sum(factor, r)) : loss.mean();
  } else if (reduction == Reduction::Sum) {
    loss = at::sum(loss);
  }
  return loss.to(target.scalar_type());
}

std::array<at::Tensor, 4> decomposed_gradients(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    Reduction reduction,
    const GradientMask& output_mask) {
  TORCH_INTERNAL_ASSERT(reduction != Reduction::None);
  const auto r = residual(input, linear_weight, target, linear_bias);
  auto g = at::mul(r, 2);
  if (weight) {
    const auto factor = weight_factor(*weight, r);
    g = at::mul(g, factor);
    if (reduction == Reduction::Mean) {
      g = at::div(g, weight_sum(factor, r));
    }
  } else if (reduction == Reduction::Mean) {
    g = at::div(g, at::Scalar(r.sym_numel()));
  }
  if (grad_output.defined()) {
    g = at::mul(g, grad_output.to(g.scalar_type()));
  }

  std::array<at::Tensor, 4> gradients;
  if (output_mask[kTarget]) {
    gradients[kTarget] = g.neg().to(target.scalar_type());
  }
  const auto rows = row_count(input);
  const auto outputs = linear_weight.sym_size(0);
  if (output_mask[kLinearBias]) {
    gradients[kLinearBias] = g.reshape_symint({rows, outputs}).sum(0).to(linear_bias->scalar_type());
  }
  g = g.to(input.scalar_type());
  if (output_mask[kInput]) {
    gradients[kInput] = at::matmul(g, linear_weight);
  }
  if (output_mask[kLinearWeight]) {
    gradients[kLinearWeight] =
        at::matmul(g.reshape_symint({rows, outputs}).t(), input.reshape_symint({rows, input.sym_size(-1)}));
  }
  return gradients;
}

TORCH_LIBRARY(torchintro, m) {
  m.def(
      "linear_mse_loss(Tensor input, Tensor linear_weight, Tensor target, *, Tensor? linear_bias=None, "
      "Tensor? weight=None, str reduction=\"mean\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_mse_loss_grads(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
      "str reduction, bool[4] output_mask) -> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
  // The same two as compositions, for a tensor subclass's rule (DTensor's) to fall back on: see composite/.
  m.def(
      "_linear_mse_loss_decomposed(Tensor input, Tensor linear_weight, Tensor target, *, Tensor? linear_bias=None, "
      "Tensor? weight=None, str reduction=\"mean\") -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_mse_loss_grads_decomposed(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
      "Tensor? weight, str reduction, bool[4] output_mask) -> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?)",
      {at::Tag::pt2_compliant_tag});
}

} // namespace torchintro
