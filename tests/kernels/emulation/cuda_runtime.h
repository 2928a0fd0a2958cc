// Stands in for CUDA's header of this name: the part of CUDA C++ that the kernels use, on the machine of machine.h.
#pragma once

#include "cuda_runtime_api.h"
#include "machine.h"

#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#if defined(__SANITIZE_ADDRESS__) // which watches the borders of an ordinary variable, but of none in a named section
#define __shared__ static
#else // in one section, so that the machine can fill it with NaN
#define __shared__ static __attribute__((section("cuda_shared")))
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1)
      : x(x), y(y), z(z) {}
};

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = torchintro::emulation::kWarp;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
  return {x, y};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

#define TORCHINTRO_MIN_MAX(type)    \
  inline type min(type a, type b) { \
    return b < a ? b : a;           \
  }                                 \
  inline type max(type a, type b) { \
    return a < b ? b : a;           \
  }
TORCHINTRO_MIN_MAX(int)
TORCHINTRO_MIN_MAX(unsigned)
TORCHINTRO_MIN_MAX(long)
TORCHINTRO_MIN_MAX(unsigned long)
TORCHINTRO_MIN_MAX(long long)
TORCHINTRO_MIN_MAX(unsigned long long)
#undef TORCHINTRO_MIN_MAX
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}

inline unsigned __float_as_uint(float value) {
  unsigned bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// The default arguments are the caller's place, for messages and to tell one barrier from another.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  torchintro::emulation::block_barrier({file, line});
}
inline void __syncwarp(
    unsigned mask = torchintro::emulation::kAllLanes,
    const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  torchintro::emulation::warp_barrier(mask, {file, line});
}

namespace torchintro::emulation {

template <typename T>
T shuffle_value(const char* name, unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(name, mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() {
  return static_cast<int>(threadIdx.x % kWarp);
}

} // namespace torchintro::emulation

template <typename T>
T __shfl_sync(
    unsigned mask,
    T value,
    int source,
    int width = warpSize,
    const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  namespace emulation = torchintro::emulation;
  const int base = emulation::lane() / width * width;
  return emulation::shuffle_value("__shfl_sync", mask, value, base + (source & (width - 1)), {file, line});
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask,
    T value,
    int lane_mask,
    int width = warpSize,
    const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  namespace emulation = torchintro::emulation;
  const int lane = emulation::lane();
  const int source = lane ^ lane_mask;
  return emulation::shuffle_value(
      "__shfl_xor_sync", mask, value, source < (lane / width + 1) * width ? source : lane, {file, line});
}

template <typename T>
T __shfl_down_sync(
    unsigned mask,
    T value,
    int delta,
    int width = warpSize,
    const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  namespace emulation = torchintro::emulation;
  const int lane = emulation::lane();
  const int source = lane + delta;
  return emulation::shuffle_value(
      "__shfl_down_sync", mask, value, source < (lane / width + 1) * width ? source : lane, {file, line});
}

cudaError_t cudaGetLastError();
