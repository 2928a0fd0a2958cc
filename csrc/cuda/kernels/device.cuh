// What has no words in C++: how a kernel is launched. tests/kernels/emulation/ has a header of the same name that does
// it on the processor.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace torchintro::cuda {

// Enqueues kernel(arguments...) on `stream`: `blocks` x `threads`, with shared_bytes of dynamic shared memory. The
// arguments are converted to the kernel's parameters.
template <typename... P, typename... A>
cudaError_t launch(
    void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream, A&&... arguments) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      return error;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
}

} // namespace torchintro::cuda
