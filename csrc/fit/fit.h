// The training-loop operators: all epochs of the plain PyTorch loop
//
//   for epoch in range(E):
//       for rows in batches:
//           loss = mse_loss(linear(X[rows], W, b), y[rows]);  loss.backward();  optimizer.step()
//
// in one call, for K models at once that share X, y and the order of the rows, each with hyper-parameters of its own.
//
//   linear_mse_fit          reads the rows, every batch once for all models
//   linear_statistics_fit   reads their second moments instead (full batches only): an epoch costs D^2, whatever N is
//
// Parameters and optimizer state are trained in place, so that a caller can run the epochs in several calls and look at the
// clock, or at its user, in between: the result is the same to the bit.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace torchintro::fit {

using OptionalTensor = std::optional<at::Tensor>;

// The optimizers, by what a step does to a parameter p with gradient g; as torch.optim defines them.
enum class Optimizer { Sgd, Adam, AdamW };

// Columns of `options`, one row a model.
enum SgdOption { kMomentum, kDampening, kSgdWeightDecay, kNesterov };
enum AdamOption { kBeta1, kBeta2, kAdamWeightDecay, kEpsilon, kAmsgrad };
constexpr int64_t kOptions = 5;

// Rows of `state`: every model's parameters of the last finite loss, then what the optimizer remembers.
constexpr int64_t kLastFinite = 0;
constexpr int64_t kMomentumBuffer = 1;
constexpr int64_t kFirstMoment = 1, kSecondMoment = 2, kLargestSecondMoment = 3;

// The sizes of a run, and how far it has come.
struct RunSizes {
  Optimizer optimizer;
  int64_t models;
  int64_t out_features;
  int64_t in_features;
  int64_t epochs; // of this call
  int64_t epoch; // run by earlier calls
  int64_t step; // updates made by earlier calls
  bool train_weight;
  bool train_bias;

  int64_t parameters() const { // of a model, as the state has them
    return out_features * in_features + out_features;
  }
};

// What both operators have: models, their optimizer, and what is known of the run so far.
struct Run : RunSizes {
  at::Tensor linear_weight; // (K, O, D) contiguous, trained in place
  at::Tensor linear_bias; // (K, O) contiguous, trained in place; undefined without
  at::Tensor lr; // (E, K) float64, on the CPU
  at::Tensor options; // (K, kOptions) float64, on the CPU
  at::Tensor state; // (S, K, O D + O) contiguous, in the parameters' dtype
  at::Tensor stopped; // (K) int64, on the CPU: the epoch in which a model's loss was not finite, -1 before that
};

// A call of linear_mse_fit.
struct RowsRun : Run {
  at::Tensor input; // (N, D)
  at::Tensor target; // (N, O)
  at::Tensor validation_input; // undefined without
  at::Tensor validation_target;
  int64_t rows;
  int64_t batch_rows; // 1 to N
  bool shuffle; // only with more than one batch
  std::optional<at::Generator> generator;

  int64_t batches() const {
    return (rows + batch_rows - 1) / batch_rows;
  }
};

// Centred second moments of weighted rows; all float64.
struct Moments {
  at::Tensor count; // ()       sum of the rows' weights
  at::Tensor mean_x; // (D)
  at::Tensor mean_y; // (O)
  at::Tensor sxx; // (D, D)     sum of v (x - mean_x) (x - mean_x)'
  at::Tensor sxy; // (D, O)     sum of v (x - mean_x) (y - mean_y)'
  at::Tensor syy; // (O)        sum of v (y - mean_y)^2
};

// A call of linear_statistics_fit.
struct MomentsRun : Run {
  Moments train;
  std::optional<Moments> validation;
  double largest; // a loss beyond it counts as infinite: the largest number of the model's own dtype
};

// losses (E, K) and validation losses (E, K), or (0, K) without; float64 on the CPU.
using Losses = std::tuple<at::Tensor, at::Tensor>;

// `op` is for the ValueError that an unknown name raises.
Optimizer parse_optimizer(const char* op, std::string_view optimizer);

// Each raises ValueError, TypeError or RuntimeError, with the argument, what was expected and what came, unless the call is
// well formed.
RowsRun check_rows_run(
    const at::Tensor& input,
    const at::Tensor& target,
    const at::Tensor& linear_weight,
    const OptionalTensor& linear_bias,
    const at::Tensor& lr,
    const at::Tensor& options,
    const at::Tensor& state,
    const at::Tensor& stopped,
    std::string_view optimizer,
    int64_t epoch,
    int64_t step,
    int64_t batch_size,
    bool shuffle,
    const std::optional<at::Generator>& generator,
    const OptionalTensor& validation_input,
    const OptionalTensor& validation_target,
    bool train_weight,
    bool train_bias);

MomentsRun check_moments_run(
    at::TensorList moments,
    at::TensorList validation,
    const at::Tensor& linear_weight,
    const OptionalTensor& linear_bias,
    const at::Tensor& lr,
    const at::Tensor& options,
    const at::Tensor& state,
    const at::Tensor& stopped,
    std::string_view optimizer,
    int64_t epoch,
    int64_t step,
    bool train_weight,
    bool train_bias,
    double largest);

// An operator's function, from the check of its arguments (one of the two above) and what is done with a checked call: it has
// the arguments of the check.
template <auto check, auto train, typename Check = decltype(check)>
struct CheckedOperator;
template <auto check, auto train, typename CheckedRun, typename... Arguments>
struct CheckedOperator<check, train, CheckedRun (*)(Arguments...)> {
  static Losses call(Arguments... arguments) {
    return train(check(arguments...));
  }
};
template <Losses (*train)(const RowsRun&)>
constexpr auto rows_operator = &CheckedOperator<&check_rows_run, train>::call;
template <Losses (*train)(const MomentsRun&)>
constexpr auto moments_operator = &CheckedOperator<&check_moments_run, train>::call;

// The arguments of rows_operator in a schema.
#define TORCHINTRO_ROWS_ARGUMENTS                                                                                      \
  "Tensor input, Tensor target, Tensor(a!) linear_weight, Tensor(b!)? linear_bias, Tensor lr, Tensor options, "        \
  "Tensor(c!) state, Tensor(d!) stopped, str optimizer, int epoch=0, int step=0, int batch_size=0, bool "              \
  "shuffle=True, "                                                                                                     \
  "Generator? generator=None, Tensor? validation_input=None, Tensor? validation_target=None, bool train_weight=True, " \
  "bool train_bias=True"

// Results before the first epoch: all NaN.
Losses no_losses(const Run& run, bool validation);

// To be called when parameters and state were changed in place other than by PyTorch's operators, which count changes, so that
// autograd notices where it needed the values from before.
void count_changes(const Run& run);

// The order of an epoch's rows, as the plain loop draws it; int64 on the CPU.
at::Tensor draw_order(const RowsRun& run);

} // namespace torchintro::fit
