// Integer arithmetic that plans share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torchintro::cuda {

// The least power of two that is at least `value`, but no more than `limit`, itself one.
constexpr int power_of_two_from(int64_t value, int limit) {
  int power = 1;
  while (power < value && power < limit) {
    power *= 2;
  }
  return power;
}

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

} // namespace torchintro::cuda
