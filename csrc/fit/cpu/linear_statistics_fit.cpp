// linear_statistics_fit: training on second moments. With n = count, e = b + w mean_x - mean_y and q = w sxx - sxy (a row each
// for every output):
//
//   loss = 1 / (n O) sum_o (w (q - sxy) + syy + n e^2)       dW = 2 / (n O) (q + n e mean_x)       db = 2 / O e
//
// Everything is about centred data and in float64. Operations an epoch and model: 2 O D^2. Bytes: sxx once for every four rows
// of weights, out of a cache for up to some hundred features.
#include "fit/cpu/linear_statistics_fit.h"

#include "cpu/kernels/kernels.h"
#include "fit/cpu/models.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

namespace torchintro::fit {
namespace {

// Rows of weights that are multiplied with sxx at once.
constexpr int64_t kRowsAtOnce = 4;
// Multiplications that are worth waking a thread for: of models on their own, and of the columns of one product.
constexpr int64_t kOperationsPerThread = int64_t{1} << 20; // some 100 us
constexpr int64_t kOperationsPerColumns = 131072;

// The moments as the loop reads them, each epoch anew: asking a tensor for its data takes as long as an epoch of one feature.
struct Sums {
  double count;
  const double *mean_x, *mean_y, *sxx, *sxy, *syy;

  explicit Sums(const Moments& m)
      : count(*m.count.const_data_ptr<double>()),
        mean_x(m.mean_x.const_data_ptr<double>()),
        mean_y(m.mean_y.const_data_ptr<double>()),
        sxx(m.sxx.const_data_ptr<double>()),
        sxy(m.sxy.const_data_ptr<double>()),
        syy(m.syy.const_data_ptr<double>()) {}
  explicit Sums(const MomentsMemory& m)
      : count(*m.count), mean_x(m.mean_x), mean_y(m.mean_y), sxx(m.sxx), sxy(m.sxy), syy(m.syy) {}
};

class Loop {
 public:
  Loop(
      const RunSizes& run,
      const Models<double>& models,
      const Sums& train,
      const std::optional<Sums>& validation,
      double largest)
      : run_(run),
        models_(models),
        sums_(train),
        validation_(validation),
        largest_(largest),
        row_products_(cpu::find_kernels(cpu::DType::Float64, cpu::DType::Float64).row_products),
        d_(run.in_features),
        o_(run.out_features),
        group_(std::max<int64_t>(1, kRowsAtOnce / run.out_features)) {}

  void run(double* losses, double* validation_losses) {
    losses_ = losses;
    validation_losses_ = validation_losses;
    const int64_t groups = (run_.models + group_ - 1) / group_;
    const int64_t operations = std::max<int64_t>(1, run_.epochs * group_ * o_ * d_ * d_);
    at::parallel_for(0, groups, kOperationsPerThread / operations + 1, [&](int64_t begin, int64_t end) {
      std::vector<double> q(group_ * o_ * d_), gradient(models_.parameters());
      for (int64_t group = begin; group < end; ++group) {
        train(group * group_, std::min(run_.models, (group + 1) * group_), q.data(), gradient.data());
      }
    });
  }

 private:
  void train(int64_t first, int64_t last, double* q, double* gradient) {
    for (int64_t epoch = 0; epoch < run_.epochs; ++epoch) {
      bool running = false;
      for (int64_t k = first; k < last; ++k) {
        running |= !models_.has_stopped(k);
      }
      if (!running) {
        return;
      }
      const int64_t step = run_.step + epoch;
      multiply(sums_, first, last, q);
      for (int64_t k = first; k < last; ++k) {
        if (models_.has_stopped(k)) {
          continue;
        }
        const double loss = loss_and_gradient<true>(sums_, k, q + (k - first) * o_ * d_, gradient);
        losses_[epoch * run_.models + k] = loss;
        if (is_finite(loss)) {
          models_.update(k, models_.update_of(k, epoch, step), 0, models_.parameters(), gradient);
        } else {
          stop(k, epoch, step);
        }
      }
      if (validation_) {
        multiply(*validation_, first, last, q);
        for (int64_t k = first; k < last; ++k) {
          if (!models_.has_stopped(k)) {
            const double loss = loss_and_gradient<false>(*validation_, k, q + (k - first) * o_ * d_, nullptr);
            validation_losses_[epoch * run_.models + k] = loss;
            if (!is_finite(loss)) {
              stop(k, epoch, step + 1);
            }
          }
        }
      }
    }
  }

  bool is_finite(double loss) const {
    return loss <= largest_; // and NaN is not
  }

  void stop(int64_t model, int64_t epoch, int64_t step) const {
    models_.restore(model, step, 0, models_.parameters());
    models_.stop(model, epoch);
  }

  // q = w sxx for all outputs of models [first, last)
  void multiply(const Sums& m, int64_t first, int64_t last, double* q) const {
    const int64_t rows = (last - first) * o_;
    if (d_ == 1) {
      for (int64_t i = 0; i < rows; ++i) {
        q[i] = *m.sxx * models_.weight(first)[i];
      }
      return;
    }
    const cpu::RowProducts call{models_.weight(first), m.sxx, q, rows, d_, d_};
    if (at::in_parallel_region() || rows * d_ * d_ < kOperationsPerColumns) {
      row_products_(call, 0, d_);
    } else {
      at::parallel_for(0, d_, kOperationsPerColumns / (2 * rows * d_) + 1, [&](int64_t begin, int64_t end) {
        row_products_(call, begin, end);
      });
    }
  }

  // From q = w sxx, the loss; and the gradient, as the state has the parameters.
  template <bool Gradient>
  double loss_and_gradient(const Sums& m, int64_t model, const double* q, double* gradient) const {
    const double n = m.count;
    const double* w = models_.weight(model);
    const double* b = models_.bias(model);
    const double scale = 2 / (n * static_cast<double>(o_));
    double sum = 0;
    for (int64_t o = 0; o < o_; ++o, w += d_, q += d_) {
      double e = (b ? b[o] : 0) - m.mean_y[o], squares = m.syy[o];
      for (int64_t d = 0; d < d_; ++d) {
        const double xy = m.sxy[d * o_ + o];
        e += w[d] * m.mean_x[d];
        squares += w[d] * (q[d] - xy - xy);
      }
      // Rounding can leave a fit without residuals below zero.
      sum += std::max(squares, 0.0) + n * e * e;
      if (Gradient) {
        for (int64_t d = 0; d < d_; ++d) {
          gradient[o * d_ + d] = scale * (q[d] - m.sxy[d * o_ + o] + n * e * m.mean_x[d]);
        }
        gradient[models_.weights() + o] = scale * n * e;
      }
    }
    return sum / (n * static_cast<double>(o_));
  }

  const RunSizes& run_;
  Models<double> models_;
  Sums sums_;
  std::optional<Sums> validation_;
  double largest_;
  cpu::RowProductsKernel row_products_;
  int64_t d_, o_;
  int64_t group_; // models whose weights are multiplied at once
  double* losses_ = nullptr;
  double* validation_losses_ = nullptr;
};

} // namespace

Losses train_on_moments(const MomentsRun& run) {
  auto results = no_losses(run, run.validation.has_value());
  const auto validation = run.validation ? std::optional<Sums>(*run.validation) : std::nullopt;
  Loop(run, Models<double>(run), Sums(run.train), validation, run.largest)
      .run(std::get<0>(results).mutable_data_ptr<double>(), std::get<1>(results).mutable_data_ptr<double>());
  return results;
}

void train_on_moments(
    const RunSizes& run, const Models<double>& models, const MomentsMemory& moments, double largest, double* losses) {
  Loop(run, models, Sums(moments), std::nullopt, largest).run(losses, nullptr);
}

namespace {

Losses linear_statistics_fit_cpu(const MomentsRun& run) {
  auto losses = train_on_moments(run);
  count_changes(run);
  return losses;
}

TORCH_LIBRARY_IMPL(torchintro, CPU, m) {
  m.impl("linear_statistics_fit", moments_operator<linear_statistics_fit_cpu>);
}

} // namespace
} // namespace torchintro::fit
