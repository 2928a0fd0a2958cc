// The training loop's kernel on random problems, against the same loop by plain loops in double.
#pragma once

#include "cuda/kernels/fit.h"
#include "problems.h"

namespace torchintro::fuzz {

struct CudaFit {
  DType dtype = DType::Float64;
  int64_t models = 1;
  int64_t rows = 1;
  int64_t features = 1;
  int64_t outputs = 1;
  int64_t batch_rows = 1;
  int64_t validation_rows = 0;
  int64_t epochs = 1;
  int64_t epoch = 0;
  int64_t step = 0;
  bool adam = false;
  bool decoupled = false;
  bool train_weight = true;
  bool train_bias = true;
  Matrix input;
  Matrix target;
  Matrix validation_input; // these two may be absent
  Matrix validation_target;
  std::vector<int64_t> order; // epochs x rows; empty: as they lie
  std::vector<double> lr; // epochs x models
  std::vector<double> options; // models x kFitOptions
  std::vector<int64_t> stopped;
  Matrix linear_weight; // models x outputs features
  Matrix linear_bias; // models x outputs; may be absent
  Matrix state; // 4 models x parameters()

  int64_t parameters() const {
    return outputs * features + outputs;
  }
  int64_t batches() const {
    return (rows + batch_rows - 1) / batch_rows;
  }
  double largest() const {
    return dtype == DType::Float64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  }
  std::string text() const {
    return std::string("cuda fit_rows ") + format_of(dtype).name +
        (adam ? decoupled ? " adamw, " : " adam, " : " sgd, ") + std::to_string(models) + " models, " +
        std::to_string(rows) + " x " + std::to_string(features) + " -> " + std::to_string(outputs) + ", batches of " +
        std::to_string(batch_rows) + (order.empty() ? "" : " in an order") + ", " + std::to_string(epochs) +
        " epochs from " + std::to_string(epoch) + " and step " + std::to_string(step) + strides_text("input", input) +
        strides_text("target", target) + (linear_bias.present() ? ", bias" : "") +
        (train_weight ? "" : ", weight as it is") + (train_bias ? "" : ", bias as it is") +
        (validation_rows > 0 ? ", " + std::to_string(validation_rows) + " rows for validation" : "");
  }
};

// A model's part of the results.
struct FitExpected {
  std::vector<double> losses; // of the epochs that it began
  std::vector<double> validation_losses;
  int64_t stopped = -1;
  std::vector<double> parameters; // weights, then biases
  std::vector<double> state[4]; // rows alike
  bool on_edge = false; // whether rounding may decide if a number is finite
};

class FitOracle {
 public:
  FitOracle(const CudaFit& problem, int64_t model)
      : p_(problem), model_(model), options_(p_.options.data() + model * cuda::kFitOptions) {
    for (int64_t i = 0; i < p_.outputs * p_.features; ++i) {
      result_.parameters.push_back(p_.linear_weight.at(model, i));
    }
    for (int64_t o = 0; o < p_.outputs; ++o) {
      result_.parameters.push_back(p_.linear_bias.present() ? p_.linear_bias.at(model, o) : 0);
    }
    for (int64_t row = 0; row < 4; ++row) {
      for (int64_t i = 0; i < p_.parameters(); ++i) {
        result_.state[row].push_back(p_.state.at(row * p_.models + model, i));
      }
    }
    result_.stopped = p_.stopped[static_cast<size_t>(model)];
  }

  FitExpected run() {
    if (result_.stopped >= 0) {
      return result_;
    }
    if (p_.step == 0) {
      keep();
    }
    for (int64_t e = 0; e < p_.epochs && result_.stopped < 0; ++e) {
      double sum = 0;
      for (int64_t begin = 0; begin < p_.rows && result_.stopped < 0; begin += p_.batch_rows) {
        sum += train(e, begin, std::min(begin + p_.batch_rows, p_.rows));
      }
      result_.losses.push_back(sum / static_cast<double>(p_.rows));
      if (result_.stopped < 0 && p_.validation_rows > 0) {
        double squares = 0;
        for (int64_t n = 0; n < p_.validation_rows; ++n) {
          for (int64_t o = 0; o < p_.outputs; ++o) {
            squares += std::pow(residual(p_.validation_input, p_.validation_target, n, o), 2);
          }
        }
        result_.validation_losses.push_back(squares / static_cast<double>(p_.validation_rows * p_.outputs));
        if (!is_finite(result_.validation_losses.back())) {
          stop(e);
        }
      }
    }
    return result_;
  }

 private:
  double residual(const Matrix& x, const Matrix& y, int64_t n, int64_t o) const {
    double prediction = result_.parameters[static_cast<size_t>(p_.outputs * p_.features + o)];
    for (int64_t d = 0; d < p_.features; ++d) {
      prediction += x.at(n, d) * result_.parameters[static_cast<size_t>(o * p_.features + d)];
    }
    return prediction - y.at(n, o);
  }

  bool is_finite(double loss) {
    if (std::fabs(loss) > p_.largest() / 1.1 && std::fabs(loss) < p_.largest() * 1.1) {
      result_.on_edge = true;
    }
    return std::fabs(loss) <= p_.largest(); // not NaN either
  }

  bool is_trained(size_t i) const {
    return static_cast<int64_t>(i) < p_.outputs * p_.features ? p_.train_weight : p_.train_bias;
  }
  // What is not trained has no place in the state.
  void keep() {
    for (size_t i = 0; i < result_.parameters.size(); ++i) {
      if (is_trained(i)) {
        result_.state[0][i] = result_.parameters[i];
      }
    }
  }
  void stop(int64_t e) {
    for (size_t i = 0; i < result_.parameters.size(); ++i) {
      if (is_trained(i)) {
        result_.parameters[i] = result_.state[0][i];
      }
    }
    result_.stopped = p_.epoch + e;
  }

  // One batch; returns its loss times its rows.
  double train(int64_t e, int64_t begin, int64_t end) {
    const int64_t weights = p_.outputs * p_.features;
    std::vector<double> gradient(static_cast<size_t>(p_.parameters()));
    double squares = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = p_.order.empty() ? i : p_.order[static_cast<size_t>(e * p_.rows + i)];
      for (int64_t o = 0; o < p_.outputs; ++o) {
        const double r = residual(p_.input, p_.target, n, o);
        squares += r * r;
        gradient[static_cast<size_t>(weights + o)] += r;
        for (int64_t d = 0; d < p_.features; ++d) {
          gradient[static_cast<size_t>(o * p_.features + d)] += r * p_.input.at(n, d);
        }
      }
    }
    const auto elements = static_cast<double>((end - begin) * p_.outputs);
    const double loss = squares / elements;
    if (!is_finite(loss)) {
      stop(e);
      return std::numeric_limits<double>::infinity(); // or NaN; neither is finite
    }
    keep();
    const int64_t step = p_.step + e * p_.batches() + begin / p_.batch_rows;
    const double lr = p_.lr[static_cast<size_t>(e * p_.models + model_)];
    for (size_t i = 0; i < gradient.size(); ++i) {
      if (is_trained(i)) {
        update(i, gradient[i] * 2 / elements, lr, step);
      }
    }
    return loss * static_cast<double>(end - begin);
  }

  // As the documentation of torch.optim has it.
  void update(size_t i, double g, double lr, int64_t step) {
    double& parameter = result_.parameters[i];
    if (g * g * 100 > p_.largest()) {
      result_.on_edge = true;
    }
    if (!p_.adam) {
      const double momentum = options_[0], dampening = options_[1], decay = options_[2];
      g += decay * parameter;
      if (momentum != 0) {
        double& buffer = result_.state[1][i];
        buffer = step == 0 ? g : momentum * buffer + (1 - dampening) * g;
        g = options_[3] != 0 ? g + momentum * buffer : buffer;
      }
      parameter -= lr * g;
      return;
    }
    const double beta1 = options_[0], beta2 = options_[1], decay = options_[2], epsilon = options_[3];
    if (p_.decoupled) {
      parameter *= 1 - lr * decay;
    } else {
      g += decay * parameter;
    }
    double& first = result_.state[1][i];
    double& second = result_.state[2][i];
    double& largest = result_.state[3][i];
    first = beta1 * first + (1 - beta1) * g;
    second = beta2 * second + (1 - beta2) * g * g;
    double root = second;
    if (options_[4] != 0) {
      largest = std::max(largest, second);
      root = largest;
    }
    const auto t = static_cast<double>(step + 1);
    const double correction1 = 1 - std::pow(beta1, t), correction2 = 1 - std::pow(beta2, t);
    parameter -= lr / correction1 * first / (std::sqrt(root / correction2) + epsilon);
  }

  const CudaFit& p_;
  int64_t model_;
  const double* options_;
  FitExpected result_;
};

inline std::vector<FitExpected> expect_fit(const CudaFit& problem) {
  std::vector<FitExpected> expected;
  for (int64_t model = 0; model < problem.models; ++model) {
    expected.push_back(FitOracle(problem, model).run());
  }
  return expected;
}

inline void draw_options(Random& random, CudaFit& p) {
  for (int64_t model = 0; model < p.models; ++model) {
    if (!p.adam) {
      const double momentum = random.coin() ? 0 : random.uniform(0.1, 0.95);
      const double dampening = random.coin() ? 0 : random.uniform(0, 0.9);
      const double decay = random.coin() ? 0 : random.uniform(0, 0.1);
      p.options.insert(p.options.end(), {momentum, dampening, decay, random.coin() ? 1.0 : 0.0, 0.0});
    } else {
      // An epsilon in which a gradient that is rounding alone gets lost: divided by itself, it would be anything.
      const double decay = random.coin() ? 0 : random.uniform(0, 0.1);
      p.options.insert(
          p.options.end(),
          {random.uniform(0.1, 0.95),
           random.uniform(0.5, 0.999),
           decay,
           random.uniform(0.01, 0.1),
           random.coin() ? 1.0 : 0.0});
    }
  }
  for (int64_t e = 0; e < p.epochs; ++e) {
    for (int64_t model = 0; model < p.models; ++model) {
      // Gradients have up to about `features` times the size of the parameters.
      p.lr.push_back(random.uniform(0.001, 0.1) / (p.adam ? 1.0 : static_cast<double>(p.features)));
    }
  }
  if (random.one_in(4)) { // one that diverges: by an update, or by many
    const int64_t model = random.between(0, p.models - 1);
    const bool narrow = p.dtype == DType::Float32;
    const double lr =
        p.adam ? (narrow ? 1e25 : 1e200) : (narrow ? random.uniform(1e3, 1e6) : random.uniform(1e20, 1e40));
    for (int64_t e = random.between(0, p.epochs - 1); e < p.epochs; ++e) {
      p.lr[static_cast<size_t>(e * p.models + model)] = lr;
    }
  }
}

inline CudaFit draw_cuda_fit(Random& random, DType dtype, int64_t rows, int64_t features, int64_t outputs) {
  CudaFit p;
  p.dtype = dtype;
  p.rows = rows;
  p.features = features;
  p.outputs = outputs;
  p.models = random.coin() ? 1 : random.between(1, 4);
  p.batch_rows = random.one_in(3) ? rows : random.between(std::max<int64_t>(1, rows / 8), rows);
  p.epochs = random.one_in(30) ? random.between(20, 40) : random.between(1, 4);
  if (random.coin()) {
    p.epoch = random.between(1, 1000);
    p.step = p.epoch * p.batches();
  }
  p.adam = random.coin();
  p.decoupled = p.adam && random.coin();
  p.train_weight = !random.one_in(8);
  const bool bias = random.between(0, 3) != 0;
  p.train_bias = bias && !random.one_in(8);
  p.input = draw_matrix(random, dtype, rows, features);
  p.target = draw_matrix(random, dtype, rows, outputs);
  if (random.coin()) {
    p.validation_rows = random.between(1, 1 + rows / 2);
    p.validation_input = draw_matrix(random, dtype, p.validation_rows, features);
    p.validation_target = draw_matrix(random, dtype, p.validation_rows, outputs);
  }
  if (random.coin()) {
    for (int64_t e = 0; e < p.epochs; ++e) {
      const auto begin = static_cast<std::ptrdiff_t>(p.order.size());
      for (int64_t n = 0; n < rows; ++n) {
        p.order.push_back(n);
      }
      for (int64_t n = rows - 1; n > 0; --n) {
        std::swap(p.order[static_cast<size_t>(begin + n)], p.order[static_cast<size_t>(begin + random.between(0, n))]);
      }
    }
  }
  draw_options(random, p);
  for (int64_t model = 0; model < p.models; ++model) {
    p.stopped.push_back(random.one_in(8) ? random.between(0, 1000) : -1);
  }
  p.linear_weight = draw_matrix(random, dtype, contiguous(p.models, outputs * features), draw_place(random, dtype));
  if (bias) {
    p.linear_bias = draw_matrix(random, dtype, contiguous(p.models, outputs), draw_place(random, dtype));
  }
  p.state = draw_matrix(random, dtype, contiguous(4 * p.models, p.parameters()), draw_place(random, dtype));
  for (int64_t i = 2 * p.models * p.parameters(); i < 4 * p.models * p.parameters(); ++i) { // second moments
    unsigned char* moment = p.state.memory.data() + i * bytes_of(dtype);
    write(dtype, moment, std::fabs(read(dtype, moment)));
  }
  p.state.read_back();
  if (random.one_in(10)) {
    Matrix& matrix = p.validation_rows > 0 && random.coin() ? p.validation_target : p.target;
    matrix.set(
        random.between(0, matrix.layout.rows - 1),
        random.between(0, outputs - 1),
        random.coin() ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity());
  }
  return p;
}

inline CudaFit draw_cuda_fit(Random& random, int64_t cost) {
  for (;;) {
    const DType dtype = random.coin() ? DType::Float32 : DType::Float64;
    const int64_t outputs = random.coin() ? 1 : random.between(1, cuda::kMaxFitOutputs);
    int64_t outputs_up = 1;
    while (outputs_up < outputs) {
      outputs_up *= 2;
    }
    const int64_t most = 512 / outputs_up;
    const int64_t features = random.one_in(3) ? random.between(1, 3)
        : random.coin()                       ? random.between(1, std::min<int64_t>(40, most))
                                              : random.between(1, most);
    const int64_t wanted = random.one_in(4) ? random.between(1, 4) : random.between(1, random.one_in(6) ? 1200 : 120);
    const int64_t rows = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(4, cost / 4 / (features * outputs)));
    CudaFit problem = draw_cuda_fit(random, dtype, rows, features, outputs);
    const auto expected = expect_fit(problem);
    const bool on_edge = std::any_of(expected.begin(), expected.end(), [](const auto& e) { return e.on_edge; });
    if (!on_edge && problem.models * problem.epochs * problem.batches() <= 100) {
      return problem;
    }
  }
}

inline Buffer draw_numbers(Random& random, const void* values, size_t bytes) {
  Buffer buffer(static_cast<int64_t>(bytes), Buffer::kMark, draw_place(random, DType::Float64));
  std::memcpy(buffer.data(), values, bytes);
  return buffer;
}

struct CudaFitResults {
  Buffer weight;
  Buffer bias; // null where there is none
  Buffer state;
  Buffer stopped;
  Buffer losses;
  Buffer validation_losses; // null where there are none
  // Only read.
  Buffer lr;
  Buffer options;
  Buffer order;

  CudaFitResults(Random& random, const CudaFit& p) {
    const auto copy = [&](const Matrix& matrix) {
      return matrix.present() ? matrix.memory.copy(draw_place(random, p.dtype)) : Buffer();
    };
    weight = copy(p.linear_weight);
    bias = copy(p.linear_bias);
    state = copy(p.state);
    stopped = draw_numbers(random, p.stopped.data(), p.stopped.size() * sizeof(int64_t));
    losses = draw_output(random, DType::Float64, p.epochs * p.models);
    if (p.validation_rows > 0) {
      validation_losses = draw_output(random, DType::Float64, p.epochs * p.models);
    }
    lr = draw_numbers(random, p.lr.data(), p.lr.size() * sizeof(double));
    options = draw_numbers(random, p.options.data(), p.options.size() * sizeof(double));
    if (!p.order.empty()) {
      order = draw_numbers(random, p.order.data(), p.order.size() * sizeof(int64_t));
    }
  }
  std::array<Buffer*, 9> all() {
    return {&weight, &bias, &state, &stopped, &losses, &validation_losses, &lr, &options, &order};
  }
};

inline cuda::FitRowsCall call_cuda(const CudaFit& p, CudaFitResults& results) {
  cuda::FitRowsCall call{};
  call.models = p.models;
  call.rows = p.rows;
  call.batch_rows = p.batch_rows;
  call.in_features = p.features;
  call.out_features = static_cast<int>(p.outputs);
  call.dtype = cuda_dtype(p.dtype);
  call.input = cuda_matrix(p.input);
  call.target = cuda_matrix(p.target);
  call.validation_rows = p.validation_rows;
  call.validation_input = cuda_matrix(p.validation_input);
  call.validation_target = cuda_matrix(p.validation_target);
  call.order = reinterpret_cast<const int64_t*>(data_or_null(results.order));
  call.adam = p.adam;
  call.decoupled = p.decoupled;
  call.lr = reinterpret_cast<const double*>(results.lr.data());
  call.options = reinterpret_cast<const double*>(results.options.data());
  call.epochs = p.epochs;
  call.epoch = p.epoch;
  call.step = p.step;
  call.train_weight = p.train_weight;
  call.train_bias = p.train_bias;
  call.linear_weight = results.weight.data();
  call.linear_bias = data_or_null(results.bias);
  call.state = results.state.data();
  call.stopped = reinterpret_cast<int64_t*>(results.stopped.data());
  call.losses = reinterpret_cast<double*>(results.losses.data());
  call.validation_losses = reinterpret_cast<double*>(data_or_null(results.validation_losses));
  return call;
}

inline void run_cuda(Random&, const cuda::FitRowsCall& call) {
  if (!cuda::fit_rows_takes(call)) {
    throw Failure("fit_rows does not take the call");
  }
  if (cuda::fit_rows(call, nullptr) != cudaSuccess) {
    throw Failure("fit_rows returned an error");
  }
}

// Rounding is carried from update to update, so there is no bound of it as for a single sum: in float64 seven digits are
// left for that, in float32 four.
inline double fit_tolerance(DType dtype) {
  return dtype == DType::Float64 ? 1e-9 : 2e-3;
}

// A model's losses, which are finite but for perhaps the last.
inline void check_fit_losses(
    const char* name, const CudaFit& p, int64_t model, const Buffer& memory, const std::vector<double>& expected) {
  for (int64_t e = 0; e < p.epochs; ++e) {
    const int64_t position = (e * p.models + model) * 8;
    const double value = read(DType::Float64, memory.data() + position);
    const bool begun = e < static_cast<int64_t>(expected.size());
    const double wanted = begun ? expected[static_cast<size_t>(e)] : std::numeric_limits<double>::quiet_NaN();
    if (!begun) {
      check_value(name, e, model, value, wanted, 0, p.dtype);
    } else if (std::fabs(wanted) <= p.largest()) {
      check_value(name, e, model, value, wanted, fit_tolerance(p.dtype) * (1 + std::fabs(wanted)), p.dtype);
    } else if (std::isfinite(value)) {
      throw Failure(std::string(name) + " of model " + std::to_string(model) + " is finite");
    }
  }
}

// A model's numbers in a row of memory, to within a part of the largest of them.
inline void check_fit_row(
    const char* name,
    const CudaFit& p,
    int64_t model,
    const unsigned char* memory,
    const double* expected,
    int64_t count) {
  double largest = 1;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(expected[i]));
  }
  for (int64_t i = 0; i < count; ++i) {
    const double value = read(p.dtype, memory + i * bytes_of(p.dtype));
    check_value(name, model, i, value, expected[i], fit_tolerance(p.dtype) * largest, p.dtype);
  }
}

inline void check_cuda(const CudaFit& p, CudaFitResults& results) {
  for (const Buffer* buffer : results.all()) {
    buffer->check_guards("a buffer of fit_rows");
  }
  const int64_t weights = p.outputs * p.features;
  const int64_t bytes = bytes_of(p.dtype);
  for (int64_t model = 0; model < p.models; ++model) {
    const FitExpected expected = FitOracle(p, model).run();
    int64_t stopped = 0;
    std::memcpy(&stopped, results.stopped.data() + 8 * model, 8);
    if (stopped != expected.stopped) {
      throw Failure(
          "model " + std::to_string(model) + " stopped in " + std::to_string(stopped) + " instead of " +
          std::to_string(expected.stopped));
    }
    check_fit_losses("loss", p, model, results.losses, expected.losses);
    if (p.validation_rows > 0) {
      check_fit_losses("validation loss", p, model, results.validation_losses, expected.validation_losses);
    }
    check_fit_row(
        "weight", p, model, results.weight.data() + model * weights * bytes, expected.parameters.data(), weights);
    if (results.bias) {
      check_fit_row(
          "bias",
          p,
          model,
          results.bias.data() + model * p.outputs * bytes,
          expected.parameters.data() + weights,
          p.outputs);
    }
    for (int64_t row = 0; row < 4; ++row) {
      const unsigned char* memory = results.state.data() + (row * p.models + model) * p.parameters() * bytes;
      check_fit_row("state", p, model, memory, expected.state[row].data(), p.parameters());
    }
  }
}

} // namespace torchintro::fuzz
