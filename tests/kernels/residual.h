// The residual kernel on a random problem: as few_outputs.h.
#pragma once

#include "few_outputs.h"

namespace torchintro::fuzz {

struct ResidualProblem {
  DType input_type = DType::Float32;
  DType target_type = DType::Float32;
  int64_t rows = 0;
  int64_t outputs = 0;
  Matrix product; // contiguous
  Matrix linear_bias; // one row, of the accumulator's type; may be absent
  Matrix target;
  Matrix weight; // may be absent
  double residual_scale = 1;
  double target_scale = -1;
  bool wants_residual = true;
  bool wants_bias = true;
  bool wants_target = true;
  Tile target_tile{}; // where the target's gradient lies in the one of all outputs

  int64_t sums() const {
    return 1 + (wants_bias ? outputs : 0);
  }
  std::string text() const {
    return std::string("residual ") + format_of(input_type).name + "/" + format_of(target_type).name + ", " +
        std::to_string(rows) + " x " + std::to_string(outputs) + strides_text("target", target) +
        strides_text("weight", weight) + (linear_bias.present() ? ", bias" : "") +
        ", wanted:" + (wants_residual ? " residual" : "") + (wants_bias ? " bias gradient" : "") +
        (wants_target ? " target gradient in columns " + std::to_string(target_tile.first) + " .. of " +
                 std::to_string(target_tile.row)
                      : "");
  }
};

struct ResidualResults {
  Buffer product; // overwritten by g
  Buffer grad_target;
  std::vector<double> sums; // of all blocks

  ResidualResults(Random& random, const ResidualProblem& p)
      : product(p.product.memory.copy(draw_place(random, p.input_type))) {
    if (p.wants_target) {
      grad_target = draw_output(random, p.target_type, p.rows * p.target_tile.row);
    }
  }
};

inline bool same_bits(const ResidualResults& a, const ResidualResults& b) {
  return same_bits(a.sums, b.sums) && same_bits(a.product, b.product) && same_bits(a.grad_target, b.grad_target);
}

inline cpu::Residual call_residual(const ResidualProblem& p, const ResidualResults& results) {
  cpu::Residual call{};
  call.product = results.product.data();
  call.linear_bias = p.linear_bias.present() ? p.linear_bias.memory.data() : nullptr;
  call.target = p.target.strided();
  call.weight = p.weight.strided();
  call.outputs = p.outputs;
  call.residual_scale = p.residual_scale;
  call.target_scale = p.target_scale;
  if (p.wants_target) {
    call.grad_target = results.grad_target.data() + p.target_tile.first * bytes_of(p.target_type);
    call.grad_target_row_stride = p.target_tile.row;
  }
  call.wants_residual = p.wants_residual;
  call.wants_bias_gradient = p.wants_bias;
  return call;
}

inline ResidualProblem draw_residual_problem(
    Random& random, DType input_type, DType target_type, int64_t rows, int64_t outputs) {
  ResidualProblem p;
  p.input_type = input_type;
  p.target_type = target_type;
  p.rows = rows;
  p.outputs = outputs;
  p.product = draw_matrix(random, input_type, contiguous(rows, outputs), Place());
  if (random.coin()) {
    const DType accumulator = accumulator_of(input_type);
    p.linear_bias = draw_matrix(random, accumulator, contiguous(1, outputs), draw_place(random, accumulator));
  }
  p.target = draw_matrix(random, target_type, rows, outputs);
  if (random.coin()) {
    p.weight = draw_weight(random, target_type, rows, outputs);
  }
  p.residual_scale = random.coin() ? 1 : random.uniform(0.01, 2);
  p.target_scale = random.coin() ? -1 : random.uniform(-2, 2);
  p.wants_residual = random.coin();
  p.wants_bias = random.coin();
  p.wants_target = random.coin();
  p.target_tile = {outputs, 0};
  if (random.coin()) { // the first, a middle or the last tile of a row
    const int64_t others = random.between(1, 70);
    p.target_tile = {outputs + others, random.pick({0, random.between(0, others), others})};
  }
  if (random.one_in(8)) {
    draw_special(random, {&p.product, &p.linear_bias, &p.target, &p.weight});
  }
  return p;
}

inline ResidualProblem draw_residual_problem(Random& random) {
  const auto [input_type, target_type] = draw_dtypes(random);
  const int64_t outputs = draw_features(random); // the same sizes around vectors
  const int64_t most = std::max<int64_t>(40, 20000 / outputs);
  return draw_residual_problem(random, input_type, target_type, std::min(draw_rows(random), most), outputs);
}

inline void move(Random& random, ResidualProblem& p) {
  for (Matrix* matrix : {&p.product, &p.linear_bias, &p.target, &p.weight}) {
    if (matrix->present()) {
      matrix->memory = matrix->memory.copy(draw_place(random, matrix->dtype));
    }
  }
}

// What rows begin .. end give, by plain loops in double: sums not scaled, the others as they are stored.
struct ResidualExpected {
  Expected loss;
  Expected bias_gradient; // this and target_gradient have no rows where not wanted
  Expected residual;
  Expected target_gradient;
};

inline ResidualExpected expect_residual(const ResidualProblem& p, int64_t begin, int64_t end) {
  const double rounding = rounding_of(accumulator_of(p.input_type));
  const int64_t rows = end - begin;
  ResidualExpected expected{
      {1, 1}, {p.wants_bias ? 1 : 0, p.outputs}, {rows, p.outputs}, {p.wants_target ? rows : 0, p.outputs}};
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t o = 0; o < p.outputs; ++o) {
      Sum difference;
      difference.add(p.product.at(n, o), 0);
      difference.add(p.linear_bias.present() ? p.linear_bias.at(0, o) : 0, 0);
      difference.add(p.target.present() ? -p.target.at(n, o) : 0, 0);
      const double r = difference.value;
      const double r_error = difference.tolerance(3, rounding);
      const double v = p.weight.present() ? p.weight.at(n, o) : 1;
      const double g = p.residual_scale * v * r;
      const double g_error = std::fabs(p.residual_scale * v) * (r_error + 4 * rounding * std::fabs(r));
      expected.loss.at(0, 0).add(v * r * r, std::fabs(v) * (2 * std::fabs(r) + r_error) * r_error);
      expected.residual.at(n - begin, o).add(g, g_error);
      if (p.wants_bias) {
        expected.bias_gradient.at(0, o).add(g, g_error);
      }
      if (p.wants_target) {
        expected.target_gradient.at(n - begin, o).add(p.target_scale * g, std::fabs(p.target_scale) * g_error);
      }
    }
  }
  return expected;
}

inline void check_residual(
    const ResidualProblem& p,
    const ResidualResults& results,
    const ResidualExpected& expected,
    int64_t begin,
    int64_t end) {
  const double rounding = rounding_of(accumulator_of(p.input_type));
  const int64_t rows = end - begin;
  check_sums("loss", results.sums.data(), expected.loss, rows * p.outputs, rounding);
  check_sums("bias gradient", results.sums.data() + 1, expected.bias_gradient, rows, rounding);
  if (p.wants_target) {
    check_rows(
        "target gradient",
        results.grad_target,
        p.target_type,
        begin,
        expected.target_gradient,
        1,
        rounding,
        p.target_tile);
  }
  // Products that were not computed, or whose g nobody wants, are still there.
  const int64_t row_bytes = p.outputs * bytes_of(p.input_type);
  results.product.check_guards("residual");
  for (int64_t n = 0; n < p.rows; ++n) {
    if (p.wants_residual && n >= begin && n < end) {
      for (int64_t o = 0; o < p.outputs; ++o) {
        const Sum& sum = expected.residual.at(n - begin, o);
        const double value = read(p.input_type, results.product.data() + n * row_bytes + o * bytes_of(p.input_type));
        check_value("residual", n, o, value, sum.value, sum.tolerance(1, rounding), p.input_type);
      }
    } else if (
        std::memcmp(
            results.product.data() + n * row_bytes,
            p.product.memory.data() + n * row_bytes,
            static_cast<size_t>(row_bytes)) != 0) {
      throw Failure("residual: row " + std::to_string(n) + " of the product was written");
    }
  }
}

inline void check_residual(const ResidualProblem& p, const ResidualResults& results, int64_t begin, int64_t end) {
  check_residual(p, results, expect_residual(p, begin, end), begin, end);
}

} // namespace torchintro::fuzz
