// The few-outputs kernel on a random problem: drawing it, calling the kernel, and the formula of kernels.h as plain loops.
#pragma once

#include "compare.h"

namespace torchintro::fuzz {

inline std::string strides_text(const char* name, const Matrix& matrix) {
  return matrix.present() ? std::string(", ") + name + " strides (" + std::to_string(matrix.layout.row_stride) + ", " +
          std::to_string(matrix.layout.column_stride) + ")"
                          : std::string();
}

struct FewOutputsProblem {
  DType input_type = DType::Float32;
  DType target_type = DType::Float32;
  int64_t rows = 0;
  int64_t features = 0;
  int64_t outputs = 0; // of all models together
  int64_t models = 1;
  Matrix input;
  Matrix linear_weight; // of the accumulator's type, as the kernel is given it
  Matrix linear_bias; // one row; may be absent
  Matrix target;
  Matrix weight; // may be absent
  double residual_scale = 1;
  double target_scale = -1;
  double input_scale = 1;
  bool wants_input = true;
  bool wants_weight = true;
  bool wants_target = true;
  bool past_caches = false;

  int64_t columns() const { // of target and weight
    return outputs / models;
  }
  int64_t sums() const {
    return models + outputs + (wants_weight ? outputs * features : 0);
  }
  std::string text() const {
    return std::string("few_outputs ") + format_of(input_type).name + "/" + format_of(target_type).name + ", " +
        std::to_string(rows) + " x " + std::to_string(features) + " -> " + std::to_string(outputs) +
        (models > 1 ? " of " + std::to_string(models) + " models" : "") + strides_text("input", input) +
        strides_text("target", target) + strides_text("weight", weight) + (linear_bias.present() ? ", bias" : "") +
        ", gradients:" + (wants_input ? " input" : "") + (wants_weight ? " linear_weight" : "") +
        (wants_target ? " target" : "") + (past_caches ? ", past the caches" : "");
  }
};

struct FewOutputsResults {
  Buffer grad_input;
  Buffer grad_target;
  std::vector<double> sums; // of all blocks

  FewOutputsResults(Random& random, const FewOutputsProblem& p)
      : sums(static_cast<size_t>(p.sums())) {
    if (p.wants_input) {
      grad_input = draw_output(random, p.input_type, p.rows * p.features);
    }
    if (p.wants_target) {
      grad_target = draw_output(random, p.target_type, p.rows * p.outputs);
    }
  }
};

inline bool same_bits(const FewOutputsResults& a, const FewOutputsResults& b) {
  return same_bits(a.sums, b.sums) && same_bits(a.grad_input, b.grad_input) && same_bits(a.grad_target, b.grad_target);
}

inline cpu::FewOutputs call_few_outputs(const FewOutputsProblem& p, const FewOutputsResults& results) {
  cpu::FewOutputs call{};
  call.input = p.input.strided();
  call.linear_weight = p.linear_weight.memory.data();
  call.linear_bias = p.linear_bias.present() ? p.linear_bias.memory.data() : nullptr;
  call.target = p.target.strided();
  call.weight = p.weight.strided();
  call.rows = p.rows;
  call.in_features = p.features;
  call.out_features = p.outputs;
  call.models = p.models;
  call.residual_scale = p.residual_scale;
  call.target_scale = p.target_scale;
  call.input_scale = p.input_scale;
  call.grad_input = p.wants_input ? results.grad_input.data() : nullptr;
  call.grad_target = p.wants_target ? results.grad_target.data() : nullptr;
  call.wants_weight_gradient = p.wants_weight;
  call.past_caches = p.past_caches;
  return call;
}

inline int64_t draw_rows(Random& random) {
  const int64_t kind = random.between(0, 19);
  return kind < 8 ? random.between(1, 40)
      : kind < 15 ? random.pick({7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257})
      : kind < 19 ? random.between(1, 600)
                  : random.between(0, 1);
}

inline int64_t draw_features(Random& random) {
  const int64_t kind = random.between(0, 9);
  return kind < 5 ? random.between(1, 20)
      : kind < 8  ? random.pick({23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129})
                  : random.between(1, 300);
}

inline int64_t draw_few_outputs(Random& random) {
  const int64_t kind = random.between(0, 9);
  return kind < 3 ? 1
      : kind < 6  ? random.between(2, 5)
      : kind < 9  ? random.between(6, 17)
                  : random.between(1, cpu::kMaximumFewOutputs);
}

inline DtypePair draw_dtypes(Random& random) {
  return kDtypePairs[random.between(0, std::size(kDtypePairs) - 1)];
}

// One value that is not finite, in one of the matrices.
inline void draw_special(Random& random, std::initializer_list<Matrix*> matrices) {
  Matrix& matrix = *matrices.begin()[random.between(0, static_cast<int64_t>(matrices.size()) - 1)];
  if (matrix.present() && !matrix.values.empty()) {
    const double infinity = std::numeric_limits<double>::infinity();
    const double value = random.coin() ? std::numeric_limits<double>::quiet_NaN()
        : random.coin()                ? infinity
                                       : -infinity;
    matrix.set(random.between(0, matrix.layout.rows - 1), random.between(0, matrix.layout.columns - 1), value);
  }
}

// Everything of given sizes.
inline FewOutputsProblem draw_few_outputs_problem(
    Random& random,
    DType input_type,
    DType target_type,
    int64_t rows,
    int64_t features,
    int64_t outputs,
    int64_t models = 1) {
  FewOutputsProblem p;
  p.input_type = input_type;
  p.target_type = target_type;
  p.rows = rows;
  p.features = features;
  p.outputs = outputs;
  p.models = models;
  const DType accumulator = accumulator_of(input_type);
  p.input = draw_matrix(random, input_type, rows, features);
  p.linear_weight = draw_matrix(random, accumulator, contiguous(outputs, features), draw_place(random, accumulator));
  if (random.coin()) {
    p.linear_bias = draw_matrix(random, accumulator, contiguous(1, outputs), draw_place(random, accumulator));
  }
  p.target = draw_matrix(random, target_type, rows, p.columns());
  if (random.coin()) {
    p.weight = draw_weight(random, target_type, rows, p.columns());
  }
  p.residual_scale = random.coin() ? 1 : random.uniform(0.01, 2);
  p.target_scale = random.coin() ? -1 : random.uniform(-2, 2);
  p.input_scale = random.coin() ? 1 : random.uniform(0.01, 2);
  p.wants_input = random.coin();
  p.wants_weight = !random.one_in(3);
  p.wants_target = models == 1 && random.one_in(3);
  p.past_caches = random.coin();
  if (random.one_in(8)) {
    draw_special(random, {&p.input, &p.linear_weight, &p.linear_bias, &p.target, &p.weight});
  }
  return p;
}

inline FewOutputsProblem draw_few_outputs_problem(Random& random) {
  const auto [input_type, target_type] = draw_dtypes(random);
  const int64_t features = draw_features(random);
  int64_t outputs = draw_few_outputs(random);
  const int64_t models = random.one_in(3) ? random.between(1, outputs) : 1;
  outputs = outputs / models * models;
  // The loops of the reference are what takes time.
  const int64_t most = std::max<int64_t>(40, (random.one_in(50) ? 2000000 : 100000) / (features * outputs));
  return draw_few_outputs_problem(
      random, input_type, target_type, std::min(draw_rows(random), most), features, outputs, models);
}

// The same values at other addresses.
inline void move(Random& random, FewOutputsProblem& p) {
  for (Matrix* matrix : {&p.input, &p.linear_weight, &p.linear_bias, &p.target, &p.weight}) {
    if (matrix->present()) {
      matrix->memory = matrix->memory.copy(draw_place(random, matrix->dtype));
    }
  }
}

// What rows begin .. end give, by plain loops in double: sums not scaled, gradients as they are stored.
struct FewOutputsExpected {
  Expected loss;
  Expected bias_gradient;
  Expected weight_gradient; // these three have no rows where not wanted
  Expected input_gradient;
  Expected target_gradient;
};

inline FewOutputsExpected expect_few_outputs(const FewOutputsProblem& p, int64_t begin, int64_t end) {
  const double rounding = rounding_of(accumulator_of(p.input_type));
  const int64_t rows = end - begin;
  FewOutputsExpected expected{
      {1, p.models},
      {1, p.outputs},
      {p.wants_weight ? p.outputs : 0, p.features},
      {p.wants_input ? rows : 0, p.features},
      {p.wants_target ? rows : 0, p.outputs}};
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t o = 0; o < p.outputs; ++o) {
      Sum residual;
      for (int64_t d = 0; d < p.features; ++d) {
        residual.add(p.input.at(n, d) * p.linear_weight.at(o, d), 0);
      }
      residual.add(p.linear_bias.present() ? p.linear_bias.at(0, o) : 0, 0);
      const int64_t column = o % p.columns();
      residual.add(-p.target.at(n, column), 0);
      const double r = residual.value;
      const double r_error = residual.tolerance(p.features + 2, rounding);
      const double v = p.weight.present() ? p.weight.at(n, column) : 1;
      const double g = p.residual_scale * v * r;
      const double g_error = std::fabs(p.residual_scale * v) * (r_error + 4 * rounding * std::fabs(r));
      expected.loss.at(0, o / p.columns()).add(v * r * r, std::fabs(v) * (2 * std::fabs(r) + r_error) * r_error);
      expected.bias_gradient.at(0, o).add(g, g_error);
      for (int64_t d = 0; p.wants_weight && d < p.features; ++d) {
        const double x = p.input.at(n, d);
        expected.weight_gradient.at(o, d).add(g * x, g_error * std::fabs(x));
      }
      for (int64_t d = 0; p.wants_input && d < p.features; ++d) {
        const double w = p.input_scale * p.linear_weight.at(o, d);
        expected.input_gradient.at(n - begin, d).add(g * w, g_error * std::fabs(w));
      }
      if (p.wants_target) {
        expected.target_gradient.at(n - begin, o).add(p.target_scale * g, std::fabs(p.target_scale) * g_error);
      }
    }
  }
  return expected;
}

// The results of rows begin .. end.
inline void check_few_outputs(
    const FewOutputsProblem& p, const FewOutputsResults& results, int64_t begin, int64_t end) {
  const double rounding = rounding_of(accumulator_of(p.input_type));
  const int64_t rows = end - begin;
  const FewOutputsExpected expected = expect_few_outputs(p, begin, end);
  const double* sums = results.sums.data();
  check_sums("loss", sums, expected.loss, rows * p.columns(), rounding);
  check_sums("bias gradient", sums + p.models, expected.bias_gradient, rows, rounding);
  check_sums("weight gradient", sums + p.models + p.outputs, expected.weight_gradient, rows, rounding);
  if (p.wants_input) {
    check_rows("input gradient", results.grad_input, p.input_type, begin, expected.input_gradient, p.outputs, rounding);
  }
  if (p.wants_target) {
    check_rows("target gradient", results.grad_target, p.target_type, begin, expected.target_gradient, 1, rounding);
  }
}

} // namespace torchintro::fuzz
