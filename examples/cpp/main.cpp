// torchintro from C++: the operator and a TorchScript module that uses it, trained with no Python in the process.
//
//   python examples/torchscript.py criterion.pt          # once, in Python: exports the module
//
//   TORCH=$(python -c 'import torch; print(torch.__path__[0])')
//   LINK="-L$TORCH/lib -Wl,-rpath,$TORCH/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl"
//   g++ -std=c++20 -O1 examples/cpp/main.cpp -o example -I$TORCH/include $LINK
//   ./example "$(python -c 'import torchintro; print(torchintro.library_path())')" criterion.pt
//
// or with the CMakeLists.txt beside this file. The operator library holds no Python symbols, so any program that links
// libtorch can load it: dlopen runs its registrations, after which the dispatcher, and any TorchScript module, finds the
// operators by name. (A program may link it instead: the registrations run just the same.)
//
// Headers: torch/script.h would do, but is twice as slow to compile as the few below.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/zeros.h>
#include <dlfcn.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace {

constexpr int kSteps = 5;
constexpr double kLearningRate = 0.5;

// One step of plain gradient descent.
void step(const std::vector<at::Tensor>& parameters) {
  const at::NoGradGuard no_grad;
  for (at::Tensor parameter : parameters) {
    parameter.sub_(parameter.grad(), kLearningRate);
    parameter.mutable_grad().zero_();
  }
}

void print(const char* what, int index, const at::Tensor& loss) {
  std::printf("%s %d %.9g\n", what, index, loss.item<double>());
}

// (a) A module written in Python and exported by TorchScript: forward, backward, step.
void train_module(const std::string& path, const at::Tensor& x, const at::Tensor& y) {
  torch::jit::Module criterion = torch::jit::load(path);
  std::vector<at::Tensor> parameters;
  for (const at::Tensor& parameter : criterion.parameters()) {
    parameters.push_back(parameter);
  }
  for (int i = 0; i < kSteps; ++i) {
    const at::Tensor loss = criterion.forward({x, y}).toTensor();
    loss.backward();
    print("module", i, loss);
    step(parameters);
  }
}

// (b) The operator itself, through a handle of its C++ type: the call costs no more than one of PyTorch's own operators.
void train_by_operator(const at::Tensor& x, const at::Tensor& y) {
  using LinearMSELoss = at::Tensor(
      const at::Tensor& input,
      const at::Tensor& linear_weight,
      const at::Tensor& target,
      const std::optional<at::Tensor>& linear_bias,
      const std::optional<at::Tensor>& weight,
      std::string_view reduction);
  static const auto linear_mse_loss =
      c10::Dispatcher::singleton().findSchemaOrThrow("torchintro::linear_mse_loss", "").typed<LinearMSELoss>();

  const at::Tensor weight = at::zeros({1, 1}).requires_grad_();
  const at::Tensor bias = at::zeros({1}).requires_grad_();
  for (int i = 0; i < kSteps; ++i) {
    const at::Tensor loss = linear_mse_loss.call(x, weight, y, bias, std::nullopt, "mean");
    loss.backward();
    print("operator", i, loss);
    step({weight, bias});
  }
  std::printf("learned %.9g %.9g\n", weight.item<double>(), bias.item<double>());
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s OPERATOR_LIBRARY.so MODULE.pt\n", argv[0]);
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    const at::Tensor x = at::linspace(0, 1, 100).unsqueeze(1);
    const at::Tensor y = x.mul(3); // what there is to learn
    train_module(argv[2], x, y);
    train_by_operator(x, y);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("python %s\n", dlsym(RTLD_DEFAULT, "Py_Initialize") == nullptr ? "no" : "yes");
  return 0;
}
