// Stands in for CUDA's header of this name: float16 with the conversions that the kernels use.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
  unsigned short x;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const unsigned sign = (value.x & 0x8000u) << 16;
  const unsigned rest = value.x & 0x7fffu;
  if (rest >= 0x7c00) { // infinite or NaN
    return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  }
  if (rest < 0x400) { // subnormal: rest units of 2^-24
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign == 0 ? magnitude : -magnitude;
  }
  return __uint_as_float(sign | ((rest << 13) + ((127u - 15) << 23)));
}

// To nearest even, infinite from 65520 on. A NaN becomes CUDA's.
inline __half __float2half_rn(float value) {
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
  const unsigned magnitude = __float_as_uint(value) & 0x7fffffff;
  unsigned rest = 0;
  if (magnitude > 0x7f800000) {
    return {0x7fff};
  }
  if (magnitude >= __float_as_uint(65520.0f)) {
    rest = 0x7c00;
  } else if (magnitude >= __float_as_uint(0x1p-14f)) {
    const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    rest = (rounded >> 13) - ((127 - 15) << 10);
  } else { // the addition rounds to a unit of 2^-24, which is the sum's last bit
    rest = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  }
  return {static_cast<unsigned short>(sign | rest)};
}
inline __half __float2half(float value) {
  return __float2half_rn(value);
}

inline unsigned short __half_as_ushort(__half value) {
  return value.x;
}
inline __half __ushort_as_half(unsigned short bits) {
  return {bits};
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline float __low2float(__half2 pair) {
  return __half2float(pair.x);
}
inline float __high2float(__half2 pair) {
  return __half2float(pair.y);
}
inline float2 __half22float2(__half2 pair) {
  return {__half2float(pair.x), __half2float(pair.y)};
}
