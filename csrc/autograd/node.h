// torch::autograd::Node is held by c10::intrusive_ptr from torch 2.13 on and by std::shared_ptr before.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <memory>
#include <utility>

namespace torchintro {

template <typename NodeType, typename... Arguments>
auto make_node(Arguments&&... arguments) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::make_intrusive<NodeType>(std::forward<Arguments>(arguments)...);
#else
  // The deleter unlinks a deep graph step by step where a destructor would recurse.
  return std::shared_ptr<NodeType>(new NodeType(std::forward<Arguments>(arguments)...), torch::autograd::deleteNode);
#endif
}

} // namespace torchintro
