// Vectors for the kernels, by GCC's and Clang's vector extensions: included by each level's file, which sets
//   TORCHINTRO_LEVEL         the level's namespace
//   TORCHINTRO_VECTOR_BYTES  the width of a vector
//   TORCHINTRO_TARGET        the attribute that turns the instruction set on
// Every function here is inlined into the level's own: nothing compiled for one instruction set can be linked into another,
// and no function of the standard library is used for the same reason.
#include <cstdint>

#define TORCHINTRO_INLINE TORCHINTRO_TARGET __attribute__((always_inline)) static inline

namespace torchintro::cpu::TORCHINTRO_LEVEL {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

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

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  static constexpr int64_t lanes = TORCHINTRO_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  static constexpr int64_t lanes = TORCHINTRO_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
constexpr int64_t kLanes = VectorOf<A>::lanes;

// 16-bit storage of a float32 vector, and the same number of 32-bit integers.
typedef uint16_t Half16 __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES / 2)));
typedef uint16_t Half16Unaligned __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES)));
typedef float Float32 __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES)));

// 16-bit <-> float32, of a vector or of one value (as a vector's first lane the compiler makes one of it).

TORCHINTRO_INLINE Float32 widen(Half16 half, bfloat16) {
  return (Float32)(__builtin_convertvector(half, Bits32) << 16);
}

TORCHINTRO_INLINE Float32 widen(Half16 half, float16) {
  const Bits32 bits = __builtin_convertvector(half, Bits32);
  const Bits32 sign = (bits & 0x8000u) << 16;
  const Bits32 exponent = bits & 0x7c00u;
  const Bits32 shifted = (bits & 0x7fffu) << 13;
  const Bits32 normal = shifted + (112u << 23); // 112 = 127 - 15, the biases
  const Bits32 special = shifted | (255u << 23); // infinity, nan
  // A subnormal is its mantissa times 2^-24: put it behind 2^-14 and take 2^-14 away, which needs no float32 subnormal.
  const Float32 two_to_minus_14 = (Float32)(Bits32{} + (113u << 23));
  const Bits32 subnormal = (Bits32)((Float32)(shifted + (113u << 23)) - two_to_minus_14);
  const Bits32 is_special = (Bits32)(exponent == 0x7c00u);
  const Bits32 is_subnormal = (Bits32)(exponent == 0u);
  const Bits32 magnitude = (is_special & special) | (is_subnormal & subnormal) | (~is_special & ~is_subnormal & normal);
  return (Float32)(magnitude | sign);
}

// Round to nearest, ties to even; nan stays nan.
TORCHINTRO_INLINE Half16 narrow(Float32 value, bfloat16) {
  const Bits32 bits = (Bits32)value;
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 is_nan = (Bits32)(value != value);
  return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), Half16);
}

TORCHINTRO_INLINE Half16 narrow(Float32 value, float16) {
  const Bits32 sign = ((Bits32)value >> 16) & 0x8000u;
  const Bits32 magnitude = (Bits32)value & 0x7fffffffu;
  const Bits32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 2^-1 makes float32's own rounding leave a multiple of 2^-24 in the low mantissa bits.
  const Bits32 half_bits = Bits32{} + (126u << 23);
  const Bits32 subnormal = (Bits32)((Float32)magnitude + (Float32)half_bits) - half_bits;
  const Bits32 is_nan = (Bits32)(value != value);
  const Bits32 overflows = (Bits32)(magnitude >= (143u << 23)) & ~is_nan; // 2^16 and above
  const Bits32 is_subnormal = (Bits32)(magnitude < (113u << 23));
  const Bits32 in_range = ~is_nan & ~overflows;
  const Bits32 result = (is_nan & 0x7e00u) | (overflows & 0x7c00u) | (in_range & is_subnormal & subnormal) |
      (in_range & ~is_subnormal & normal);
  return __builtin_convertvector(result | sign, Half16);
}

template <typename T>
struct Memory { // float, double: what is stored is what is computed with
  using A = T;
  TORCHINTRO_INLINE Vector<A> load(const T* from) {
    return *reinterpret_cast<const typename VectorOf<A>::unaligned*>(from);
  }
  TORCHINTRO_INLINE void store(T* to, Vector<A> value) {
    *reinterpret_cast<typename VectorOf<A>::unaligned*>(to) = value;
  }
  TORCHINTRO_INLINE A get(const T* from) {
    return *from;
  }
  TORCHINTRO_INLINE void set(T* to, A value) {
    *to = value;
  }
};

template <typename T>
struct Memory16 {
  using A = float;
  TORCHINTRO_INLINE Float32 load(const T* from) {
    return widen((Half16) * reinterpret_cast<const Half16Unaligned*>(from), T{});
  }
  TORCHINTRO_INLINE void store(T* to, Float32 value) {
    *reinterpret_cast<Half16Unaligned*>(to) = narrow(value, T{});
  }
  TORCHINTRO_INLINE float get(const T* from) {
    return widen(Half16{from->bits}, T{})[0];
  }
  TORCHINTRO_INLINE void set(T* to, float value) {
    to->bits = narrow(Float32{value}, T{})[0];
  }
};
template <>
struct Memory<bfloat16> : Memory16<bfloat16> {};
template <>
struct Memory<float16> : Memory16<float16> {};

// The first `count` < lanes values and zeros. Reads a whole vector, which never crosses `end`, where it can.
template <typename T>
TORCHINTRO_INLINE Vector<Accumulator<T>> load_first(const T* from, int64_t count, const T* end) {
  using A = Accumulator<T>;
  using Integer = typename VectorOf<A>::integer;
  if (end - from >= kLanes<A>) {
    const Vector<A> all = Memory<T>::load(from);
    Integer lane{};
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      lane[i] = i;
    }
    return (Vector<A>)((Integer)all & (Integer)(lane < (Integer{} + static_cast<int32_t>(count))));
  }
  Vector<A> some{};
  for (int64_t i = 0; i < count; ++i) {
    some[i] = Memory<T>::get(from + i);
  }
  return some;
}

template <typename T>
TORCHINTRO_INLINE void store_first(T* to, Vector<Accumulator<T>> value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Memory<T>::set(to + i, value[i]);
  }
}

template <typename A>
TORCHINTRO_INLINE A sum_lanes(Vector<A> value) {
  A sum = 0;
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    sum += value[i];
  }
  return sum;
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
