// Memory for large gradients.
//
// Fresh memory is mapped page by page as it is first written, and every page is zeroed for it: for 268 MB 65 to 90 ms where
// writing takes 6 (two cores, Intel Xeon in a virtual machine; 42 ms with pages of 2 MB). A training loop drops a gradient
// and asks for another of the same size in every step. So memory that a gradient gives back is kept for the next one, a few
// blocks at the most, and the system is told that it may take it back whenever it is short (MADV_FREE). TORCHINTRO_KEEP_MEMORY=0 turns this off.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchintro::cpu {

// An uninitialised, contiguous CPU tensor: from kept memory where it is large, else as at::empty makes it.
at::Tensor empty_gradient(at::IntArrayRef sizes, const at::TensorOptions& options);

} // namespace torchintro::cpu
