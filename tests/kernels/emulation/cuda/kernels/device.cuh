// Stands in for csrc/cuda/kernels/device.cuh, whose instructions and launches the machine of machine.h carries out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>
#include <utility>

namespace torchintro::cuda {

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared());
}

template <int kBytes>
void copy_async(
    void* shared, const void* global, bool present, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::copy_async(shared, global, kBytes, present, {file, line});
}

inline void copy_async_commit() {
  emulation::copy_async_commit();
}

template <int kNewest>
void copy_async_wait() {
  static_assert(kNewest >= 0);
  emulation::copy_async_wait(kNewest);
}

inline void load_matrices(
    uint32_t (&parts)[4], const void* row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::load_matrices(parts, row, false, {file, line});
}

inline void load_matrices_transposed(
    uint32_t (&parts)[4], const void* row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::load_matrices(parts, row, true, {file, line});
}

inline uint32_t transpose_matrix(uint32_t part, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulation::transpose_matrix(part, {file, line});
}

inline void multiply_add(
    float (&c)[4],
    const uint32_t (&a)[4],
    uint32_t b0,
    uint32_t b1,
    const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  emulation::multiply_add(c, a, b0, b1, {file, line});
}

inline uint32_t pack_bfloat16(float low, float high) {
  return __float2bfloat16_rn(low).x | static_cast<uint32_t>(__float2bfloat16_rn(high).x) << 16;
}

inline void forget_origin(int&) {}

template <typename... P, typename... A>
cudaError_t launch(
    void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t, A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> parameters;
  };
  const Call call{kernel, std::tuple<P...>(std::forward<A>(arguments)...)};
  const auto body = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.parameters);
  };
  return emulation::run_grid(blocks, threads, shared_bytes, body, &call) ? cudaSuccess : cudaErrorInvalidConfiguration;
}

} // namespace torchintro::cuda
