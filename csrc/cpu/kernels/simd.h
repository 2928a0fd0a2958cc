// Vectors for the kernels, by GCC's and Clang's vector extensions: included by each level's file, which sets
//   TORCHINTRO_LEVEL         the level's namespace
//   TORCHINTRO_VECTOR_BYTES  the width of a vector
//   TORCHINTRO_TARGET        the attribute that turns the instruction set on
// Every function here is inlined into the level's own: nothing compiled for one instruction set can be linked into another,
// and no function of the standard library is used for the same reason. Intrinsics stand where the compiler would not find
// the instruction by itself: half precision, masks, stores past the caches.
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TORCHINTRO_INLINE TORCHINTRO_TARGET __attribute__((always_inline)) static inline
// The larger parts, which stay functions: one for every accumulator type instead of one for every pair of dtypes.
#define TORCHINTRO_FUNCTION TORCHINTRO_TARGET __attribute__((noinline)) static

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
#if TORCHINTRO_VECTOR_BYTES == 64
  return (Float32)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#elif TORCHINTRO_VECTOR_BYTES == 32
  return (Float32)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
  return (Float32)(__builtin_convertvector(half, Bits32) << 16);
#endif
}

TORCHINTRO_INLINE Float32 widen(Half16 half, float16) {
#if TORCHINTRO_VECTOR_BYTES == 64
  return (Float32)_mm512_cvtph_ps((__m256i)half);
#elif TORCHINTRO_VECTOR_BYTES == 32
  return (Float32)_mm256_cvtph_ps((__m128i)half);
#else
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
#endif
}

// Round to nearest, ties to even; nan stays nan.
TORCHINTRO_INLINE Half16 narrow(Float32 value, bfloat16) {
  const Bits32 bits = (Bits32)value;
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 is_nan = (Bits32)(value != value);
  return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), Half16);
}

TORCHINTRO_INLINE Half16 narrow(Float32 value, float16) {
#if TORCHINTRO_VECTOR_BYTES == 64
  return (Half16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif TORCHINTRO_VECTOR_BYTES == 32
  return (Half16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
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
#endif
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

// What a dtype is stored as, and vectors of `N` stored values.
template <typename T>
struct StorageOf {
  using type = T;
};
template <>
struct StorageOf<bfloat16> {
  using type = uint16_t;
};
template <>
struct StorageOf<float16> {
  using type = uint16_t;
};
template <typename T, int64_t N>
struct Piece {
  using Element = typename StorageOf<T>::type;
  typedef Element type __attribute__((vector_size(N * sizeof(Element))));
  typedef Element unaligned __attribute__((vector_size(N * sizeof(Element)), aligned(sizeof(Element)), may_alias));
};

// shuffle(a, b, indices): the lanes of a, then those of b, counted through.
#if !defined(__has_builtin)
#define __has_builtin(x) 0
#endif
template <typename I, typename V, int... J>
TORCHINTRO_INLINE auto shuffle(V a, V b, std::integer_sequence<int, J...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, J...);
#else
  typedef I Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Indices{J...});
#endif
}

template <typename A>
using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// The two halves of a transposition step at distance S: lane j of `low` is a[j], or b[j - S] where j has bit S; lane j of
// `high` is a[j + S], or b[j] where j has it.
template <int64_t S, int... J>
constexpr auto low_indices(std::integer_sequence<int, J...>) {
  return std::integer_sequence<int, ((J & S) == 0 ? J : static_cast<int>(sizeof...(J)) + J - static_cast<int>(S))...>{};
}
template <int64_t S, int... J>
constexpr auto high_indices(std::integer_sequence<int, J...>) {
  return std::integer_sequence<int, ((J & S) == 0 ? J + static_cast<int>(S) : static_cast<int>(sizeof...(J)) + J)...>{};
}
template <typename A, int64_t S>
TORCHINTRO_INLINE void exchange(Vector<A>& a, Vector<A>& b) {
  using Lanes = std::make_integer_sequence<int, static_cast<int>(kLanes<A>)>;
  const Vector<A> low = shuffle<Lane<A>>(a, b, decltype(low_indices<S>(Lanes{})){});
  const Vector<A> high = shuffle<Lane<A>>(a, b, decltype(high_indices<S>(Lanes{})){});
  a = low;
  b = high;
}

// Transposes the W x W squares that lie side by side in W vectors: afterwards lane m W + i of vector c is what lane
// m W + c of vector i was.
template <typename A, int64_t W, int64_t S = W / 2>
TORCHINTRO_INLINE void transpose(Vector<A>* v) {
  if constexpr (S > 0) {
    for (int64_t i = 0; i < W; ++i) {
      if ((i & S) == 0) {
        exchange<A, S>(v[i], v[i + S]);
      }
    }
    transpose<A, W, S / 2>(v);
  }
}

// Lane i of the result is the sum of the lanes of v[i], for as many vectors as a vector has lanes. Overwrites v.
template <typename A, int64_t S = kLanes<A> / 2>
TORCHINTRO_INLINE Vector<A> sum_each(Vector<A>* v) {
  for (int64_t i = 0; i < S; ++i) {
    exchange<A, S>(v[i], v[i + S]);
    v[i] += v[i + S];
  }
  if constexpr (S > 1) {
    return sum_each<A, S / 2>(v);
  } else {
    return v[0];
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

// All bits set in the lanes from `first` on, or below `count`.
template <typename A>
TORCHINTRO_INLINE typename VectorOf<A>::integer lanes_from(int64_t first) {
  typename VectorOf<A>::integer lane{};
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    lane[i] = static_cast<Lane<A>>(i);
  }
  return lane >= (typename VectorOf<A>::integer{} + static_cast<Lane<A>>(first));
}
template <typename A>
TORCHINTRO_INLINE typename VectorOf<A>::integer lanes_below(int64_t count) {
  return ~lanes_from<A>(count);
}
// Zero where the mask is: a product with zero would make NaN of an infinity.
template <typename A>
TORCHINTRO_INLINE Vector<A> keep(Vector<A> value, typename VectorOf<A>::integer mask) {
  return (Vector<A>)((typename VectorOf<A>::integer)value & mask);
}

// Masked accesses and stores past the caches are invisible to AddressSanitizer, which then gets plain ones to look at.
#if TORCHINTRO_VECTOR_BYTES == 64 && !defined(__SANITIZE_ADDRESS__)
#define TORCHINTRO_MASKED 1
#else
#define TORCHINTRO_MASKED 0
#endif

// The first `count` <= lanes values, and zeros. Reads nothing behind them.
template <typename T>
TORCHINTRO_INLINE Vector<Accumulator<T>> load_first(const T* from, int64_t count) {
  using A = Accumulator<T>;
#if TORCHINTRO_MASKED
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 8) {
    return (Vector<A>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  } else if constexpr (sizeof(T) == 4) {
    return (Vector<A>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  } else {
    return widen((Half16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from), T{});
  }
#else
  Vector<A> some{};
  for (int64_t i = 0; i < count; ++i) {
    some[i] = Memory<T>::get(from + i);
  }
  return some;
#endif
}

template <typename T>
TORCHINTRO_INLINE void store_first(T* to, Vector<Accumulator<T>> value, int64_t count) {
#if TORCHINTRO_MASKED
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)value);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)value);
  } else {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), (__m256i)narrow(value, T{}));
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    Memory<T>::set(to + i, value[i]);
  }
#endif
}

// Stores past the caches, to an address that is a multiple of the stored vector's size: memory that is only written is
// then not read first.
template <typename T>
TORCHINTRO_INLINE void store_past_caches(T* to, Vector<Accumulator<T>> value) {
#if defined(__SANITIZE_ADDRESS__) || TORCHINTRO_VECTOR_BYTES == 16
  Memory<T>::store(to, value);
#elif TORCHINTRO_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 2) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)narrow(value, T{}));
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
  }
#else
  if constexpr (sizeof(T) == 2) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)narrow(value, T{}));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
  }
#endif
}
template <typename T>
constexpr int64_t kStoredBytes = kLanes<Accumulator<T>> * static_cast<int64_t>(sizeof(T));

// Orders stores past the caches before whatever another thread is told afterwards.
TORCHINTRO_INLINE void finish_stores_past_caches() {
#if TORCHINTRO_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
