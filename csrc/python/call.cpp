// torchintro._call: the operators for Python, without the boxed stack of torch.ops, which takes longer than the whole work of a
// small problem. As torch's own functions are called: the arguments' tensors go straight to the dispatcher, where everything
// that is registered by dispatch key (autograd, autocast, functorch, modes, the profiler) finds the call as ever. What is
// decided above the dispatcher is left to torch.ops: __torch_function__ of a subclass or a mode, torch.jit.trace, and what
// to say about an argument that is no tensor.
#include "linear_mse_loss.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace torchintro {
namespace {

enum Argument {
  kInputArgument,
  kLinearWeightArgument,
  kTargetArgument,
  kLinearBiasArgument,
  kWeightArgument,
  kReduction
};
constexpr Py_ssize_t kArguments = kReduction + 1;

using Operator = at::Tensor(
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const OptionalTensor&,
    const OptionalTensor&,
    std::string_view);

bool is_direct(PyObject* const* args) {
  for (int i = 0; i < kReduction; ++i) {
    const bool optional = i == kLinearBiasArgument || i == kWeightArgument;
    if (!THPVariable_CheckExact(args[i]) && !(optional && args[i] == Py_None)) {
      return false;
    }
  }
  return PyUnicode_Check(args[kReduction]) && !at::impl::torch_function_mode_enabled() &&
      !torch::jit::tracer::isTracing();
}

OptionalTensor optional_tensor(PyObject* object) {
  return object == Py_None ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(object));
}

// linear_mse_loss(input, linear_weight, target, linear_bias, weight, reduction) -> the loss, or None for a call that
// torch.ops must make.
PyObject* linear_mse_loss(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kArguments, "linear_mse_loss: expected ", kArguments, " arguments, but got ", count);
  if (!is_direct(args)) {
    Py_RETURN_NONE;
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torchintro::linear_mse_loss", "").typed<Operator>();
  Py_ssize_t length = 0;
  const char* reduction = PyUnicode_AsUTF8AndSize(args[kReduction], &length);
  if (reduction == nullptr) { // not even text that can be encoded
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  // Owned, not referred to: the first to share a tensor with its Python object, and the last to let go of it, has to hold
  // the interpreter's lock. That is here, where it is held, and not at every copy below, where it would be taken again.
  const at::Tensor input = THPVariable_Unpack(args[kInputArgument]);
  const at::Tensor linear_weight = THPVariable_Unpack(args[kLinearWeightArgument]);
  const at::Tensor target = THPVariable_Unpack(args[kTargetArgument]);
  const auto linear_bias = optional_tensor(args[kLinearBiasArgument]);
  const auto weight = optional_tensor(args[kWeightArgument]);
  at::Tensor loss;
  {
    const pybind11::gil_scoped_release no_gil;
    loss = op.call(
        input, linear_weight, target, linear_bias, weight, std::string_view(reduction, static_cast<size_t>(length)));
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

using FullBatchFit = at::Tensor(
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const OptionalTensor&,
    const at::Tensor&,
    std::string_view,
    at::ArrayRef<double>);

// linear_full_batch_fit(input, target, linear_weight, linear_bias, lr) -> the losses by plain gradient descent, or None for a
// call that torch.ops must make.
PyObject* linear_full_batch_fit(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "linear_full_batch_fit: expected 5 arguments, but got ", count);
  for (int i = 0; i < 5; ++i) {
    if (!THPVariable_CheckExact(args[i]) && !(i == 3 && args[i] == Py_None)) {
      Py_RETURN_NONE;
    }
  }
  if (at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing()) {
    Py_RETURN_NONE;
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torchintro::linear_full_batch_fit", "").typed<FullBatchFit>();
  const at::Tensor input = THPVariable_Unpack(args[0]);
  const at::Tensor target = THPVariable_Unpack(args[1]);
  const at::Tensor linear_weight = THPVariable_Unpack(args[2]);
  const auto linear_bias = optional_tensor(args[3]);
  const at::Tensor lr = THPVariable_Unpack(args[4]);
  at::Tensor losses;
  {
    const pybind11::gil_scoped_release no_gil;
    losses = op.call(input, target, linear_weight, linear_bias, lr, "sgd", {});
  }
  return THPVariable_Wrap(std::move(losses));
  END_HANDLE_TH_ERRORS
}

// A function of this signature is what METH_FASTCALL means; the table's type is that of any other method.
PyMethodDef methods[] = {
    {"linear_mse_loss",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_mse_loss)),
     METH_FASTCALL,
     nullptr},
    {"linear_full_batch_fit",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_full_batch_fit)),
     METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module{
    PyModuleDef_HEAD_INIT,
    "_call",
    "The operators, without torch.ops' boxed stack.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

} // namespace
} // namespace torchintro

PyMODINIT_FUNC PyInit__call() {
  return PyModule_Create(&torchintro::module);
}
