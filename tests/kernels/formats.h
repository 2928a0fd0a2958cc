// The four number formats in double precision: how the tests round what kernels read, and read what they wrote. Slow, and
// deliberately written in another way than the kernels do it.
#pragma once

#include "cpu/kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace torchintro::fuzz {

using cpu::DType;

struct Format {
  const char* name;
  int64_t bytes;
  int mantissa_bits; // without the implicit one
  int minimum_exponent; // of normal numbers
};

inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::Float64:
      return {"float64", 8, 52, -1022};
    case DType::Float32:
      return {"float32", 4, 23, -126};
    case DType::BFloat16:
      return {"bfloat16", 2, 7, -126};
    case DType::Float16:
      return {"float16", 2, 10, -14};
  }
  return {};
}

inline int64_t bytes_of(DType dtype) {
  return format_of(dtype).bytes;
}

// The largest relative error of rounding to nearest, and the distance between subnormal numbers.
inline double rounding_of(DType dtype) {
  return std::ldexp(1.0, -format_of(dtype).mantissa_bits - 1);
}
inline double spacing_of(DType dtype) {
  return std::ldexp(1.0, format_of(dtype).minimum_exponent - format_of(dtype).mantissa_bits);
}

// What the kernels are made for.
struct DtypePair {
  DType input;
  DType target;
};
constexpr DtypePair kDtypePairs[] = {
    {DType::Float64, DType::Float64},
    {DType::Float32, DType::Float32},
    {DType::BFloat16, DType::BFloat16},
    {DType::Float16, DType::Float16},
    {DType::BFloat16, DType::Float32},
    {DType::Float16, DType::Float32},
};

// What the kernels compute in.
inline DType accumulator_of(DType input) {
  return input == DType::Float64 ? DType::Float64 : DType::Float32;
}

inline uint16_t encode16(const Format& format, double value) {
  const int exponent_bits = 15 - format.mantissa_bits;
  const int32_t infinity = ((1 << exponent_bits) - 1) << format.mantissa_bits;
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const double magnitude = std::fabs(value);
  int32_t bits = infinity;
  if (std::isnan(value)) {
    bits = infinity | (1 << (format.mantissa_bits - 1));
  } else if (magnitude == 0) {
    bits = 0;
  } else if (!std::isinf(value)) {
    const int exponent = std::max(std::ilogb(magnitude), format.minimum_exponent);
    const double units = std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent)); // ties to even
    const double all =
        static_cast<double>(exponent - format.minimum_exponent) * (1 << format.mantissa_bits) + units; // carries, too
    bits = static_cast<int32_t>(std::min(all, static_cast<double>(infinity)));
  }
  return static_cast<uint16_t>(sign | bits);
}

inline double decode16(const Format& format, uint16_t bits) {
  const int exponent_mask = (1 << (15 - format.mantissa_bits)) - 1;
  const int exponent = (bits >> format.mantissa_bits) & exponent_mask;
  const int fraction = bits & ((1 << format.mantissa_bits) - 1);
  double magnitude = 0;
  if (exponent == exponent_mask) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else {
    const int implicit = exponent > 0 ? 1 << format.mantissa_bits : 0;
    magnitude =
        std::ldexp(fraction + implicit, std::max(exponent, 1) - 1 + format.minimum_exponent - format.mantissa_bits);
  }
  return (bits & 0x8000) ? -magnitude : magnitude;
}

inline void write(DType dtype, unsigned char* to, double value) {
  if (dtype == DType::Float64) {
    std::memcpy(to, &value, 8);
  } else if (dtype == DType::Float32) {
    const auto single = static_cast<float>(value);
    std::memcpy(to, &single, 4);
  } else {
    const uint16_t bits = encode16(format_of(dtype), value);
    std::memcpy(to, &bits, 2);
  }
}

inline double read(DType dtype, const unsigned char* from) {
  if (dtype == DType::Float64) {
    double value = 0;
    std::memcpy(&value, from, 8);
    return value;
  }
  if (dtype == DType::Float32) {
    float value = 0;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, from, 2);
  return decode16(format_of(dtype), bits);
}

} // namespace torchintro::fuzz
