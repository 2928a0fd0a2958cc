// Autograd: the forward pass computes the loss and, from the same pass over the input, the gradients wanted; the backward
// pass scales them by the upstream gradient. A hand-written Node, because functorch refuses autograd::Function and a
// Python autograd.Function costs more than the whole step of a small problem.
#include "autograd/node.h"
#include "composite/composite.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

namespace torchintro {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr std::array<Gradient, 4> kGradients{kInput, kLinearWeight, kTarget, kLinearBias};

// A dense tensor whose memory may be read and written here and now: no subclass, no wrapper, no mode that records, and no
// tangent that a plain number would lose.
bool is_plain(const at::Tensor& tensor) {
  return !at::isTensorSubclassLike(tensor) && !tensor._is_zerotensor() && !tensor.is_neg() &&
      !tensor._fw_grad(/*level=*/0).defined();
}

// The value of a plain 0-dim CPU tensor: the one case where reading it waits for nothing.
std::optional<double> host_value(const at::Tensor& scalar) {
  if (!scalar.is_cpu() || !is_plain(scalar)) {
    return std::nullopt;
  }
  switch (scalar.scalar_type()) {
    case at::kDouble:
      return *scalar.const_data_ptr<double>();
    case at::kFloat:
      return *scalar.const_data_ptr<float>();
    case at::kBFloat16:
      return *scalar.const_data_ptr<at::BFloat16>();
    case at::kHalf:
      return *scalar.const_data_ptr<at::Half>();
    default:
      return std::nullopt;
  }
}

// gradient * grad_output * unit; `value` is grad_output's, where the host has it. With `reuse` the gradient's memory is the
// caller's to give away.
at::Tensor scaled(
    at::Tensor gradient,
    const at::Tensor& grad_output,
    const std::optional<double>& value,
    const std::optional<Unit<c10::SymInt>>& unit,
    bool reuse) {
  reuse = reuse && is_plain(gradient);
  if (value && gradient.is_cpu()) {
    double factor = *value;
    if (unit) {
      factor *= static_cast<double>(unit->numerator.expect_int()) / static_cast<double>(unit->denominator.expect_int());
    }
    if (reuse && factor == 1.0) {
      return gradient;
    }
    // As a tensor: ATen's multiplication by a Scalar rounds it to the gradient's 16-bit dtype first.
    const auto factor_tensor = at::scalar_tensor(factor, at::kDouble);
    return reuse ? gradient.mul_(factor_tensor) : at::mul(gradient, factor_tensor);
  }
  auto factor = grad_output;
  if (gradient.element_size() == 2) {
    // One dimension, so that type promotion multiplies in float32: a float16 factor overflows at common loss scales.
    factor = factor.to(at::kFloat).reshape({1});
    if (unit && unit->numerator.maybe_as_int() != 1) {
      factor = at::mul(factor, at::Scalar(unit->numerator));
    }
    if (unit && unit->denominator.maybe_as_int() != 1) {
      factor = at::div(factor, at::Scalar(unit->denominator));
    }
  }
  if (reuse) {
    return gradient.mul_(factor);
  }
  return at::mul(gradient, factor).to(gradient.scalar_type());
}

// The fast backward, a function of values alone, so that compiled autograd can carry them.
variable_list scale_gradients(
    const at::Tensor& grad_output,
    std::array<at::Tensor, 4> gradients,
    const c10::SymInt& rows,
    const c10::SymInt& out_features,
    Reduction reduction,
    bool reuse) {
  const auto value = host_value(grad_output);
  reuse = reuse && (value || is_plain(grad_output));
  variable_list result(kGradients.size());
  for (const auto index : kGradients) {
    auto& gradient = gradients[index];
    if (!gradient.defined()) {
      continue;
    }
    std::optional<Unit<c10::SymInt>> unit;
    if (has_gradient_unit(gradient.scalar_type())) {
      unit = gradient_unit(index, reduction, rows, out_features);
    }
    result[index] = scaled(std::move(gradient), grad_output, value, unit, reuse);
  }
  return result;
}

variable_list scale_gradients_packed(const variable_list& inputs, const std::vector<c10::IValue>& args);

struct LinearMSELossBackward : public torch::autograd::Node {
  SavedVariable input, linear_weight, target, linear_bias, weight;
  // Those in the mask, in its order. Room for all four would make a Node of more than 1032 bytes, and those are not among
  // the small pieces of memory that malloc keeps at hand for each thread.
  std::vector<SavedVariable> gradients;
  // For the units of the gradients. Not read off the saved input and weight: those refuse to be unpacked after a change in
  // place, which does no harm to gradients that are computed already.
  c10::SymInt rows, out_features;
  GradientMask mask{};
  Reduction reduction = Reduction::Mean;
  bool has_hooks = false; // saved_tensors_hooks were set: what is unpacked may belong to the user

  LinearMSELossBackward(
      const at::Tensor& input,
      const at::Tensor& linear_weight,
      const at::Tensor& target,
      const OptionalTensor& linear_bias,
      const OptionalTensor& weight,
      const LossAndGradients& computed,
      Reduction reduction)
      : input(input, /*is_output=*/false),
        linear_weight(linear_weight, /*is_output=*/false),
        target(target, /*is_output=*/false),
        linear_bias(linear_bias, /*is_output=*/false),
        weight(weight, /*is_output=*/false),
        rows(row_count(input)),
        out_features(linear_weight.sym_size(0)),
        reduction(reduction),
        has_hooks(this->input.has_hooks()) {
    gradients.reserve(kGradients.size());
    const auto save = [this](Gradient index, const OptionalTensor& gradient) {
      mask[index] = gradient.has_value();
      if (gradient) {
        gradients.emplace_back(*gradient, /*is_output=*/false);
      }
    };
    save(kInput, std::get<1>(computed));
    save(kLinearWeight, std::get<2>(computed));
    save(kTarget, std::get<3>(computed));
    save(kLinearBias, std::get<4>(computed));
  }

  std::string name() const override {
    return "LinearMSELossBackward";
  }

  variable_list apply(variable_list&& grad_outputs) override {
    const auto& grad_output = grad_outputs[0];
    if (!grad_output.defined()) {
      return variable_list(kGradients.size());
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    GradientMask wanted;
    for (const auto index : kGradients) {
      wanted[index] = mask[index] && task_should_compute_output(index);
    }

    if (at::GradMode::is_enabled()) { // create_graph: the gradients as functions of the inputs
      const auto optional = [](const SavedVariable& saved) {
        const auto tensor = saved.unpack();
        return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
      };
      const auto result = decomposed_gradients(
          grad_output,
          input.unpack(),
          linear_weight.unpack(),
          target.unpack(),
          optional(linear_bias),
          optional(weight),
          reduction,
          wanted);
      return {result.begin(), result.end()};
    }

    std::array<at::Tensor, 4> unpacked;
    auto saved = gradients.cbegin();
    for (const auto index : kGradients) {
      if (wanted[index]) {
        unpacked[index] = saved->unpack();
      }
      saved += mask[index];
    }
    // A graph that is kept may run again: its saved gradients are then neither changed nor given away.
    const bool reuse = !has_hooks && !torch::autograd::get_current_graph_task_keep_graph();
    return scale_gradients(grad_output, std::move(unpacked), rows, out_features, reduction, reuse);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&input, &linear_weight, &target, &linear_bias, &weight}) {
      saved->reset_data();
    }
    for (auto& saved : gradients) {
      saved.reset_data();
    }
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(static_cast<int64_t>(reduction));
    args.collect(rows);
    args.collect(out_features);
    for (const bool saved : mask) {
      args.cond(saved);
    }
    for (const auto& gradient : gradients) {
      args.collect(gradient, /*is_output=*/false);
    }
  }

  variable_list apply_with_saved(
      const variable_list& grad_outputs, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    using torch::dynamo::autograd::IValuePacker;
    const auto for_saved = [&](const auto& visit) {
      visit(rows);
      visit(out_features);
      for (auto& gradient : gradients) {
        visit(gradient);
      }
    };
    for_saved([&](auto& value) { saved.before(value); });

    variable_list tensors;
    std::vector<bool> wanted;
    auto gradient = gradients.cbegin();
    for (const auto index : kGradients) {
      wanted.push_back(mask[index] && task_should_compute_output(index));
      if (wanted.back()) {
        tensors.push_back(gradient->unpack());
      }
      gradient += mask[index];
    }
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack(static_cast<int64_t>(reduction));
    packed.pack(rows);
    packed.pack(out_features);
    packed.pack(wanted);
    packed.pack(tensors);
    const auto args = packed.vec();
    std::vector<at::TypePtr> schema;
    for (const auto& value : args) {
      schema.emplace_back(value.type());
    }
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const auto function = compiler->bind_function(
        saved.get_py_compiler(),
        name(),
        scale_gradients_packed,
        schema,
        /*is_custom_function=*/true,
        /*is_traceable=*/true);
    auto result = compiler->call_function(
        saved.get_py_compiler(),
        "apply_functional",
        function,
        grad_outputs,
        args,
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges())));

    for_saved([&](auto& value) { saved.after(value); });
    return result;
  }
};

variable_list scale_gradients_packed(const variable_list& inputs, const std::vector<c10::IValue>& args) {
  torch::dynamo::autograd::PackedArgs packed(args);
  const auto reduction = static_cast<Reduction>(packed.unpack<int64_t>());
  const auto rows = packed.unpack<c10::SymInt>();
  const auto out_features = packed.unpack<c10::SymInt>();
  const auto wanted = packed.unpack<std::vector<bool>>();
  const auto tensors = packed.unpack<variable_list>();
  if (!inputs[0].defined()) {
    return variable_list(kGradients.size());
  }
  std::array<at::Tensor, 4> gradients;
  size_t next = 0;
  for (const auto index : kGradients) {
    if (wanted[index]) {
      gradients[index] = tensors[next++];
    }
  }
  return scale_gradients(inputs[0], std::move(gradients), rows, out_features, reduction, /*reuse=*/false);
}

// Whether a fused kernel would lose something that the decomposition keeps.
bool must_decompose(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight) {
  // A functorch transform: its interpreter differentiates operators, not Nodes.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode)) {
    return true;
  }
  bool subclass = false;
  for (const auto* tensor : {&input, &linear_weight, &target}) {
    // A tangent of forward-mode differentiation.
    if (tensor->_fw_grad(/*level=*/0).defined()) {
      return true;
    }
    subclass = subclass || tensor->key_set().has(c10::DispatchKey::Python);
  }
  for (const auto* tensor : {&linear_bias, &weight}) {
    if (torch::autograd::isFwGradDefined(*tensor)) {
      return true;
    }
    subclass = subclass || (*tensor && (*tensor)->key_set().has(c10::DispatchKey::Python));
  }
  if (!subclass) {
    return false;
  }
  // A tensor subclass that is not the tracer's own knows ATen's operators, not ours.
  using Modes = c10::impl::TorchDispatchModeTLS;
  using Key = c10::impl::TorchDispatchModeKey;
  return !Modes::get_mode(Key::FAKE) && !Modes::get_mode(Key::FUNCTIONAL) && !Modes::get_mode(Key::PROXY);
}

at::Tensor linear_mse_loss_autograd(
    c10::DispatchKeySet keys,
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction) {
  static const auto loss_op = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("torchintro::linear_mse_loss", "")
                                  .typed<decltype(linear_mse_loss_composite)>();
  static const auto grads_op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("torchintro::_linear_mse_loss_grads", "")
                                   .typed<decltype(linear_mse_loss_grads_composite)>();

  const bool requires_grad = torch::autograd::compute_requires_grad(input, linear_weight, target, linear_bias);
  const bool is_mean = reduction == "mean";
  // A mean over few weights that are not zero is large before the upstream gradient is known, for float16 too large; how
  // large, only the device knows.
  const bool may_overflow =
      is_mean && weight && (input.scalar_type() == at::kHalf || target.scalar_type() == at::kHalf);
  if ((requires_grad && (reduction == "none" || may_overflow)) ||
      must_decompose(input, linear_weight, target, linear_bias, weight)) {
    return linear_mse_loss_composite(input, linear_weight, target, linear_bias, weight, reduction);
  }
  const auto below = keys & c10::after_autograd_keyset;
  if (!requires_grad) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return loss_op.redispatch(below, input, linear_weight, target, linear_bias, weight, reduction);
  }

  const GradientMask mask{
      input.requires_grad(),
      linear_weight.requires_grad(),
      target.requires_grad(),
      linear_bias && linear_bias->requires_grad()};
  auto result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return grads_op.redispatch(below, input, linear_weight, target, linear_bias, weight, reduction, mask);
  }();

  auto node = make_node<LinearMSELossBackward>(
      input, linear_weight, target, linear_bias, weight, result, is_mean ? Reduction::Mean : Reduction::Sum);
  node->set_next_edges(torch::autograd::collect_next_edges(input, linear_weight, target, linear_bias));
  auto loss = std::move(std::get<0>(result));
  torch::autograd::set_history(loss, node);
  return loss;
}

TORCH_LIBRARY_IMPL(torchintro, Autograd, m) {
  m.impl("linear_mse_loss", linear_mse_loss_autograd);
}

} // namespace
} // namespace torchintro
