// The CUDA kernels' calls on random problems: what few_outputs.h and residual.h have, and what only these calls have.
#pragma once

#include "cuda/kernels/few_outputs.h"
#include "cuda/kernels/residual_step.h"
#include "machine.h"
#include "residual.h"

#include <array>

namespace torchintro::fuzz {

inline cuda::Dtype cuda_dtype(DType dtype) {
  switch (dtype) {
    case DType::Float64:
      return cuda::Dtype::Float64;
    case DType::Float32:
      return cuda::Dtype::Float32;
    case DType::BFloat16:
      return cuda::Dtype::BFloat16;
    case DType::Float16:
      return cuda::Dtype::Float16;
  }
  return {};
}

inline cuda::Matrix cuda_matrix(const Matrix& matrix) {
  return {matrix.present() ? matrix.memory.data() : nullptr, matrix.layout.row_stride, matrix.layout.column_stride};
}

inline const void* data_or_null(const Buffer& buffer) {
  return buffer ? buffer.data() : nullptr;
}
inline void* data_or_null(Buffer& buffer) {
  return buffer ? buffer.data() : nullptr;
}

// What both calls have besides their matrices.
struct Factors {
  double residual = 1;
  double weight_sum = 1;
  Buffer weight_sum_memory; // absent for 1

  const double* pointer() const {
    return weight_sum_memory ? reinterpret_cast<const double*>(weight_sum_memory.data()) : nullptr;
  }
  double residual_scale() const {
    return residual / weight_sum;
  }
};

inline Factors draw_factors(Random& random) {
  Factors factors;
  factors.residual = random.coin() ? 1 : random.uniform(0.01, 2);
  if (random.coin()) {
    factors.weight_sum = random.uniform(0.5, 50);
    factors.weight_sum_memory = Buffer(8, Buffer::kMark);
    write(DType::Float64, factors.weight_sum_memory.data(), factors.weight_sum);
  }
  return factors;
}

// As cudaMalloc's memory, aligned to 256 bytes; at a page that may not be touched, with NaN in it.
inline Buffer draw_workspace(Random& random, size_t bytes) {
  const size_t aligned = (bytes + 255) / 256 * 256;
  return {static_cast<int64_t>(aligned), Buffer::kNan, {0, random.coin() ? Guard::PageBefore : Guard::PageAfter}};
}

// What a call wrote, and the same memory as before the call.
using Bytes = std::vector<unsigned char>;
inline Bytes bytes_in(const Buffer& buffer) {
  return buffer ? Bytes(buffer.data(), buffer.data() + buffer.bytes()) : Bytes();
}
inline void put_bytes(const Buffer& buffer, const Bytes& bytes) {
  if (buffer) {
    std::copy(bytes.begin(), bytes.end(), buffer.data());
  }
}

// Sizes around those that blocks, warps, packs and tiles have.
inline int64_t draw_width(Random& random) {
  const int64_t kind = random.between(0, 19);
  return kind < 6 ? draw_features(random)
      : kind < 10 ? 8 * random.between(1, 24)
      : kind < 13 ? 16 * random.between(1, 24)
      : kind < 16 ? 128 * random.between(1, 6) + random.pick({-8, -1, 0, 0, 0, 1, 8})
      : kind < 18 ? (int64_t{1} << random.between(0, 10)) + random.pick({-1, 0, 1})
                  : random.between(1, random.one_in(4) ? 4000 : 1000);
}

// In rows whose begins are multiples of 16 bytes, half the time: what the fast paths ask for.
inline Matrix draw_cuda_matrix(Random& random, DType dtype, int64_t rows, int64_t columns) {
  if (random.coin()) {
    return draw_matrix(random, dtype, rows, columns);
  }
  Layout layout = contiguous(rows, columns);
  if (random.one_in(3)) {
    layout.row_stride = (columns + 7) / 8 * 8 + 8 * random.between(0, 9);
  }
  const Place place = random.one_in(3) ? draw_place(random, dtype) : Place{0, Guard::PageBefore};
  return draw_matrix(random, dtype, layout, place);
}

// --- few_outputs

struct CudaFewOutputs {
  FewOutputsProblem p;
  Factors factors;
  double loss_factor = 1;
  double weight_factor = 1;
  bool wants_bias = true;
  int multiprocessors = 1;

  // What the gradients of linear_weight and linear_bias are stored in.
  DType weight_gradient_type() const {
    return p.input_type == DType::Float16 ? DType::Float32 : p.input_type;
  }
  std::string text() const {
    return "cuda " + p.text() + (wants_bias ? " linear_bias" : "") +
        (factors.pointer() == nullptr ? "" : ", weight sum") + ", " + std::to_string(multiprocessors) +
        " multiprocessors";
  }
};

inline CudaFewOutputs draw_cuda_few_outputs(
    Random& random, DType input_type, DType target_type, int64_t rows, int64_t features, int64_t outputs) {
  CudaFewOutputs problem;
  FewOutputsProblem& p = problem.p;
  // Drawn small, then given their sizes.
  p = draw_few_outputs_problem(random, input_type, target_type, 1, 1, 1);
  p.rows = rows;
  p.features = features;
  p.outputs = outputs;
  p.input = draw_cuda_matrix(random, input_type, rows, features);
  const auto draw_parameter = [&](int64_t parameter_rows, int64_t columns) {
    const Place place = random.coin() ? draw_place(random, input_type) : Place();
    return draw_matrix(random, input_type, contiguous(parameter_rows, columns), place);
  };
  p.linear_weight = draw_parameter(outputs, features);
  p.linear_bias = random.coin() ? draw_parameter(1, outputs) : Matrix();
  p.target = draw_cuda_matrix(random, target_type, rows, outputs);
  p.weight = random.coin() ? draw_weight(random, target_type, rows, outputs) : Matrix();
  p.past_caches = false;
  if (random.one_in(8)) {
    draw_special(random, {&p.input, &p.linear_weight, &p.linear_bias, &p.target, &p.weight});
  }
  problem.factors = draw_factors(random);
  p.residual_scale = problem.factors.residual_scale();
  problem.loss_factor = random.coin() ? 1 : random.uniform(0.001, 2);
  problem.weight_factor = random.coin() ? 1 : random.uniform(-2, 2);
  problem.wants_bias = random.coin();
  problem.multiprocessors = static_cast<int>(random.between(1, 8));
  return problem;
}

// `cost`: how many products the largest has, in general.
inline CudaFewOutputs draw_cuda_few_outputs(Random& random, int64_t cost) {
  const auto [input_type, target_type] = draw_dtypes(random);
  if (random.one_in(500)) { // so many rows that a block takes several turns
    const int64_t rows = random.between(30000, 50000);
    return draw_cuda_few_outputs(random, input_type, target_type, rows, random.between(1, 8), random.between(1, 2));
  }
  const int64_t features = random.one_in(50) ? 0 : draw_width(random);
  const int64_t outputs = random.between(1, random.coin() ? 4 : cuda::kMaxFewOutputs);
  const int64_t wanted = random.one_in(100) ? random.between(600, 6000) : draw_rows(random);
  const int64_t most = (random.one_in(20) ? 10 * cost : cost) / (std::max<int64_t>(1, features) * outputs);
  const int64_t rows = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(10, most));
  return draw_cuda_few_outputs(random, input_type, target_type, rows, features, outputs);
}

struct CudaFewOutputsResults {
  Buffer loss;
  Buffer grad_input; // null where not wanted, as all below
  Buffer grad_weight;
  Buffer grad_target;
  Buffer grad_bias;

  CudaFewOutputsResults(Random& random, const CudaFewOutputs& problem) {
    const FewOutputsProblem& p = problem.p;
    const auto draw = [&](bool wanted, DType dtype, int64_t count) {
      return !wanted ? Buffer() : random.coin() ? draw_output(random, dtype, count) : aligned_output(dtype, count);
    };
    loss = draw(true, p.target_type, 1);
    grad_input = draw(p.wants_input, p.input_type, p.rows * p.features);
    grad_weight = draw(p.wants_weight, problem.weight_gradient_type(), p.outputs * p.features);
    grad_target = draw(p.wants_target, p.target_type, p.rows * p.outputs);
    grad_bias = draw(problem.wants_bias, problem.weight_gradient_type(), p.outputs);
  }
  std::array<Buffer*, 5> all() {
    return {&loss, &grad_input, &grad_weight, &grad_target, &grad_bias};
  }

 private:
  static Buffer aligned_output(DType dtype, int64_t count) {
    return {count * bytes_of(dtype), Buffer::kMark, Place(), Buffer::kAlignment};
  }
};

// For calls that are told how many multiprocessors there are.
template <typename Call>
auto set_multiprocessors(Call& call, int count) -> decltype(void(call.multiprocessors = count)) {
  call.multiprocessors = count;
}
inline void set_multiprocessors(...) {}

inline cuda::FewOutputsCall call_cuda(const CudaFewOutputs& problem, CudaFewOutputsResults& results) {
  const FewOutputsProblem& p = problem.p;
  cuda::FewOutputsCall call{};
  call.rows = p.rows;
  call.in_features = p.features;
  call.out_features = static_cast<int>(p.outputs);
  call.dtype = cuda_dtype(p.input_type);
  call.target_dtype = cuda_dtype(p.target_type);
  call.input = cuda_matrix(p.input);
  call.target = cuda_matrix(p.target);
  call.weight = cuda_matrix(p.weight);
  call.linear_weight = p.linear_weight.memory.data();
  call.linear_bias = data_or_null(p.linear_bias.memory);
  call.weight_sum = problem.factors.pointer();
  call.loss_factor = problem.loss_factor;
  call.residual_factor = problem.factors.residual;
  call.weight_gradient_factor = problem.weight_factor;
  call.target_gradient_factor = p.target_scale;
  call.input_gradient_factor = p.input_scale;
  set_multiprocessors(call, problem.multiprocessors);
  call.loss = results.loss.data();
  call.grad_input = data_or_null(results.grad_input);
  call.grad_linear_weight = data_or_null(results.grad_weight);
  call.grad_target = data_or_null(results.grad_target);
  call.grad_linear_bias = data_or_null(results.grad_bias);
  return call;
}

// Runs the call; `fewer` bytes of the workspace are left out.
inline void run_cuda(Random& random, const cuda::FewOutputsCall& call, int64_t fewer = 0) {
  const size_t bytes = few_outputs_workspace(call);
  const Buffer workspace =
      fewer == 0 ? draw_workspace(random, bytes) : Buffer(static_cast<int64_t>(bytes) - fewer, Buffer::kNan);
  if (cuda::few_outputs(call, workspace.data(), nullptr) != cudaSuccess) {
    throw Failure("few_outputs returned an error");
  }
}

inline void check_cuda(const CudaFewOutputs& problem, const CudaFewOutputsResults& results) {
  const FewOutputsProblem& p = problem.p;
  const double rounding = rounding_of(accumulator_of(p.input_type));
  FewOutputsExpected expected = expect_few_outputs(p, 0, p.rows);
  expected.loss.scale(problem.loss_factor / problem.factors.weight_sum);
  expected.bias_gradient.scale(problem.weight_factor);
  expected.weight_gradient.scale(problem.weight_factor);
  const DType weight_type = problem.weight_gradient_type();
  check_rows("loss", results.loss, p.target_type, 0, expected.loss, p.rows * p.outputs, rounding);
  if (p.wants_input) {
    check_rows("input gradient", results.grad_input, p.input_type, 0, expected.input_gradient, p.outputs, rounding);
  }
  if (p.wants_weight) {
    check_rows("weight gradient", results.grad_weight, weight_type, 0, expected.weight_gradient, p.rows, rounding);
  }
  if (p.wants_target) {
    check_rows("target gradient", results.grad_target, p.target_type, 0, expected.target_gradient, 1, rounding);
  }
  if (problem.wants_bias) {
    check_rows("bias gradient", results.grad_bias, weight_type, 0, expected.bias_gradient, p.rows, rounding);
  }
}

// --- residual_step

// Whether the call takes none, as if it were zeros.
inline constexpr bool kTargetMayBeNull = true;

struct CudaResidual {
  ResidualProblem p;
  Factors factors;
  std::vector<double> before; // the running sums: loss, then db

  std::string text() const {
    return "cuda " + p.text() + (factors.pointer() == nullptr ? "" : ", weight sum");
  }
};

inline CudaResidual draw_cuda_residual(
    Random& random, DType input_type, DType target_type, int64_t rows, int64_t outputs) {
  CudaResidual problem;
  ResidualProblem& p = problem.p;
  p = draw_residual_problem(random, input_type, target_type, 1, 1);
  p.rows = rows;
  p.outputs = outputs;
  p.product = draw_matrix(random, input_type, contiguous(rows, outputs), Place());
  p.linear_bias = Matrix();
  if (!kTargetMayBeNull || !random.one_in(4)) {
    p.target = draw_cuda_matrix(random, target_type, rows, outputs);
  } else {
    p.target = Matrix();
  }
  p.weight = random.coin() ? draw_weight(random, target_type, rows, outputs) : Matrix();
  p.target_tile = {outputs, 0};
  if (random.one_in(8)) {
    draw_special(random, {&p.product, &p.target, &p.weight});
  }
  problem.factors = draw_factors(random);
  p.residual_scale = problem.factors.residual_scale();
  for (int64_t i = 0; i < p.sums(); ++i) {
    problem.before.push_back(random.coin() ? 0 : random.uniform(-100, 100));
  }
  return problem;
}

inline CudaResidual draw_cuda_residual(Random& random, int64_t cost) {
  const auto [input_type, target_type] = draw_dtypes(random);
  const int64_t outputs = std::max<int64_t>(1, draw_width(random));
  const int64_t most = std::max<int64_t>(10, cost / 4 / outputs);
  const int64_t rows = std::clamp<int64_t>(random.one_in(50) ? random.between(600, 3000) : draw_rows(random), 1, most);
  return draw_cuda_residual(random, input_type, target_type, rows, outputs);
}

struct CudaResidualResults : ResidualResults {
  Buffer running_sums; // loss, then db

  CudaResidualResults(Random& random, const CudaResidual& problem)
      : ResidualResults(random, problem.p), running_sums(problem.p.sums() * 8, Buffer::kMark, Place{64}, 8) {
    for (size_t i = 0; i < problem.before.size(); ++i) {
      write(DType::Float64, running_sums.data() + 8 * i, problem.before[i]);
    }
  }
  std::array<Buffer*, 3> all() {
    return {&product, &grad_target, &running_sums};
  }
};

inline cuda::ResidualStepCall call_cuda(const CudaResidual& problem, CudaResidualResults& results) {
  const ResidualProblem& p = problem.p;
  cuda::ResidualStepCall call{};
  call.rows = p.rows;
  call.out_features = p.outputs;
  call.dtype = cuda_dtype(p.input_type);
  call.target_dtype = cuda_dtype(p.target_type);
  call.prediction = results.product.data();
  call.writes_g = p.wants_residual;
  call.target = cuda_matrix(p.target);
  call.weight = cuda_matrix(p.weight);
  call.weight_sum = problem.factors.pointer();
  call.residual_factor = problem.factors.residual;
  call.target_gradient_factor = p.target_scale;
  call.grad_target = data_or_null(results.grad_target);
  call.loss_sum = reinterpret_cast<double*>(results.running_sums.data());
  call.bias_sum = p.wants_bias ? call.loss_sum + 1 : nullptr;
  return call;
}

inline void run_cuda(Random& random, const cuda::ResidualStepCall& call) {
  const Buffer workspace = draw_workspace(random, residual_step_workspace(call));
  if (cuda::residual_step(call, workspace.data(), nullptr) != cudaSuccess) {
    throw Failure("residual_step returned an error");
  }
}

inline void check_cuda(const CudaResidual& problem, CudaResidualResults& results) {
  const ResidualProblem& p = problem.p;
  ResidualExpected expected = expect_residual(p, 0, p.rows);
  expected.loss.at(0, 0).add(problem.before[0], 0);
  for (int64_t o = 0; p.wants_bias && o < p.outputs; ++o) {
    expected.bias_gradient.at(0, o).add(problem.before[static_cast<size_t>(1 + o)], 0);
  }
  results.running_sums.check_guards("running sums");
  const auto* sums = reinterpret_cast<const double*>(results.running_sums.data());
  results.sums.assign(sums, sums + p.sums());
  check_residual(p, results, expected, 0, p.rows);
}

} // namespace torchintro::fuzz
