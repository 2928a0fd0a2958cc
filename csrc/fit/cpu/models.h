// The models of a run on the CPU: their parameters, their updates, and what happens when a loss is not finite.
#pragma once

#include "fit/fit.h"
#include "fit/rule.h"

#include <cmath>
#include <cstring>

namespace torchintro::fit {

template <typename T>
class Models {
 public:
  explicit Models(const Run& run)
      : Models(
            run,
            run.linear_weight.mutable_data_ptr<T>(),
            run.linear_bias.defined() ? run.linear_bias.mutable_data_ptr<T>() : nullptr,
            run.state.mutable_data_ptr<T>(),
            run.options.const_data_ptr<double>(),
            run.lr.const_data_ptr<double>(),
            run.stopped.mutable_data_ptr<int64_t>()) {}

  // The same without tensors, each of which costs some hundred nanoseconds. All as Run has it; `bias` is null without.
  Models(const RunSizes& run, T* weight, T* bias, T* state, const double* options, const double* lr, int64_t* stopped)
      : run_(run),
        weight_(weight),
        bias_(bias),
        state_(state),
        options_(options),
        lr_(lr),
        stopped_(stopped),
        weights_(run.out_features * run.in_features),
        parameters_(run.parameters()),
        row_(run.models * run.parameters()) {}

  T* weight(int64_t model) const {
    return weight_ + model * weights_;
  }
  T* bias(int64_t model) const {
    return bias_ ? bias_ + model * run_.out_features : nullptr;
  }
  int64_t weights() const { // of a model
    return weights_;
  }
  int64_t parameters() const {
    return parameters_;
  }

  bool has_stopped(int64_t model) const {
    return stopped_[model] >= 0;
  }
  void stop(int64_t model, int64_t epoch_of_call) const {
    stopped_[model] = run_.epoch + epoch_of_call;
  }

  Update<T> update_of(int64_t model, int64_t epoch_of_call, int64_t step) const {
    const double* options = options_ + model * kOptions;
    const bool adam = run_.optimizer != Optimizer::Sgd;
    const double number = static_cast<double>(step + 1);
    return make_update<T>(
        adam,
        run_.optimizer == Optimizer::AdamW,
        options,
        lr_[epoch_of_call * run_.models + model],
        step == 0,
        adam ? std::pow(options[kBeta1], number) : 0,
        adam ? std::pow(options[kBeta2], number) : 0);
  }

  // Elements [begin, end) of a model's parameters, as the state counts them; gradient[0] is that of element `begin`.
  void update(int64_t model, const Update<T>& u, int64_t begin, int64_t end, const T* gradient) const {
    T* state = state_ + model * parameters_;
    if (run_.train_weight && begin < weights_) {
      const int64_t count = std::min(end, weights_) - begin;
      update_part(u, weight(model) + begin, gradient, state + begin, count);
    }
    if (run_.train_bias && end > weights_) {
      const int64_t first = std::max(begin, weights_);
      update_part(u, bias(model) + (first - weights_), gradient + (first - begin), state + first, end - first);
    }
  }

  // Puts elements [begin, end) back to what they were when the loss was last finite. Before the first update they still are.
  void restore(int64_t model, int64_t step, int64_t begin, int64_t end) const {
    if (step == 0) {
      return;
    }
    const T* last = state_ + model * parameters_;
    for (int64_t i = begin; i < end; ++i) {
      if (i < weights_ ? run_.train_weight : run_.train_bias) {
        (i < weights_ ? weight(model)[i] : bias(model)[i - weights_]) = last[i];
      }
    }
  }

 private:
  template <UpdateRule Kind>
  void update_all(const Update<T>& u, T* p, const T* gradient, T* state, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      state[i] = p[i];
      p[i] = updated<Kind>(u, p[i], gradient[i], state + row_ + i, row_);
    }
  }

  void update_part(const Update<T>& u, T* p, const T* gradient, T* state, int64_t count) const {
    switch (u.kind) {
      case UpdateRule::Sgd:
        return update_all<UpdateRule::Sgd>(u, p, gradient, state, count);
      case UpdateRule::Momentum:
        return update_all<UpdateRule::Momentum>(u, p, gradient, state, count);
      case UpdateRule::Nesterov:
        return update_all<UpdateRule::Nesterov>(u, p, gradient, state, count);
      case UpdateRule::Adam:
        return update_all<UpdateRule::Adam>(u, p, gradient, state, count);
      case UpdateRule::AdamAmsgrad:
        return update_all<UpdateRule::AdamAmsgrad>(u, p, gradient, state, count);
    }
  }

  const RunSizes& run_;
  T* weight_;
  T* bias_;
  T* state_;
  const double* options_;
  const double* lr_;
  int64_t* stopped_;
  int64_t weights_, parameters_;
  int64_t row_; // from one row of the state to the next
};

} // namespace torchintro::fit
