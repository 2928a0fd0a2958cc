// What a result must be, how far it may be off, and the comparison.
#pragma once

#include "memory.h"

#include <cstdio>

namespace torchintro::fuzz {

// A sum of a known number of terms with the bound of its rounding: |error| <= rounding * terms * sum |term|, whatever the
// order of the terms. So every level's order passes, and a term too few or too many does not.
struct Sum {
  double value = 0;
  double error = 0; // what the terms' own errors add up to
  double magnitude = 0; // sum |term|

  void add(double term, double term_error) {
    value += term;
    error += term_error;
    magnitude += std::fabs(term);
  }
  void scale(double factor) {
    value *= factor;
    error *= std::fabs(factor);
    magnitude *= std::fabs(factor);
  }
  double tolerance(int64_t terms, double rounding) const {
    // Twice: the reference in double rounds too. Four: the product, the scale factor and its own rounding.
    return 2 * (error + static_cast<double>(terms + 4) * rounding * magnitude);
  }
};

class Expected { // a matrix of them
 public:
  Expected(int64_t rows, int64_t columns)
      : columns_(columns), sums_(static_cast<size_t>(rows * columns)) {}

  Sum& at(int64_t row, int64_t column) {
    return sums_[static_cast<size_t>(row * columns_ + column)];
  }
  const Sum& at(int64_t row, int64_t column) const {
    return sums_[static_cast<size_t>(row * columns_ + column)];
  }
  void scale(double factor) {
    for (Sum& sum : sums_) {
      sum.scale(factor);
    }
  }
  int64_t columns() const {
    return columns_;
  }
  int64_t rows() const {
    return columns_ == 0 ? 0 : static_cast<int64_t>(sums_.size()) / columns_;
  }

 private:
  int64_t columns_;
  std::vector<Sum> sums_;
};

// Infinities and NaN must be where the formula has them: they do not depend on the order of a sum.
inline void check_value(
    const char* name, int64_t row, int64_t column, double value, double expected, double tolerance, DType stored) {
  bool right = false;
  if (std::isnan(expected)) {
    right = std::isnan(value);
  } else if (std::isinf(expected)) {
    right = value == expected;
  } else {
    const double bound = tolerance + rounding_of(stored) * (std::fabs(expected) + tolerance) + spacing_of(stored);
    right = std::fabs(value - expected) <= bound;
    if (stored == DType::Float16 && std::isinf(value)) { // 65520 is the first to be rounded up to infinity
      right = std::fabs(expected) + tolerance >= 65520 && std::signbit(value) == std::signbit(expected);
    }
  }
  if (!right) {
    char text[200];
    std::snprintf(
        text,
        sizeof text,
        "%s[%lld][%lld] is %.9g instead of %.9g +- %.3g",
        name,
        static_cast<long long>(row),
        static_cast<long long>(column),
        value,
        expected,
        tolerance);
    throw Failure(text);
  }
}

// The columns that a result has in a matrix whose rows, of `row` elements, lie side by side.
struct Tile {
  int64_t row;
  int64_t first;
};

// A result in `memory`, of which the rows from `begin` on that `expected` has were computed: these are right, and everything
// beside them was left alone.
inline void check_rows(
    const char* name,
    const Buffer& memory,
    DType dtype,
    int64_t begin,
    const Expected& expected,
    int64_t terms,
    double rounding,
    Tile tile) {
  const int64_t bytes = bytes_of(dtype);
  memory.check_guards(name);
  int64_t checked = 0;
  for (int64_t row = 0; row < expected.rows(); ++row) {
    const int64_t first = ((begin + row) * tile.row + tile.first) * bytes;
    memory.check_untouched(name, checked, first);
    checked = first + expected.columns() * bytes;
    for (int64_t column = 0; column < expected.columns(); ++column) {
      const Sum& sum = expected.at(row, column);
      const double value = read(dtype, memory.data() + first + column * bytes);
      check_value(name, begin + row, column, value, sum.value, sum.tolerance(terms, rounding), dtype);
    }
  }
  memory.check_untouched(name, checked, memory.bytes());
}
inline void check_rows(
    const char* name,
    const Buffer& memory,
    DType dtype,
    int64_t begin,
    const Expected& expected,
    int64_t terms,
    double rounding) {
  check_rows(name, memory, dtype, begin, expected, terms, rounding, {expected.columns(), 0});
}

// Sums in double, from `sums` on.
inline void check_sums(const char* name, const double* sums, const Expected& expected, int64_t terms, double rounding) {
  for (int64_t row = 0; row < expected.rows(); ++row) {
    for (int64_t column = 0; column < expected.columns(); ++column) {
      const Sum& sum = expected.at(row, column);
      const double value = sums[row * expected.columns() + column];
      check_value(name, row, column, value, sum.value, sum.tolerance(terms, rounding), DType::Float64);
    }
  }
}

} // namespace torchintro::fuzz
