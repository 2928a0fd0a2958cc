#include "problem.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

namespace torchintro {
namespace {

constexpr int64_t kSumElements = int64_t{1} << 20;

at::Tensor as_matrix(const at::Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 ? tensor : tensor.reshape({rows, columns});
}

} // namespace

Problem make_problem(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    Reduction reduction,
    const GradientMask& mask) {
  Problem p;
  p.in_features = linear_weight.size(1);
  p.out_features = linear_weight.size(0);
  p.rows = row_count(input).expect_int();
  p.input = as_matrix(input, p.rows, p.in_features);
  p.linear_weight = linear_weight;
  p.target = as_matrix(target, p.rows, p.out_features);
  if (linear_bias) {
    p.linear_bias = *linear_bias;
  }
  if (weight) {
    p.weight = weight->dim() == target.dim() ? as_matrix(*weight, p.rows, p.out_features)
                                             : weight->reshape({p.rows, 1}).expand({p.rows, p.out_features});
  }
  p.reduction = reduction;
  p.mask = mask;

  const bool mean = reduction == Reduction::Mean;
  const double count = static_cast<double>(p.rows) * static_cast<double>(p.out_features);
  if (mean && weight) {
    // On the CPU at::sum to another dtype copies its argument to that dtype first: no more than a piece of it at a time.
    const int64_t rows_at_once = std::max<int64_t>(1, kSumElements / std::max<int64_t>(1, p.out_features));
    const int64_t piece = p.weight.is_cpu() ? rows_at_once : std::max<int64_t>(1, p.rows);
    p.weight_sum = at::zeros({}, p.weight.options().dtype(at::kDouble));
    for (int64_t begin = 0; begin < p.rows; begin += piece) {
      p.weight_sum.add_(at::sum(p.weight.narrow(0, begin, std::min(piece, p.rows - begin)), at::kDouble));
    }
  }
  p.loss_factor = mean && !weight ? 1.0 / count : 1.0;

  const auto unit = [&](const at::Tensor& of, Gradient gradient) {
    if (!has_gradient_unit(gradient_dtype(gradient, of.scalar_type()))) {
      return 1.0;
    }
    const auto quotient = gradient_unit<int64_t>(gradient, reduction, p.rows, p.out_features);
    return static_cast<double>(quotient.numerator) / static_cast<double>(quotient.denominator);
  };
  const double residual_unit = unit(input, kTarget); // g has input's dtype, and target's gradient but for its sign
  p.residual_factor = 2.0 * p.loss_factor / residual_unit;
  p.weight_gradient_factor = residual_unit;
  p.target_gradient_factor = -residual_unit / unit(target, kTarget);
  p.input_gradient_factor = residual_unit / unit(input, kInput);
  return p;
}

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (options.device().is_cpu()) {
    return at::detail::empty_cpu(sizes, c10::typeMetaToScalarType(options.dtype()));
  }
  return at::empty(sizes, options);
}

std::array<at::Tensor, 4> empty_gradients(
    const Problem& p, at::Tensor (*empty)(at::IntArrayRef, const at::TensorOptions&)) {
  std::array<at::Tensor, 4> gradients;
  const auto make = [&](Gradient gradient, at::IntArrayRef sizes, const at::Tensor& of) {
    if (p.mask[gradient]) {
      gradients[gradient] = empty(sizes, of.options().dtype(gradient_dtype(gradient, of.scalar_type())));
    }
  };
  make(kInput, {p.rows, p.in_features}, p.input);
  make(kLinearWeight, {p.out_features, p.in_features}, p.input);
  make(kTarget, {p.rows, p.out_features}, p.target);
  make(kLinearBias, {p.out_features}, p.input);
  return gradients;
}

std::tuple<at::Tensor, std::array<at::Tensor, 4>> results_of_nothing(const Problem& p) {
  auto gradients = empty_gradients(p);
  for (auto& gradient : gradients) {
    if (gradient.defined()) {
      gradient.zero_();
    }
  }
  const double loss = p.reduction == Reduction::Mean ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  return {at::full({}, loss, p.target.options()), gradients};
}

LossAndGradients unflatten(
    at::Tensor loss, std::array<at::Tensor, 4> gradients, const at::Tensor& input, const at::Tensor& target) {
  const auto shaped = [&gradients](Gradient index, const at::Tensor* like) -> OptionalTensor {
    auto& gradient = gradients[index];
    if (!gradient.defined()) {
      return std::nullopt;
    }
    return like == nullptr || gradient.dim() == like->dim() ? std::move(gradient) : gradient.view(like->sizes());
  };
  return {
      std::move(loss),
      shaped(kInput, &input),
      shaped(kLinearWeight, nullptr),
      shaped(kTarget, &target),
      shaped(kLinearBias, nullptr)};
}

} // namespace torchintro
