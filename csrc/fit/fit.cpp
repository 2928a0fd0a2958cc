// The training-loop operators' schemas, the check of their arguments, and what their backends share.
#include "fit/fit.h"

#include "problem.h"

#include <ATen/ops/randperm.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <string>

namespace torchintro::fit {
namespace {

std::string shape_text(at::IntArrayRef sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i > 0 ? ", " : "") << sizes[i];
  }
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

struct Checks {
  const char* op;

  // clang-format off: one line for the condition, one for the sentence.
  void shape(const char* name, const at::Tensor& tensor, at::IntArrayRef expected) const {
    TORCH_CHECK_VALUE(tensor.sizes() == expected,
        op, ": ", name, " must have shape ", shape_text(expected), ", but got ", shape_text(tensor.sizes()));
  }

  void dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected) const {
    TORCH_CHECK_TYPE(tensor.scalar_type() == expected,
        op, ": ", name, " must have dtype ", expected, ", but got ", tensor.scalar_type());
  }

  void device(const char* name, const at::Tensor& tensor, at::Device expected) const {
    TORCH_CHECK_VALUE(tensor.device() == expected,
        op, ": ", name, " must be on ", expected, ", but got ", tensor.device());
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided,
        op, ": ", name, " must be a dense (strided) tensor, but got layout ", tensor.layout());
  }

  void contiguous(const char* name, const at::Tensor& tensor) const {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, but has strides ", tensor.strides());
  }

  void on_host(const char* name, const at::Tensor& tensor, at::ScalarType expected, at::IntArrayRef sizes) const {
    device(name, tensor, at::kCPU);
    dtype(name, tensor, expected);
    shape(name, tensor, sizes);
    contiguous(name, tensor);
  }

  void run(const Run& r, at::ScalarType type, at::Device on) const {
    device("linear_weight", r.linear_weight, on);
    dtype("linear_weight", r.linear_weight, type);
    contiguous("linear_weight", r.linear_weight);
    if (r.linear_bias.defined()) {
      device("linear_bias", r.linear_bias, on);
      dtype("linear_bias", r.linear_bias, type);
      shape("linear_bias", r.linear_bias, {r.models, r.out_features});
      contiguous("linear_bias", r.linear_bias);
    }
    TORCH_CHECK_VALUE(r.lr.dim() == 2, op, ": lr must have shape (epochs, models), but got ", shape_text(r.lr.sizes()));
    on_host("lr", r.lr, at::kDouble, {r.lr.size(0), r.models});
    on_host("options", r.options, at::kDouble, {r.models, kOptions});
    on_host("stopped", r.stopped, at::kLong, {r.models});
    device("state", r.state, on);
    dtype("state", r.state, type);
    contiguous("state", r.state);
    const int64_t rows = state_rows(r);
    TORCH_CHECK_VALUE(r.state.dim() == 3 && r.state.size(0) >= rows && r.state.size(1) == r.models &&
        r.state.size(2) == r.parameters(),
        op, ": state must have shape ", shape_text({rows, r.models, r.parameters()}),
        ", or more rows, but got ", shape_text(r.state.sizes()));
    TORCH_CHECK_VALUE(r.epoch >= 0 && r.step >= 0,
        op, ": epoch and step must be at least 0, but got ", r.epoch, " and ", r.step);
  }
  // clang-format on

  // How many rows of the state an optimizer uses.
  static int64_t state_rows(const Run& r) {
    const double* options = r.options.const_data_ptr<double>();
    bool momentum = false, amsgrad = false;
    for (int64_t k = 0; k < r.models; ++k) {
      momentum |= options[k * kOptions + kMomentum] != 0;
      amsgrad |= options[k * kOptions + kAmsgrad] != 0;
    }
    return r.optimizer == Optimizer::Sgd ? 1 + (momentum ? 1 : 0) : 3 + (amsgrad ? 1 : 0);
  }
};

void fill_run(
    Run& r,
    const char* op,
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
    bool train_bias) {
  TORCH_CHECK_VALUE(
      linear_weight.dim() == 3 && linear_weight.numel() > 0,
      op,
      ": linear_weight must have shape (models, out_features, in_features), none of them 0, but got ",
      shape_text(linear_weight.sizes()));
  r.linear_weight = linear_weight;
  if (linear_bias) {
    r.linear_bias = *linear_bias;
  }
  r.lr = lr;
  r.options = options;
  r.state = state;
  r.stopped = stopped;
  r.optimizer = parse_optimizer(op, optimizer);
  r.models = linear_weight.size(0);
  r.out_features = linear_weight.size(1);
  r.in_features = linear_weight.size(2);
  r.epochs = lr.dim() == 0 ? 0 : lr.size(0);
  r.epoch = epoch;
  r.step = step;
  r.train_weight = train_weight;
  r.train_bias = train_bias && linear_bias.has_value();
}

Moments check_moments(const Checks& checks, at::TensorList given, const Run& run) {
  TORCH_CHECK_VALUE(
      given.size() == 6,
      checks.op,
      ": moments must be the tensors count, mean_x, mean_y, sxx, sxy and syy, but got ",
      given.size(),
      " of them");
  const int64_t d = run.in_features, o = run.out_features;
  const Moments m{given[0], given[1], given[2], given[3], given[4], given[5]};
  checks.on_host("count", m.count, at::kDouble, {});
  checks.on_host("mean_x", m.mean_x, at::kDouble, {d});
  checks.on_host("mean_y", m.mean_y, at::kDouble, {o});
  checks.on_host("sxx", m.sxx, at::kDouble, {d, d});
  checks.on_host("sxy", m.sxy, at::kDouble, {d, o});
  checks.on_host("syy", m.syy, at::kDouble, {o});
  TORCH_CHECK_VALUE(
      *m.count.const_data_ptr<double>() > 0,
      checks.op,
      ": count must be above 0, but got ",
      *m.count.const_data_ptr<double>());
  return m;
}

} // namespace

Optimizer parse_optimizer(const char* op, std::string_view optimizer) {
  TORCH_CHECK_VALUE(
      optimizer == "sgd" || optimizer == "adam" || optimizer == "adamw",
      op,
      ": optimizer must be 'sgd', 'adam' or 'adamw', but got '",
      optimizer,
      "'");
  return optimizer == "sgd" ? Optimizer::Sgd : optimizer == "adam" ? Optimizer::Adam : Optimizer::AdamW;
}

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
    bool train_bias) {
  const Checks checks{"linear_mse_fit"};
  RowsRun r;
  fill_run(
      r,
      checks.op,
      linear_weight,
      linear_bias,
      lr,
      options,
      state,
      stopped,
      optimizer,
      epoch,
      step,
      train_weight,
      train_bias);
  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble,
      checks.op,
      ": input must have dtype float32 or float64, but got ",
      dtype);
  const auto rows_of = [&](const char* name, const at::Tensor& x, const char* target_name, const at::Tensor& y) {
    checks.device(name, x, input.device());
    checks.device(target_name, y, input.device());
    TORCH_CHECK_VALUE(
        x.dim() == 2 && x.size(0) > 0 && x.size(1) == r.in_features,
        checks.op,
        ": ",
        name,
        " must have shape (N, ",
        r.in_features,
        ") with at least one row, but got ",
        shape_text(x.sizes()));
    checks.shape(target_name, y, {x.size(0), r.out_features});
    checks.dtype(name, x, dtype);
    checks.dtype(target_name, y, dtype);
  };
  rows_of("input", input, "target", target);
  checks.run(r, dtype, input.device());
  r.input = input;
  r.target = target;
  r.rows = input.size(0);
  TORCH_CHECK_VALUE(batch_size >= 0, checks.op, ": batch_size must be at least 0, but got ", batch_size);
  r.batch_rows = batch_size == 0 ? r.rows : std::min(batch_size, r.rows);
  r.shuffle = shuffle && r.batches() > 1;
  r.generator = generator;
  TORCH_CHECK_VALUE(
      validation_input.has_value() == validation_target.has_value(),
      checks.op,
      ": validation_input and validation_target must be given together, but got one of them");
  if (validation_input) {
    rows_of("validation_input", *validation_input, "validation_target", *validation_target);
    r.validation_input = *validation_input;
    r.validation_target = *validation_target;
  }
  return r;
}

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
    double largest) {
  const Checks checks{"linear_statistics_fit"};
  MomentsRun r;
  fill_run(
      r,
      checks.op,
      linear_weight,
      linear_bias,
      lr,
      options,
      state,
      stopped,
      optimizer,
      epoch,
      step,
      train_weight,
      train_bias);
  checks.run(r, at::kDouble, at::kCPU);
  r.train = check_moments(checks, moments, r);
  if (!validation.empty()) {
    r.validation = check_moments(checks, validation, r);
  }
  TORCH_CHECK_VALUE(largest > 0, checks.op, ": largest must be above 0, but got ", largest);
  r.largest = largest;
  return r;
}

Losses no_losses(const Run& run, bool validation) {
  const auto none = [&](int64_t epochs) {
    auto losses = empty_result({epochs, run.models}, at::TensorOptions(at::kDouble));
    std::fill_n(losses.mutable_data_ptr<double>(), losses.numel(), std::numeric_limits<double>::quiet_NaN());
    return losses;
  };
  return {none(run.epochs), none(validation ? run.epochs : 0)};
}

void count_changes(const Run& run) {
  for (const auto& changed : {run.linear_weight, run.linear_bias, run.state}) {
    if (changed.defined()) {
      changed.unsafeGetTensorImpl()->bump_version();
    }
  }
}

at::Tensor draw_order(const RowsRun& run) {
  return at::randperm(run.rows, run.generator, at::TensorOptions(at::kLong));
}

TORCH_LIBRARY_FRAGMENT(torchintro, m) {
  m.def("linear_mse_fit(" TORCHINTRO_ROWS_ARGUMENTS ") -> (Tensor losses, Tensor validation_losses)");
  m.def(
      "linear_statistics_fit(Tensor[] moments, Tensor[] validation, Tensor(a!) linear_weight, Tensor(b!)? linear_bias, "
      "Tensor lr, Tensor options, Tensor(c!) state, Tensor(d!) stopped, str optimizer, int epoch=0, int step=0, "
      "bool train_weight=True, bool train_bias=True, float largest=1.7976931348623157e308) "
      "-> (Tensor losses, Tensor validation_losses)");
}

} // namespace torchintro::fit
