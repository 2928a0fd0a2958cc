// torch::autograd::Node is held by c10::intrusive_ptr from torch 2.13 on and by std::shared_ptr before.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <memory>

namespace torchintro {

template <typename NodeType>
auto make_node() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::make_intrusive<NodeType>();
#else
  // The deleter unlinks a deep graph step by step where a destructor would recurse.
  return std::shared_ptr<NodeType>(new NodeType(), torch::autograd::deleteNode);
#endif
}

} // namespace torchintro
