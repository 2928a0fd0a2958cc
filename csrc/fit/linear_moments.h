// _linear_moments: the count, the means and the centred second moments of the rows of an input and a target, from one pass over
// them. With rows x_n (D), y_n (O) and weights v_n (1 without):
//
//   count  = sum_n v_n        mean_x = sum_n v_n x_n / count        mean_y = sum_n v_n y_n / count
//   sxx    = sum_n v_n (x_n - mean_x) (x_n - mean_x)'
//   sxy    = sum_n v_n (x_n - mean_x) (y_n - mean_y)'
//   syy[o] = sum_n v_n (y_no - mean_y[o])^2
//
// The mean squared error of a linear model and its gradients are functions of these, and of nothing else of the rows.
//
// Everything is float64, whatever the dtypes of the rows. What is summed is not the centred rows, whose mean is known only
// afterwards, but z - s for a shift s near the mean m, and then sum v (z - m)^2 = sum v (z - s)^2 - count (m - s)^2. The
// difference cancels as far as s is from m. s is the weighted mean of kShiftRows rows spread evenly over all, whose own squares
// are part of the sum: with equal weights count (m - s)^2 <= (N / kShiftRows) sum v (z - m)^2 for any rows whatever, so that no
// more than log10(N / kShiftRows) of the sixteen digits are lost in the worst order, and none where the rows are in no order.
// How far the mean is from zero does not matter. Where there are no rows, or all weights are zero, everything is zero.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace torchintro::fit {

using LinearMoments = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The six where they lie, one after the other.
struct MomentsMemory {
  double *count, *mean_x, *mean_y, *sxx, *sxy, *syy;

  static int64_t size(int64_t d, int64_t o) {
    return 1 + d + o + d * d + d * o + o;
  }
  MomentsMemory(double* memory, int64_t d, int64_t o)
      : count(memory), mean_x(count + 1), mean_y(mean_x + d), sxx(mean_y + o), sxy(sxx + d * d), syy(sxy + d * o) {}
  explicit MomentsMemory(const LinearMoments& moments);
};

constexpr int64_t kShiftRows = 64;

// Raises ValueError or TypeError unless the call is well formed. Weights must not be negative, which is not looked at.
void check_moments_inputs(const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight);

// Rows first, first + step, ... for the shift: kShiftRows of them, or all where there are no more.
inline int64_t shift_step(int64_t rows) {
  return rows <= kShiftRows ? 1 : rows / kShiftRows;
}

// By PyTorch's matrix products, on any device that has float64; the host waits for nothing. The rows are copied to float64 in
// chunks, and of sxx only blocks on and right of the diagonal are computed.
LinearMoments moments_by_products(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight);

} // namespace torchintro::fit
