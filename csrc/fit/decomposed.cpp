// linear_mse_fit in ATen operators, for K models at once:
//
//   R = X W' + b - y      (n, K, O), with W the models' weights one below the other, (K O, D)
//   loss = sum(R^2) / (n O),  dW = 2 / (n O) R'X,  db = 2 / (n O) sum(R)      and the update of rule.h
//
// The host decides nothing by a result: which models train on is a mask on the device, and what a stopped model would have
// become is computed and dropped.
#include "fit/decomposed.h"

#include "fit/rule.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace torchintro::fit {
namespace {

// Residuals that exist at a time: a batch of more is taken in chunks. 64 MB in float32; what a product of that size gains by
// being larger is lost in the noise.
constexpr int64_t kMostResiduals = int64_t{1} << 24;
// Numbers of updates that are sent to the device together.
constexpr int64_t kMostNumbers = int64_t{1} << 16;

// The hyper-parameters on the device, (K, 1) each in the parameters' dtype, to broadcast over a model's parameters. Computed
// by rule.h in float64; the conversion rounds them as rule.h would.
class Numbers {
 public:
  explicit Numbers(const RowsRun& run)
      : run_(run), updates_(run.epochs * run.batches()) {
    const auto k = run.models;
    std::vector<double> values;
    for (const auto member :
         {&Update<double>::decay,
          &Update<double>::momentum,
          &Update<double>::damped,
          &Update<double>::beta1_rest,
          &Update<double>::beta2,
          &Update<double>::beta2_rest,
          &Update<double>::epsilon}) {
      for (int64_t model = 0; model < k; ++model) {
        values.push_back(update(model, 0).*member);
      }
    }
    any_decay = std::any_of(values.begin(), values.begin() + k, [](double value) { return value != 0; });
    const auto all = sent(values).view({7, k, 1});
    decay = all[0];
    momentum = all[1];
    damped = all[2];
    beta1_rest = all[3];
    beta2 = all[4];
    beta2_rest = all[5];
    epsilon = all[6];
    for (int64_t model = 0; model < k; ++model) {
      any_[static_cast<size_t>(update(model, 0).kind)] = true;
    }
    plain = models_of(UpdateRule::Sgd);
    nesterov = models_of(UpdateRule::Nesterov);
    amsgrad = models_of(UpdateRule::AdamAmsgrad);
  }

  bool any(UpdateRule kind) const {
    return any_[static_cast<size_t>(kind)];
  }

  // Of the call's next update.
  void advance() {
    ++now_;
    if (now_ == sent_end_) {
      send();
    }
    const auto row = table_[now_ - sent_begin_];
    step = row[0];
    shrink = row[1];
    second_root = row[2];
    first = run_.step + now_ == 0;
  }

  at::Tensor decay, momentum, damped, beta1_rest, beta2, beta2_rest, epsilon;
  at::Tensor plain, nesterov, amsgrad; // which models, bool
  at::Tensor step, shrink, second_root; // of this update
  bool first = false;
  bool any_decay = false;

 private:
  // Of a model, `index` counted from the call's first update.
  Update<double> update(int64_t model, int64_t index) const {
    const double* options = run_.options.const_data_ptr<double>() + model * kOptions;
    const bool adam = run_.optimizer != Optimizer::Sgd;
    const auto power = static_cast<double>(run_.step + index + 1);
    const double lr = run_.lr.const_data_ptr<double>()[index / run_.batches() * run_.models + model];
    return make_update<double>(
        adam,
        run_.optimizer == Optimizer::AdamW,
        options,
        lr,
        run_.step + index == 0,
        adam ? std::pow(options[kBeta1], power) : 0,
        adam ? std::pow(options[kBeta2], power) : 0);
  }

  at::Tensor models_of(UpdateRule kind) const {
    std::vector<double> flags;
    for (int64_t model = 0; model < run_.models; ++model) {
      flags.push_back(update(model, 0).kind == kind ? 1 : 0);
    }
    return sent(flags).view({run_.models, 1}).ne(0);
  }

  at::Tensor sent(const std::vector<double>& values) const {
    const auto there = at::empty({static_cast<int64_t>(values.size())}, at::kDouble);
    std::copy(values.begin(), values.end(), there.mutable_data_ptr<double>());
    return there.to(run_.input.options(), /*non_blocking=*/true);
  }

  void send() {
    const auto count = std::min(std::max<int64_t>(1, kMostNumbers / run_.models), updates_ - now_);
    std::vector<double> values(static_cast<size_t>(count * 3 * run_.models));
    for (int64_t i = 0; i < count; ++i) {
      double* row = values.data() + i * 3 * run_.models;
      for (int64_t model = 0; model < run_.models; ++model) {
        const auto u = update(model, now_ + i);
        row[model] = u.step;
        row[run_.models + model] = u.shrink;
        row[2 * run_.models + model] = u.second_root;
      }
    }
    table_ = sent(values).view({count, 3, run_.models, 1});
    sent_begin_ = now_;
    sent_end_ = now_ + count;
  }

  const RowsRun& run_;
  int64_t updates_; // of the call
  int64_t now_ = -1;
  int64_t sent_begin_ = 0;
  int64_t sent_end_ = 0;
  at::Tensor table_;
  bool any_[5] = {};
};

// The weights, or the biases, of all models: views of the arguments.
struct Part {
  at::Tensor parameter; // (K, P)
  at::Tensor last_finite; // (K, P), as the following
  at::Tensor memory[3]; // undefined where the optimizer has none
  bool trained = false; // false also where there is none
};

Part make_part(const RowsRun& run, const at::Tensor& parameter, int64_t begin, bool trained) {
  const auto flat = parameter.view({run.models, -1});
  const auto state_row = [&](int64_t row) { return run.state[row].narrow(1, begin, flat.size(1)); };
  Part part{flat, state_row(kLastFinite), {}, trained};
  for (int64_t row = 1; row < std::min<int64_t>(run.state.size(0), 4); ++row) {
    part.memory[row - 1] = state_row(row);
  }
  return part;
}

// target = value, for the models of `which` (K, 1).
void assign(const at::Tensor& target, const at::Tensor& which, const at::Tensor& value) {
  target.copy_(at::where(which, value, target));
}

// rule.h's `updated` for all models: the new parameters, while the memory of the models of `alive` is brought up to date.
at::Tensor updated(const Part& part, at::Tensor g, const at::Tensor& alive, const Numbers& u, bool adam) {
  const auto& p = part.parameter;
  if (u.any_decay) {
    g = g.addcmul(u.decay, p);
  }
  if (!adam) {
    auto direction = g;
    if (u.any(UpdateRule::Momentum) || u.any(UpdateRule::Nesterov)) {
      const auto buffer = u.first ? g : g.mul(u.damped).addcmul_(u.momentum, part.memory[0]);
      direction = buffer;
      if (u.any(UpdateRule::Nesterov)) {
        direction = at::where(u.nesterov, g.addcmul(u.momentum, buffer), direction);
      }
      if (u.any(UpdateRule::Sgd)) {
        direction = at::where(u.plain, g, direction);
      }
      assign(part.memory[0], alive.logical_and(u.plain.logical_not()), buffer);
    }
    return p.addcmul(u.step, direction, -1);
  }
  const auto first = part.memory[0].addcmul(u.beta1_rest, g.sub(part.memory[0]));
  const auto second = g.mul(u.beta2_rest).mul_(g).addcmul_(u.beta2, part.memory[1]);
  auto root = second;
  assign(part.memory[0], alive, first);
  assign(part.memory[1], alive, second);
  if (u.any(UpdateRule::AdamAmsgrad)) {
    const auto& largest = part.memory[2];
    root = at::where(u.amsgrad.logical_and(largest.ge(second)), largest, second);
    assign(largest, alive.logical_and(u.amsgrad), root);
  }
  const auto divisor = root.sqrt().div_(u.second_root).add_(u.epsilon);
  return p.mul(u.shrink).sub_(first.mul(u.step).div_(divisor));
}

class Loop {
 public:
  explicit Loop(const RowsRun& run)
      : run_(run),
        numbers_(run),
        weight_(make_part(run, run.linear_weight, 0, run.train_weight)),
        doubles_(run.input.options().dtype(at::kDouble)),
        stopped_(run.stopped.to(run.input.device(), /*non_blocking=*/true, /*copy=*/true)) {
    if (run.linear_bias.defined()) {
      bias_ = make_part(run, run.linear_bias, run.out_features * run.in_features, run.train_bias);
    }
    alive_ = stopped_.lt(0);
  }

  Losses operator()() {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const bool validation = run_.validation_input.defined();
    const auto losses = at::full({run_.epochs, run_.models}, nan, doubles_);
    const auto validation_losses = at::full({validation ? run_.epochs : 0, run_.models}, nan, doubles_);
    if (run_.step == 0) { // before any loss is known, a model falls back to where it began
      keep(weight_);
      keep(bias_);
    }
    for (int64_t e = 0; e < run_.epochs; ++e) {
      epoch_ = run_.epoch + e;
      const auto order = run_.shuffle ? draw_order(run_).to(run_.input.device(), /*non_blocking=*/true) : at::Tensor();
      const auto began = alive_;
      auto sum = at::zeros({run_.models}, doubles_);
      for (int64_t begin = 0; begin < run_.rows; begin += run_.batch_rows) {
        sum = train_batch(order, begin, std::min(begin + run_.batch_rows, run_.rows), sum);
      }
      assign(losses[e], began, sum.div(static_cast<double>(run_.rows)));
      if (validation) {
        const auto [loss, finite] = validate();
        assign(validation_losses[e], alive_, loss);
        stop(finite);
        put_back(weight_);
        put_back(bias_);
      }
    }
    return read_back(losses, validation_losses);
  }

 private:
  struct Loss {
    at::Tensor value; // (K) float64; infinite or NaN where it is that in the parameters' dtype
    at::Tensor finite; // (K) bool
  };

  Loss loss_of(const at::Tensor& squares, int64_t rows) const {
    const auto loss = squares.div(static_cast<double>(rows * run_.out_features));
    const auto rounded = loss.to(run_.input.scalar_type());
    const auto finite = at::isfinite(rounded);
    return {at::where(finite, loss, rounded.to(at::kDouble)), finite};
  }

  // (n, K O); the sums of its squares (K) are added to `squares`.
  at::Tensor residuals(const at::Tensor& x, const at::Tensor& y, at::Tensor& squares) const {
    const auto w = run_.linear_weight.view({-1, run_.in_features}).t();
    const auto r = run_.linear_bias.defined() ? at::addmm(run_.linear_bias.view({-1}), x, w) : at::mm(x, w);
    const auto by_model = r.view({x.size(0), run_.models, run_.out_features});
    by_model.sub_(y.unsqueeze(1));
    // In float64, and not as a second matrix of squares.
    squares = squares.add(at::linalg_vector_norm(by_model, 2, at::IntArrayRef{0, 2}, false, at::kDouble).square());
    return r;
  }

  int64_t chunk_rows() const {
    return std::max<int64_t>(1, kMostResiduals / (run_.models * run_.out_features));
  }

  // One update; returns `sum` and the batch's loss, times its rows.
  at::Tensor train_batch(const at::Tensor& order, int64_t begin, int64_t end, const at::Tensor& sum) {
    auto squares = at::zeros({run_.models}, doubles_);
    at::Tensor weight_gradient, bias_gradient;
    for (int64_t first = begin; first < end; first += chunk_rows()) {
      const int64_t count = std::min(chunk_rows(), end - first);
      const auto rows = [&](const at::Tensor& matrix) {
        return order.defined() ? matrix.index_select(0, order.narrow(0, first, count)) : matrix.narrow(0, first, count);
      };
      const auto x = rows(run_.input);
      const auto r = residuals(x, rows(run_.target), squares);
      if (run_.train_weight) {
        weight_gradient = weight_gradient.defined() ? weight_gradient.addmm_(r.t(), x) : at::mm(r.t(), x);
      }
      if (run_.train_bias) {
        const auto share = r.sum(0);
        bias_gradient = bias_gradient.defined() ? bias_gradient.add_(share) : share;
      }
    }
    const int64_t count = end - begin;
    const auto [loss, finite] = loss_of(squares, count);
    const auto next = at::where(alive_, sum.add(loss, static_cast<double>(count)), sum);
    stop(finite);
    numbers_.advance();
    const double factor = 2.0 / static_cast<double>(count * run_.out_features);
    update(weight_, weight_gradient, factor);
    update(bias_, bias_gradient, factor);
    return next;
  }

  Loss validate() const {
    auto squares = at::zeros({run_.models}, doubles_);
    const int64_t rows = run_.validation_input.size(0);
    for (int64_t first = 0; first < rows; first += chunk_rows()) {
      const int64_t count = std::min(chunk_rows(), rows - first);
      residuals(run_.validation_input.narrow(0, first, count), run_.validation_target.narrow(0, first, count), squares);
    }
    return loss_of(squares, rows);
  }

  // Models that have trained until here and whose loss is not finite.
  void stop(const at::Tensor& finite) {
    now_stopped_ = alive_.logical_and(finite.logical_not());
    stopped_.masked_fill_(now_stopped_, epoch_);
    alive_ = alive_.logical_and(finite);
  }

  void keep(const Part& part) const {
    if (part.trained) {
      assign(part.last_finite, alive_.unsqueeze(1), part.parameter);
    }
  }
  void put_back(const Part& part) const {
    if (part.trained) {
      assign(part.parameter, now_stopped_.unsqueeze(1), part.last_finite);
    }
  }

  void update(const Part& part, const at::Tensor& gradient, double factor) const {
    keep(part);
    if (part.trained) {
      const auto alive = alive_.unsqueeze(1);
      const auto g = gradient.view_as(part.parameter).mul(factor);
      const auto next = updated(part, g, alive, numbers_, run_.optimizer != Optimizer::Sgd);
      assign(part.parameter, alive, next);
      put_back(part);
    }
  }

  // The only wait of a call.
  Losses read_back(const at::Tensor& losses, const at::Tensor& validation_losses) const {
    const auto all = at::cat({losses, validation_losses, stopped_.to(at::kDouble).unsqueeze(0)}).cpu();
    run_.stopped.copy_(all[all.size(0) - 1]);
    return {
        all.narrow(0, 0, run_.epochs).clone(),
        all.narrow(0, run_.epochs, validation_losses.size(0)).clone(),
    };
  }

  const RowsRun& run_;
  Numbers numbers_;
  Part weight_;
  Part bias_{};
  at::TensorOptions doubles_;
  at::Tensor stopped_; // (K) int64
  at::Tensor alive_; // (K) bool: trains on
  at::Tensor now_stopped_; // (K) bool: by the loss that was looked at last
  int64_t epoch_ = 0;
};

} // namespace

Losses decomposed_rows_run(const RowsRun& run) {
  if (run.epochs == 0) {
    return no_losses(run, run.validation_input.defined());
  }
  const at::AutoDispatchBelowAutograd guard;
  return Loop(run)();
}

TORCH_LIBRARY_FRAGMENT(torchintro, m) {
  // As linear_mse_fit: tests compare the two.
  m.def("_linear_mse_fit_decomposed(" TORCHINTRO_ROWS_ARGUMENTS ") -> (Tensor losses, Tensor validation_losses)");
}

TORCH_LIBRARY_IMPL(torchintro, CompositeExplicitAutograd, m) {
  m.impl("_linear_mse_fit_decomposed", rows_operator<decomposed_rows_run>);
}

} // namespace torchintro::fit
