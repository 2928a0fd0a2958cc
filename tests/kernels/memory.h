// Random numbers, memory whose borders are watched, and matrices of every layout that torch can hand to a kernel.
#pragma once

#include "formats.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace torchintro::fuzz {

// The levels that this machine can run.
inline std::vector<cpu::Level> levels() {
  std::vector<cpu::Level> all;
  for (const cpu::Level level : {cpu::Level::Baseline, cpu::Level::Avx2, cpu::Level::Avx512}) {
    if (level <= cpu::best_level()) {
      all.push_back(level);
    }
  }
  return all;
}

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed)
      : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t between(int64_t low, int64_t high) { // both included
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t n) {
    return between(1, n) == 1;
  }
  bool coin() {
    return one_in(2);
  }
  double uniform(double low, double high) {
    return low + (high - low) * std::ldexp(static_cast<double>(next() >> 11), -53);
  }
  int64_t pick(std::initializer_list<int64_t> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }
  double value() { // zeros, and numbers that are subnormal in float16, among the ordinary
    const int64_t kind = between(0, 31);
    return kind == 0 ? 0.0 : kind == 1 ? std::ldexp(uniform(-2, 2), -20) : uniform(-2, 2);
  }

 private:
  uint64_t state_;
};

// Where memory lies. On the heap, AddressSanitizer sees every access outside, but for masked vector instructions, which the
// compiler does not instrument. Beside a page that may not be touched, the processor stops those as well.
enum class Guard { Heap, PageBefore, PageAfter };

struct Place {
  int64_t before = 0; // bytes in front, which shift the alignment
  Guard guard = Guard::Heap;
};

// `before` + `bytes` + `after` bytes, and not one more. Those in front and behind are compared with what they were filled
// with, and the ones in front are forbidden to AddressSanitizer as well (in whole groups of eight).
class Buffer {
 public:
  static constexpr unsigned char kNan = 0xff; // in every format: for what may not be read
  static constexpr unsigned char kMark = 0xa5; // for what may not be written
  static constexpr int64_t kAlignment = 64;

  Buffer() = default;
  Buffer(int64_t bytes, unsigned char fill, Place place = {}, int64_t after = 0)
      : bytes_(bytes), before_(place.before), after_(after), fill_(fill) {
    const auto total = static_cast<size_t>(before_ + bytes + after);
    void* memory = nullptr;
    if (place.guard == Guard::Heap) {
      if (posix_memalign(&memory, kAlignment, total) != 0) {
        throw std::bad_alloc();
      }
      memory_ = {static_cast<unsigned char*>(memory), Free{nullptr, 0}};
    } else {
      const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t inside = (total + page - 1) / page * page;
      memory = mmap(nullptr, inside + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) {
        throw std::bad_alloc();
      }
      auto* base = static_cast<unsigned char*>(memory);
      const bool after_page = place.guard == Guard::PageBefore;
      mprotect(after_page ? base : base + inside, page, PROT_NONE);
      memory_ = {after_page ? base + page : base + inside - total, Free{base, inside + page}};
    }
    std::memset(memory_.get(), fill, total);
    forbid_before();
  }

  unsigned char* data() const {
    return memory_.get() + before_;
  }
  int64_t bytes() const {
    return bytes_;
  }
  explicit operator bool() const {
    return memory_ != nullptr;
  }

  // The same values elsewhere, the last `fewer` bytes cut off.
  Buffer copy(Place place, int64_t fewer = 0) const {
    Buffer other(bytes_ - fewer, fill_, place, after_);
    std::memcpy(other.data(), data(), static_cast<size_t>(bytes_ - fewer));
    return other;
  }

  void check_guards(const char* name) const {
    if (!memory_) {
      return;
    }
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), static_cast<size_t>(before_));
    check_untouched(name, -before_, 0);
    forbid_before();
    check_untouched(name, bytes_, bytes_ + after_);
  }
  void check_untouched(const char* name, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      if (data()[i] != fill_) {
        throw Failure(std::string(name) + ": byte " + std::to_string(i) + " was written");
      }
    }
  }

 private:
  void forbid_before() const {
    ASAN_POISON_MEMORY_REGION(memory_.get(), static_cast<size_t>(before_ / 8 * 8));
  }
  struct Free {
    unsigned char* base; // of pages; null for the heap's
    size_t size;
    void operator()(unsigned char* memory) const {
      if (base == nullptr) {
        std::free(memory);
      } else {
        ASAN_UNPOISON_MEMORY_REGION(base, size); // the next pages at these addresses are others
        munmap(base, size);
      }
    }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  int64_t bytes_ = 0;
  int64_t before_ = 0;
  int64_t after_ = 0;
  unsigned char fill_ = 0;
};

// Where a tensor lies: beside a forbidden page, or on the heap, half the time off a border of 64 bytes by some elements.
inline Place draw_place(Random& random, DType dtype) {
  switch (random.between(0, 5)) {
    case 0:
      return {0, Guard::PageBefore};
    case 1:
      return {0, Guard::PageAfter};
    case 2:
    case 3:
      return {0, Guard::Heap};
    default:
      return {random.between(1, 2 * Buffer::kAlignment / bytes_of(dtype)) * bytes_of(dtype), Guard::Heap};
  }
}

// Absent, or the same bytes.
inline bool same_bits(const Buffer& a, const Buffer& b) {
  return static_cast<bool>(a) == static_cast<bool>(b) &&
      (!a || (a.bytes() == b.bytes() && std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0));
}
inline bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

// An output of `count` elements, watched on both sides.
inline Buffer draw_output(Random& random, DType dtype, int64_t count) {
  const Place place = draw_place(random, dtype);
  const bool exact = place.guard == Guard::PageAfter || random.coin();
  return {count * bytes_of(dtype), Buffer::kMark, place, exact ? 0 : Buffer::kAlignment};
}

// Strides in elements.
struct Layout {
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  int64_t position(int64_t row, int64_t column) const {
    return row * row_stride + column * column_stride;
  }
  int64_t extent() const {
    return rows == 0 || columns == 0 ? 0 : position(rows - 1, columns - 1) + 1;
  }
};

inline Layout contiguous(int64_t rows, int64_t columns) {
  return {rows, columns, columns, 1};
}

inline Layout draw_layout(Random& random, int64_t rows, int64_t columns) {
  Layout layout = contiguous(rows, columns);
  switch (random.between(0, 13)) {
    default: // contiguous
      break;
    case 0: // a slice of columns
    case 1:
      layout.row_stride = columns + random.between(1, 70);
      break;
    case 2: // every k-th column
      layout.column_stride = random.between(2, 5);
      layout.row_stride = columns * layout.column_stride + random.between(0, 3);
      break;
    case 3: // transposed
    case 4:
      layout = {rows, columns, 1, std::max<int64_t>(1, rows) + random.between(0, 3)};
      break;
    case 5: // transposed, every second row
      layout = {rows, columns, 2, 2 * rows + 1};
      break;
    case 6: // expanded rows
      layout.row_stride = 0;
      break;
    case 7: // expanded columns
      layout = {rows, columns, random.between(1, 3), 0};
      break;
    case 8: // one value
      layout = {rows, columns, 0, 0};
      break;
    case 9: // windows that overlap, as unfold makes them
      layout.row_stride = random.between(1, std::max<int64_t>(1, columns));
      break;
  }
  // The stride of a size of one is never used, and torch keeps whatever it was.
  if (rows == 1 && random.coin()) {
    layout.row_stride = random.between(0, int64_t{1} << 20);
  }
  if (columns == 1 && random.coin()) {
    layout.column_stride = random.between(0, 100);
  }
  return layout;
}

// A matrix in memory as a kernel reads it (NaN wherever no element lies), and its values.
struct Matrix {
  DType dtype = DType::Float64;
  Layout layout{};
  Buffer memory;
  std::vector<double> values; // rows x columns; empty for a matrix that is absent

  bool present() const {
    return static_cast<bool>(memory);
  }
  double at(int64_t row, int64_t column) const {
    return values[static_cast<size_t>(row * layout.columns + column)];
  }
  unsigned char* element(int64_t row, int64_t column) const {
    return memory.data() + layout.position(row, column) * bytes_of(dtype);
  }
  void set(int64_t row, int64_t column, double value) {
    write(dtype, element(row, column), value);
    read_back();
  }
  void read_back() { // rounded, and the same for elements that share their memory
    values.resize(static_cast<size_t>(layout.rows * layout.columns));
    for (int64_t row = 0; row < layout.rows; ++row) {
      for (int64_t column = 0; column < layout.columns; ++column) {
        values[static_cast<size_t>(row * layout.columns + column)] = read(dtype, element(row, column));
      }
    }
  }
  cpu::Strided<const void> strided() const {
    return {present() ? memory.data() : nullptr, layout.row_stride, layout.column_stride};
  }
};

inline Matrix draw_matrix(Random& random, DType dtype, const Layout& layout, Place place) {
  Matrix matrix{dtype, layout, Buffer(layout.extent() * bytes_of(dtype), Buffer::kNan, place), {}};
  for (int64_t row = 0; row < layout.rows; ++row) {
    for (int64_t column = 0; column < layout.columns; ++column) {
      write(dtype, matrix.element(row, column), random.value());
    }
  }
  matrix.read_back();
  return matrix;
}

inline Matrix draw_matrix(Random& random, DType dtype, int64_t rows, int64_t columns) {
  return draw_matrix(random, dtype, draw_layout(random, rows, columns), draw_place(random, dtype));
}

// Weights per element or, expanded over the outputs, per row.
inline Matrix draw_weight(Random& random, DType dtype, int64_t rows, int64_t columns) {
  Layout layout = draw_layout(random, rows, columns);
  if (random.coin()) {
    layout = {rows, columns, random.between(0, 3), 0};
  }
  return draw_matrix(random, dtype, layout, draw_place(random, dtype));
}

} // namespace torchintro::fuzz
