// vmap: the decomposition, whose operators have batching rules of their own.
#include "composite/composite.h"

#include <torch/library.h>

namespace torchintro {

TORCH_LIBRARY_IMPL(torchintro, FuncTorchBatched, m) {
  m.impl("linear_mse_loss", linear_mse_loss_composite);
  m.impl("_linear_mse_loss_grads", linear_mse_loss_grads_composite);
}

} // namespace torchintro
