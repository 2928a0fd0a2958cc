// More elements than 32 bits can count: rows beyond the 2^31st of tensors that exist as addresses only. The pages in
// between are never touched, so they take no memory.
#pragma once

#include "residual.h"

#include <sys/mman.h>

namespace torchintro::fuzz {

class AddressSpace {
 public:
  explicit AddressSpace(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) {
      throw Failure("cannot reserve " + std::to_string(bytes >> 30) + " GiB of addresses (is `ulimit -v` set?)");
    }
  }
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;
  ~AddressSpace() {
    munmap(memory_, bytes_);
  }
  unsigned char* data() const {
    return static_cast<unsigned char*>(memory_);
  }

 private:
  size_t bytes_;
  void* memory_;
};

// A small matrix as the last rows of one with `rows` rows, row by row or transposed.
struct LargeMatrix {
  DType dtype;
  Layout layout;
  AddressSpace memory;

  LargeMatrix(const Matrix& last, int64_t rows, bool transposed)
      : dtype(last.dtype),
        layout(transposed ? Layout{rows, last.layout.columns, 1, rows} : contiguous(rows, last.layout.columns)),
        memory(layout.extent() * bytes_of(dtype)) {
    for (int64_t row = 0; row < last.layout.rows; ++row) {
      for (int64_t column = 0; column < last.layout.columns; ++column) {
        const int64_t position = layout.position(rows - last.layout.rows + row, column);
        write(dtype, memory.data() + position * bytes_of(dtype), last.at(row, column));
      }
    }
  }
  cpu::Strided<const void> strided() const {
    return {memory.data(), layout.row_stride, layout.column_stride};
  }
};

constexpr int64_t kRows = (int64_t{1} << 31) + 50;
constexpr int64_t kLast = 37;

inline void last_rows(const Buffer& to, const AddressSpace& from, int64_t row_bytes) {
  std::memcpy(to.data(), from.data() + (kRows - kLast) * row_bytes, static_cast<size_t>(kLast * row_bytes));
}

// The few-outputs kernel on the last rows of more than 2^31, each of several columns.
inline void check_large_few_outputs(cpu::Level level, DType input_type, DType target_type, bool transposed) {
  Random random(1);
  FewOutputsProblem p;
  p.input_type = input_type;
  p.target_type = target_type;
  p.rows = kLast;
  p.features = 5;
  p.outputs = 2;
  p.input = draw_matrix(random, input_type, kLast, 5);
  p.linear_weight = draw_matrix(random, accumulator_of(input_type), contiguous(2, 5), Place());
  p.target = draw_matrix(random, target_type, kLast, 2);
  p.weight = draw_matrix(random, target_type, kLast, 2);
  FewOutputsResults results(random, p);

  const LargeMatrix input(p.input, kRows, transposed);
  const LargeMatrix target(p.target, kRows, transposed);
  const LargeMatrix weight(p.weight, kRows, transposed);
  const AddressSpace grad_input(kRows * 5 * bytes_of(input_type));
  const AddressSpace grad_target(kRows * 2 * bytes_of(target_type));
  cpu::FewOutputs call = call_few_outputs(p, results);
  call.input = input.strided();
  call.target = target.strided();
  call.weight = weight.strided();
  call.grad_input = grad_input.data();
  call.grad_target = grad_target.data();
  const Buffer scratch(few_outputs_scratch_bytes(call), Buffer::kNan);
  cpu::find_kernels(input_type, target_type, level)
      .few_outputs(call, kRows - kLast, kRows, results.sums.data(), scratch.data());

  last_rows(results.grad_input, grad_input, 5 * bytes_of(input_type));
  last_rows(results.grad_target, grad_target, 2 * bytes_of(target_type));
  check_few_outputs(p, results, 0, kLast);
}

// The residual kernel likewise.
inline void check_large_residual(cpu::Level level, DType input_type, DType target_type, bool transposed) {
  Random random(1);
  ResidualProblem p;
  p.input_type = input_type;
  p.target_type = target_type;
  p.rows = kLast;
  p.outputs = 5;
  p.prediction = draw_matrix(random, input_type, contiguous(kLast, 5), Place());
  p.target = draw_matrix(random, target_type, kLast, 5);
  p.weight = draw_matrix(random, target_type, kLast, 5);
  ResidualResults results(random, p);
  results.sums.resize(static_cast<size_t>(p.sums()));

  const LargeMatrix prediction(p.prediction, kRows, false);
  const LargeMatrix target(p.target, kRows, transposed);
  const LargeMatrix weight(p.weight, kRows, transposed);
  const AddressSpace grad_target(kRows * 5 * bytes_of(target_type));
  cpu::Residual call = call_residual(p, results);
  call.prediction = prediction.memory.data();
  call.target = target.strided();
  call.weight = weight.strided();
  call.grad_target = grad_target.data();
  const Buffer scratch(residual_scratch_bytes(call), Buffer::kNan);
  cpu::find_kernels(input_type, target_type, level)
      .residual(call, kRows - kLast, kRows, results.sums.data(), scratch.data());

  last_rows(results.prediction, prediction.memory, 5 * bytes_of(input_type));
  last_rows(results.grad_target, grad_target, 5 * bytes_of(target_type));
  check_residual(p, results, 0, kLast);
}

inline void check_large(cpu::Level level) {
  for (const auto& [input_type, target_type] : kDtypePairs) {
    for (const bool transposed : {false, true}) {
      try {
        check_large_few_outputs(level, input_type, target_type, transposed);
        check_large_residual(level, input_type, target_type, transposed);
      } catch (const Failure& failure) {
        throw Failure(
            std::string("rows beyond the 2^31st, ") + format_of(input_type).name + "/" + format_of(target_type).name +
            (transposed ? ", transposed" : "") + ", at " + cpu::level_name(level) + ": " + failure.what());
      }
    }
  }
}

} // namespace torchintro::fuzz
