// Scalars and packs of scalars in device code: accumulator types, conversions, loads and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace torchintro::cuda {

// What products and short sums are accumulated in: double for double, float for the others.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// To the accumulator type: exact.
__device__ inline double widen(double value) {
  return value;
}
__device__ inline float widen(float value) {
  return value;
}
__device__ inline float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ inline float widen(__half value) {
  return __half2float(value);
}

// To T: rounded to nearest even, infinite beyond T's range.
template <typename T>
__device__ inline T narrow(double value);
template <>
__device__ inline double narrow<double>(double value) {
  return value;
}
template <>
__device__ inline float narrow<float>(double value) {
  return static_cast<float>(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(double value) {
  return __float2bfloat16_rn(static_cast<float>(value));
}
template <>
__device__ inline __half narrow<__half>(double value) {
  return __float2half_rn(static_cast<float>(value));
}

template <typename T>
__device__ inline T narrow(float value);
template <>
__device__ inline double narrow<double>(float value) {
  return value;
}
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}

// kCount neighbours in memory, loaded and stored by accesses of up to 16 bytes; the address must be a multiple of the pack's
// size.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T values[kCount];
};

template <int kCount, typename T>
__device__ inline void load_pack(const T* __restrict__ source, Accumulator<T> (&values)[kCount]) {
  const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(source);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    values[v] = widen(pack.values[v]);
  }
}

template <int kCount, typename T>
__device__ inline void store_pack(T* __restrict__ destination, const Accumulator<T> (&values)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    pack.values[v] = narrow<T>(values[v]);
  }
  *reinterpret_cast<Pack<T, kCount>*>(destination) = pack;
}

} // namespace torchintro::cuda
