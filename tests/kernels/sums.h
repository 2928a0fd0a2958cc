// Adding blocks' sums up on a random problem: as few_outputs.h, but in an order that is fixed, so that the result is exact.
#pragma once

#include "few_outputs.h"

namespace torchintro::fuzz {

struct AddUpProblem {
  DType type = DType::Float32; // the gradient's
  int64_t blocks = 1;
  int64_t stride = 0; // between the blocks' sums
  int64_t begin = 0;
  int64_t end = 0;
  double scale = 1;
  std::vector<double> sums; // blocks x stride

  std::string text() const {
    return std::string("add_up ") + format_of(type).name + ", " + std::to_string(begin) + " .. " + std::to_string(end) +
        " of " + std::to_string(stride) + " sums of each of " + std::to_string(blocks) + " blocks, scale " +
        std::to_string(scale);
  }
};

inline AddUpProblem draw_add_up_problem(Random& random, DType type) {
  AddUpProblem p;
  p.type = type;
  p.blocks = random.between(1, 5);
  p.begin = random.coin() ? 0 : random.between(0, 70);
  p.end = p.begin + draw_rows(random); // the same sizes around vectors
  p.stride = std::max<int64_t>(1, p.end + random.pick({0, 1, random.between(0, 70)}));
  // Also to numbers that float16 rounds to infinity, and to subnormal ones.
  p.scale = random.coin() ? 1 : random.coin() ? random.uniform(0.01, 2) : std::ldexp(1.5, random.coin() ? 15 : -20);
  const double infinity = std::numeric_limits<double>::infinity();
  const bool special = random.one_in(8);
  for (int64_t i = 0; i < p.blocks * p.stride; ++i) {
    const double value = random.value();
    p.sums.push_back(!special || !random.one_in(20) ? value : random.coin() ? infinity : -infinity);
  }
  return p;
}

// The kernel's result in bytes begin .. end of a gradient, whose elements in front may not be touched. Nor may sums outside
// be read.
template <typename Kernel>
Buffer run_add_up(Random& random, const AddUpProblem& p, const Kernel& kernel) {
  const auto shifted = [&](DType type) {
    Place place = draw_place(random, type);
    place.before += p.begin * bytes_of(type);
    return place;
  };
  const int64_t element = bytes_of(p.type);
  const Place place = shifted(p.type);
  const bool exact = place.guard == Guard::PageAfter || random.coin();
  Buffer gradient((p.end - p.begin) * element, Buffer::kMark, place, exact ? 0 : Buffer::kAlignment);
  const int64_t last = (p.blocks - 1) * p.stride;
  const Buffer sums((last + p.end - p.begin) * 8, Buffer::kNan, shifted(DType::Float64));
  for (int64_t block = 0; block < p.blocks; ++block) {
    std::memcpy(
        sums.data() + block * p.stride * 8,
        p.sums.data() + block * p.stride + p.begin,
        static_cast<size_t>((p.end - p.begin) * 8));
  }
  kernel(
      reinterpret_cast<const double*>(sums.data()) - p.begin,
      p.blocks,
      p.stride,
      p.begin,
      p.end,
      p.scale,
      gradient.data() - p.begin * element);
  return gradient;
}

// Elements begin .. end of a gradient: `result` is the first of them.
inline void check_add_up(const AddUpProblem& p, const unsigned char* result, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    for (int64_t block = 0; block < p.blocks; ++block) {
      sum += p.sums[static_cast<size_t>(block * p.stride + i)];
    }
    sum *= p.scale;
    unsigned char rounded[8];
    write(accumulator_of(p.type), rounded, sum); // twice, as everything that the kernels store in 16 bits
    write(p.type, rounded, read(accumulator_of(p.type), rounded));
    const double expected = read(p.type, rounded);
    const double value = read(p.type, result + (i - begin) * bytes_of(p.type));
    const bool same =
        std::isnan(expected) ? std::isnan(value) : value == expected && std::signbit(value) == std::signbit(expected);
    if (!same) {
      char text[200];
      std::snprintf(
          text, sizeof text, "element %lld is %.17g instead of %.17g", static_cast<long long>(i), value, expected);
      throw Failure(text);
    }
  }
}

inline void check_add_up(const AddUpProblem& p, const Buffer& gradient) {
  gradient.check_guards("gradient");
  check_add_up(p, gradient.data(), p.begin, p.end);
}

} // namespace torchintro::fuzz
