#include "fit/linear_moments.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace torchintro::fit {
namespace {

// A chunk in float64 of so many bytes, but no fewer than kLeastChunkRows rows: each product reads and writes all of its sums.
constexpr int64_t kChunkBytes = int64_t{16} << 20;
constexpr int64_t kLeastChunkRows = 1024;

// Rows of the sums that one product makes: what lies left of a block on the diagonal is not computed, half of a block on it
// for nothing.
constexpr int64_t kBlock = 256;

// sum / count, or zero where nothing was counted.
at::Tensor mean_of(const at::Tensor& sum, const at::Tensor& count) {
  return at::where(count.gt(0), sum.div(count), at::zeros({}, sum.options()));
}

// The mean of rows near enough: of the first one plus differences from it, so that a constant column is met exactly. Without
// any weight in those rows, their plain mean.
at::Tensor shift_of(const at::Tensor& rows, const at::Tensor& weight) {
  const auto first = rows[0];
  const auto count = weight.sum();
  const auto usable = at::where(count.gt(0), weight, at::full({}, 1.0, weight.options()));
  return first.add(rows.sub(first).mul(usable.unsqueeze(1)).sum(0).div(usable.sum()));
}

} // namespace

LinearMoments moments_by_products(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight) {
  const int64_t rows = input.size(0), d = input.size(1), o = target.size(1), all = d + o;
  const auto options = input.options().dtype(at::kDouble);
  auto sums = at::zeros({d, all}, options); // about the shift: the upper triangle of sxx by blocks, and sxy
  auto syy = at::zeros({o}, options);
  auto count = at::zeros({}, options);
  auto sum = at::zeros({all}, options);
  auto shift = at::zeros({all}, options);
  if (rows > 0) {
    const auto pick = [&, step = shift_step(rows)](const at::Tensor& from) {
      return from.slice(0, 0, std::min(rows, step * kShiftRows), step).to(at::kDouble);
    };
    const auto picked_weight = weight ? pick(*weight) : at::full({1}, 1.0, options).expand(pick(target).size(0));
    shift.narrow(0, 0, d).copy_(shift_of(pick(input), picked_weight));
    shift.narrow(0, d, o).copy_(shift_of(pick(target), picked_weight));
  }
  const int64_t chunk_rows = std::min(rows, std::max(kLeastChunkRows, kChunkBytes / (8 * std::max<int64_t>(all, 1))));
  auto memory = at::empty({chunk_rows, all}, options);
  auto weighted_memory = weight ? at::empty({chunk_rows, all}, options) : memory;
  for (int64_t row = 0; row < rows; row += chunk_rows) {
    const int64_t some = std::min(chunk_rows, rows - row);
    auto z = memory.narrow(0, 0, some);
    z.narrow(1, 0, d).copy_(input.narrow(0, row, some));
    z.narrow(1, d, o).copy_(target.narrow(0, row, some));
    z.sub_(shift);
    auto vz = weighted_memory.narrow(0, 0, some);
    if (weight) {
      const auto v = weight->narrow(0, row, some).to(at::kDouble);
      at::mul_out(vz, z, v.unsqueeze(1));
      count.add_(v.sum());
    } else {
      count.add_(static_cast<double>(some));
    }
    sum.add_(vz.sum(0));
    syy.add_(vz.narrow(1, d, o).mul(z.narrow(1, d, o)).sum(0));
    for (int64_t i = 0; i < d; i += kBlock) {
      const int64_t width = std::min(kBlock, d - i);
      auto block = sums.narrow(0, i, width).narrow(1, i, all - i);
      block.addmm_(vz.narrow(1, i, width).t(), z.narrow(1, i, all - i));
    }
  }
  const auto offset = mean_of(sum, count); // of the mean from the shift
  const auto mean = shift.add(offset);
  sums.addr_(sum.narrow(0, 0, d), offset, 1, -1);
  auto sxx = sums.narrow(1, 0, d).triu();
  sxx = sxx.add(sxx.triu(1).t());
  sxx.diagonal().clamp_min_(0);
  syy = syy.sub(sum.narrow(0, d, o).mul(offset.narrow(0, d, o))).clamp_min(0);
  const auto none = count.le(0);
  const auto zero_without_rows = [&](const at::Tensor& tensor) {
    return at::where(none, at::zeros({}, options), tensor).contiguous();
  };
  return {
      count,
      zero_without_rows(mean.narrow(0, 0, d)),
      zero_without_rows(mean.narrow(0, d, o)),
      zero_without_rows(sxx),
      zero_without_rows(sums.narrow(1, d, o)),
      zero_without_rows(syy)};
}

} // namespace torchintro::fit
