// The moments kernel on a random problem: as few_outputs.h.
#pragma once

#include "few_outputs.h"

namespace torchintro::fuzz {

struct MomentsProblem {
  DType input_type = DType::Float32;
  DType target_type = DType::Float32;
  int64_t rows = 0;
  int64_t features = 0;
  int64_t outputs = 0;
  Matrix input;
  Matrix target;
  Matrix weight; // one column of float64; may be absent
  Matrix shift; // one row: of the features, zeros, of the outputs

  int64_t sums() const {
    cpu::RowMoments call{};
    call.in_features = features;
    call.out_features = outputs;
    return moments_sums(call);
  }
  int64_t target_shift() const {
    return cpu::round_up(features, 16);
  }
  std::string text() const {
    return std::string("moments ") + format_of(input_type).name + "/" + format_of(target_type).name + ", " +
        std::to_string(rows) + " x " + std::to_string(features) + " -> " + std::to_string(outputs) +
        strides_text("input", input) + strides_text("target", target) + (weight.present() ? ", weights" : "");
  }
};

struct MomentsResults {
  std::vector<double> sums; // of all blocks
};

inline bool same_bits(const MomentsResults& a, const MomentsResults& b) {
  return same_bits(a.sums, b.sums);
}

inline cpu::RowMoments call_moments(const MomentsProblem& p) {
  cpu::RowMoments call{};
  call.input = p.input.strided();
  call.target = p.target.strided();
  call.target_type = p.target_type;
  call.weight = p.weight.present() ? reinterpret_cast<const double*>(p.weight.memory.data()) : nullptr;
  call.shift = reinterpret_cast<const double*>(p.shift.memory.data());
  call.rows = p.rows;
  call.in_features = p.features;
  call.out_features = p.outputs;
  return call;
}

inline MomentsProblem draw_moments_problem(
    Random& random, DType input_type, DType target_type, int64_t rows, int64_t features, int64_t outputs) {
  MomentsProblem p;
  p.input_type = input_type;
  p.target_type = target_type;
  p.rows = rows;
  p.features = features;
  p.outputs = outputs;
  p.input = draw_matrix(random, input_type, rows, features);
  p.target = draw_matrix(random, target_type, rows, outputs);
  if (random.coin()) {
    p.weight = draw_matrix(random, DType::Float64, contiguous(rows, 1), draw_place(random, DType::Float64));
  }
  if (random.one_in(8)) {
    draw_special(random, {&p.input, &p.target, &p.weight});
  }
  const Layout layout = contiguous(1, p.target_shift() + outputs);
  p.shift = draw_matrix(random, DType::Float64, layout, draw_place(random, DType::Float64));
  for (int64_t d = features; d < p.target_shift(); ++d) {
    p.shift.set(0, d, 0);
  }
  return p;
}

inline MomentsProblem draw_moments_problem(Random& random) {
  const DType input_type = draw_dtypes(random).input; // all pairs of types go together
  const DType target_type = draw_dtypes(random).target;
  const int64_t features = draw_features(random);
  const int64_t outputs = draw_few_outputs(random);
  const int64_t most = std::max<int64_t>(40, 400000 / (features * (features + outputs)));
  return draw_moments_problem(random, input_type, target_type, std::min(draw_rows(random), most), features, outputs);
}

inline void move(Random& random, MomentsProblem& p) {
  for (Matrix* matrix : {&p.input, &p.target, &p.weight, &p.shift}) {
    if (matrix->present()) {
      matrix->memory = matrix->memory.copy(draw_place(random, matrix->dtype));
    }
  }
}

// The sums of rows begin .. end, by plain loops in double.
inline void check_moments(const MomentsProblem& p, const MomentsResults& results, int64_t begin, int64_t end) {
  const double rounding = rounding_of(DType::Float64);
  const int64_t rows = end - begin;
  Expected count(1, 1), sum_y(1, p.outputs), syy(1, p.outputs), sum_x(1, p.features), sxy(p.outputs, p.features),
      sxx(p.features, p.features);
  std::vector<double> x(static_cast<size_t>(p.features));
  for (int64_t n = begin; n < end; ++n) {
    const double v = p.weight.present() ? p.weight.at(n, 0) : 1;
    count.at(0, 0).add(v, 0);
    for (int64_t d = 0; d < p.features; ++d) {
      x[static_cast<size_t>(d)] = p.input.at(n, d) - p.shift.at(0, d);
      sum_x.at(0, d).add(v * x[static_cast<size_t>(d)], 0);
    }
    for (int64_t o = 0; o < p.outputs; ++o) {
      const double y = p.target.at(n, o) - p.shift.at(0, p.target_shift() + o);
      sum_y.at(0, o).add(v * y, 0);
      syy.at(0, o).add(v * y * y, 0);
      for (int64_t d = 0; d < p.features; ++d) {
        sxy.at(o, d).add(v * y * x[static_cast<size_t>(d)], 0);
      }
    }
    for (int64_t i = 0; i < p.features; ++i) {
      for (int64_t d = i; d < p.features; ++d) {
        sxx.at(i, d).add(v * x[static_cast<size_t>(i)] * x[static_cast<size_t>(d)], 0);
      }
    }
  }
  const cpu::RowMoments call = call_moments(p);
  const double* sums = results.sums.data();
  const double* matrix = sums + moments_matrix(call);
  const int64_t stride = moments_stride(call);
  check_sums("count", sums, count, rows, rounding);
  check_sums("sum_y", sums + 1, sum_y, rows, rounding);
  check_sums("syy", sums + 1 + p.outputs, syy, rows, rounding);
  check_sums("sum_x", matrix, sum_x, rows, rounding);
  const auto check = [&](const char* name, int64_t row, int64_t column, double value, const Sum& sum) {
    check_value(name, row, column, value, sum.value, sum.tolerance(rows, rounding), DType::Float64);
  };
  for (int64_t d = 0; d < p.features; ++d) {
    for (int64_t o = 0; o < p.outputs; ++o) {
      check("sxy", o, d, matrix[(1 + o) * stride + d], sxy.at(o, d));
    }
    for (int64_t i = 0; i <= d; ++i) {
      check("sxx", i, d, matrix[(moments_extra(call) + i) * stride + d], sxx.at(i, d));
    }
  }
}

} // namespace torchintro::fuzz
