// What C++ does not say of a GPU: launches, dynamic shared memory, copies in the background, and the matrix instructions of
// a warp. Everything that is PTX is here, so that tests/kernels/emulation can stand in for it where there is no GPU.
//
// In a warp's matrices lane l is (group, t) = (l / 4, l % 4). A *part* is a register that holds two neighbouring 16-bit
// elements of an 8 x 8 matrix: row `group`, columns 2 t and 2 t + 1.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace torchintro::cuda {

// Start of the block's dynamic shared memory, aligned to 128 bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char torchintro_dynamic_shared[];
  return reinterpret_cast<T*>(torchintro_dynamic_shared);
}

__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Begins to copy kBytes (4, 8 or 16; both addresses aligned to it) from global to shared memory; where !present, zeros are
// written and nothing is read. 16 bytes pass the first-level cache by.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool present) {
  const int bytes = present ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    static_assert(kBytes == 4 || kBytes == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global),
                 "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}

// Ends the group of copies that the thread began since the last call.
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the thread's newest kNewest groups have arrived. They are then visible to this thread; to others
// after a barrier.
template <int kNewest>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes
// aligned to 16, and gets a part of each.
__device__ inline void load_matrices(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, of the transposed matrices.
__device__ inline void load_matrices_transposed(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(shared_address(row))
               : "memory");
}

// The part of the transposed 8 x 8 matrix.
__device__ inline uint32_t transpose_matrix(uint32_t part) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(part));
  return transposed;
}

// c += a b in float, with bfloat16 a (16 x 16: parts of its upper left, lower left, upper right and lower right quarter) and
// b (16 x 8, parts of its transposed halves, upper and lower). c (16 x 8): row `group` in c[0] and c[1], columns 2 t and
// 2 t + 1; row group + 8 in c[2] and c[3].
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to bfloat16, `low` in the lower half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Lets the compiler know nothing of a value, so that it computes what follows from it anew.
__device__ inline void forget_origin(int& value) {
  asm volatile("" : "+r"(value));
}

// Enqueues a kernel with a grid of `blocks` blocks; the arguments are converted to the kernel's parameters.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...),
    int64_t blocks,
    int threads,
    size_t shared_bytes,
    cudaStream_t stream,
    Arguments&&... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10; // more dynamic shared memory has to be allowed, on the current device
  if (shared_bytes > kWithoutAsking) {
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
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

} // namespace torchintro::cuda
