// The residual kernel on a random problem: as few_outputs.h.
#pragma once

#include "few_outputs.h"

namespace torchintro::fuzz {

struct ResidualProblem {
  DType input_type = DType::Float32;
  DType target_type = DType::Float32;
  int64_t rows = 0;
  int64_t outputs = 0;
  Matrix prediction; // contiguous
  Matrix target;
  Matrix weight; // may be absent
  double residual_scale = 1;
  double target_scale = -1;
  bool wants_residual = true;
  bool wants_bias = true;
  bool wants_target = true;

  int64_t sums() const {
    return 1 + (wants_bias ? outputs : 0);
  }
  std::string text() const {
    return std::string("residual ") + format_of(input_type).name + "/" + format_of(target_type).name + ", " +
        std::to_string(rows) + " x " + std::to_string(outputs) + strides_text("target", target) +
        strides_text("weight", weight) + ", wanted:" + (wants_residual ? " residual" : "") +
        (wants_bias ? " bias gradient" : "") + (wants_target ? " target gradient" : "");
  }
};

struct ResidualResults {
  Buffer prediction; // overwritten by g
  Buffer grad_target;
  std::vector<double> sums; // of all blocks

  ResidualResults(Random& random, const ResidualProblem& p)
      : prediction(p.prediction.memory.copy(draw_place(random, p.input_type))) {
    if (p.wants_target) {
      grad_target = draw_output(random, p.target_type, p.rows * p.outputs);
    }
  }
};

inline bool same_bits(const ResidualResults& a, const ResidualResults& b) {
  return same_bits(a.sums, b.sums) && same_bits(a.prediction, b.prediction) && same_bits(a.grad_target, b.grad_target);
}

inline cpu::Residual call_residual(const ResidualProblem& p, const ResidualResults& results) {
  cpu::Residual call{};
  call.prediction = results.prediction.data();
  call.target = p.target.strided();
  call.weight = p.weight.strided();
  call.out_features = p.outputs;
  call.residual_scale = p.residual_scale;
  call.target_scale = p.target_scale;
  call.grad_target = p.wants_target ? results.grad_target.data() : nullptr;
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
  p.prediction = draw_matrix(random, input_type, contiguous(rows, outputs), Place());
  p.target = draw_matrix(random, target_type, rows, outputs);
  if (random.coin()) {
    p.weight = draw_weight(random, target_type, rows, outputs);
  }
  p.residual_scale = random.coin() ? 1 : random.uniform(0.01, 2);
  p.target_scale = random.coin() ? -1 : random.uniform(-2, 2);
  p.wants_residual = random.coin();
  p.wants_bias = random.coin();
  p.wants_target = random.one_in(3);
  if (random.one_in(8)) {
    draw_special(random, {&p.prediction, &p.target, &p.weight});
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
  for (Matrix* matrix : {&p.prediction, &p.target, &p.weight}) {
    if (matrix->present()) {
      matrix->memory = matrix->memory.copy(draw_place(random, matrix->dtype));
    }
  }
}

inline void check_residual(const ResidualProblem& p, const ResidualResults& results, int64_t begin, int64_t end) {
  const double rounding = rounding_of(accumulator_of(p.input_type));
  const int64_t rows = end - begin;
  Expected loss(1, 1);
  Expected bias_gradient(p.wants_bias ? 1 : 0, p.outputs);
  Expected residual(rows, p.outputs);
  Expected target_gradient(p.wants_target ? rows : 0, p.outputs);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t o = 0; o < p.outputs; ++o) {
      Sum difference;
      difference.add(p.prediction.at(n, o), 0);
      difference.add(-p.target.at(n, o), 0);
      const double r = difference.value;
      const double r_error = difference.tolerance(2, rounding);
      const double v = p.weight.present() ? p.weight.at(n, o) : 1;
      const double g = p.residual_scale * v * r;
      const double g_error = std::fabs(p.residual_scale * v) * (r_error + 4 * rounding * std::fabs(r));
      loss.at(0, 0).add(v * r * r, std::fabs(v) * (2 * std::fabs(r) + r_error) * r_error);
      residual.at(n - begin, o).add(g, g_error);
      if (p.wants_bias) {
        bias_gradient.at(0, o).add(g, g_error);
      }
      if (p.wants_target) {
        target_gradient.at(n - begin, o).add(p.target_scale * g, std::fabs(p.target_scale) * g_error);
      }
    }
  }
  check_sums("loss", results.sums.data(), loss, rows * p.outputs, rounding);
  check_sums("bias gradient", results.sums.data() + 1, bias_gradient, rows, rounding);
  if (p.wants_target) {
    check_rows("target gradient", results.grad_target, p.target_type, begin, target_gradient, 1, rounding);
  }
  // Predictions that were not computed, or whose g nobody wants, are still there.
  const int64_t row_bytes = p.outputs * bytes_of(p.input_type);
  results.prediction.check_guards("residual");
  for (int64_t n = 0; n < p.rows; ++n) {
    if (p.wants_residual && n >= begin && n < end) {
      for (int64_t o = 0; o < p.outputs; ++o) {
        const Sum& sum = residual.at(n - begin, o);
        const double value = read(p.input_type, results.prediction.data() + n * row_bytes + o * bytes_of(p.input_type));
        check_value("residual", n, o, value, sum.value, sum.tolerance(1, rounding), p.input_type);
      }
    } else if (
        std::memcmp(
            results.prediction.data() + n * row_bytes,
            p.prediction.memory.data() + n * row_bytes,
            static_cast<size_t>(row_bytes)) != 0) {
      throw Failure("residual: row " + std::to_string(n) + " of the prediction was written");
    }
  }
}

} // namespace torchintro::fuzz
