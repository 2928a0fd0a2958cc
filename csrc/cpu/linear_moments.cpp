// The CPU key of _linear_moments: one pass by the kernel of cpu/kernels/moments_impl.h, or products for what is wide.
#include "cpu/linear_moments.h"

#include "cpu/call.h"
#include "cpu/own_threads.h"

#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace torchintro::fit {
namespace {

using cpu::RowMoments;

// Blocks of rows, fixed by the sizes and never by the number of threads. Every block has sums of its own, which are added up
// afterwards: at least so many rows for them to be worth it, and never so many blocks that the sums leave the caches.
constexpr int64_t kRowsPerBlock = 256;
constexpr int64_t kManyBlocks = 16;
constexpr int64_t kMaximumBlocks = 128;
constexpr int64_t kSumsBytes = int64_t{8} << 20;

// Multiplications, a millisecond or more of them, beside which starting threads that end with the call is nothing.
constexpr int64_t kOperationsOfOwnThreads = int64_t{1} << 23;

int64_t count_blocks(const RowMoments& call) {
  const int64_t most = std::clamp(kSumsBytes / (8 * moments_sums(call)), kManyBlocks, kMaximumBlocks);
  return std::clamp<int64_t>(call.rows / std::max(kRowsPerBlock, 2 * call.in_features), 1, most);
}

// Near the means of a matrix's columns: the first row's value plus the mean difference from it, so that a constant column is
// met exactly.
template <typename T>
void estimate_means(const at::Tensor& matrix, const double* weight, double* shift) {
  const T* data = matrix.const_data_ptr<T>();
  const int64_t rows = matrix.size(0), row_stride = matrix.stride(0), column_stride = matrix.stride(1);
  const int64_t step = shift_step(rows), picked = std::min(kShiftRows, rows);
  double count = 0;
  for (int64_t i = 0; weight && i < picked; ++i) {
    count += weight[i * step];
  }
  const bool weighted = count > 0;
  for (int64_t c = 0; c < matrix.size(1); ++c) {
    const T* column = data + c * column_stride;
    const auto first = static_cast<double>(column[0]);
    double sum = 0;
    for (int64_t i = 0; i < picked; ++i) {
      const double difference = static_cast<double>(column[i * step * row_stride]) - first;
      sum += weighted ? weight[i * step] * difference : difference;
    }
    shift[c] = first + sum / (weighted ? count : static_cast<double>(picked));
  }
}

void estimate_means(const at::Tensor& matrix, const double* weight, double* shift) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, matrix.scalar_type(), "_linear_moments", [&] {
    estimate_means<scalar_t>(matrix, weight, shift);
  });
}

LinearMoments empty_moments(int64_t d, int64_t o) {
  const at::TensorOptions options(at::kDouble);
  return {
      empty_result({}, options),
      empty_result({d}, options),
      empty_result({o}, options),
      empty_result({d, d}, options),
      empty_result({d, o}, options),
      empty_result({o}, options)};
}

// From sums about the shift to centred ones.
void finish(const RowMoments& call, const double* sums, const MomentsMemory& moments) {
  const int64_t d = call.in_features, o = call.out_features, stride = moments_stride(call);
  const double* sum_y = sums + 1;
  const double* squares_y = sums + 1 + o;
  const double* sum_x = sums + moments_matrix(call);
  const double* products_y = sum_x + stride;
  const double* products_x = sum_x + moments_extra(call) * stride;
  const double* shift_y = call.shift + cpu::round_up(d, cpu::kMaximumLanes);
  auto [to_count, mean_x, mean_y, sxx, sxy, syy] = moments;
  const double count = sums[0];
  *to_count = count;
  for (int64_t i = 0; i < o; ++i) {
    const double offset = sum_y[i] / count;
    mean_y[i] = shift_y[i] + offset;
    const double centred = squares_y[i] - sum_y[i] * offset;
    syy[i] = centred < 0 ? 0 : centred; // NaN stays
  }
  for (int64_t i = 0; i < d; ++i) {
    const double offset = sum_x[i] / count;
    mean_x[i] = call.shift[i] + offset;
    for (int64_t j = 0; j < o; ++j) {
      sxy[i * o + j] = products_y[j * stride + i] - offset * sum_y[j];
    }
    for (int64_t j = i; j < d; ++j) {
      const double centred = products_x[i * stride + j] - offset * sum_x[j];
      sxx[i * d + j] = sxx[j * d + i] = i == j && centred < 0 ? 0 : centred;
    }
  }
}

bool has_kernel(const at::Tensor& input, const at::Tensor& target) {
  const int64_t d = input.size(1), o = target.size(1);
  return input.size(0) > 0 && d > 0 && o > 0 && d <= cpu::kMostMomentsFeatures && o <= cpu::kMostMomentsOutputs;
}

// False if the rows weigh nothing. `to` is asked for the memory of the result afterwards.
template <typename To>
bool gather(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& given_weight, const To& to) {
  const int64_t rows = input.size(0), d = input.size(1), o = target.size(1);
  const auto weight = given_weight ? cpu::contiguous_in(at::kDouble, *given_weight) : at::Tensor();
  const int64_t padded = cpu::round_up(d, cpu::kMaximumLanes);
  std::vector<double> shift(static_cast<size_t>(padded + o));

  RowMoments call{};
  call.input = cpu::strided(input);
  call.target = cpu::strided(target);
  call.target_type = cpu::dtype_of(target);
  call.weight = weight.defined() ? weight.const_data_ptr<double>() : nullptr;
  call.shift = shift.data();
  call.rows = rows;
  call.in_features = d;
  call.out_features = o;
  estimate_means(input, call.weight, shift.data());
  estimate_means(target, call.weight, shift.data() + padded);

  const auto kernel = cpu::find_kernels(cpu::dtype_of(input), cpu::dtype_of(input)).moments;
  const int64_t operations = d * (d / 2 + o + 1);
  const auto run = [&](const auto& threads) {
    return cpu::sum_blocks(
        threads,
        rows,
        count_blocks(call),
        operations,
        moments_sums(call),
        moments_scratch_bytes(call),
        [&](int64_t begin, int64_t end, double* partial, void* scratch) {
          kernel(call, begin, end, partial, scratch);
        });
  };
  const auto sums = rows * operations < kOperationsOfOwnThreads ? run(cpu::AtenThreads{}) : run(cpu::OwnThreads{});
  if (sums[0] == 0) {
    return false;
  }
  finish(call, sums.get(), to());
  return true;
}

} // namespace

MomentsMemory::MomentsMemory(const LinearMoments& moments)
    : count(std::get<0>(moments).mutable_data_ptr<double>()),
      mean_x(std::get<1>(moments).mutable_data_ptr<double>()),
      mean_y(std::get<2>(moments).mutable_data_ptr<double>()),
      sxx(std::get<3>(moments).mutable_data_ptr<double>()),
      sxy(std::get<4>(moments).mutable_data_ptr<double>()),
      syy(std::get<5>(moments).mutable_data_ptr<double>()) {}

LinearMoments linear_moments_cpu(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight) {
  check_moments_inputs(input, target, weight);
  if (!has_kernel(input, target)) {
    return moments_by_products(input, target, weight);
  }
  LinearMoments moments;
  const auto make = [&] {
    moments = empty_moments(input.size(1), target.size(1));
    return MomentsMemory(moments);
  };
  if (!gather(input, target, weight, make)) {
    return moments_by_products(input.narrow(0, 0, 0), target.narrow(0, 0, 0), std::nullopt);
  }
  return moments;
}

bool gather_moments_cpu(const at::Tensor& input, const at::Tensor& target, const MomentsMemory& moments) {
  check_moments_inputs(input, target, std::nullopt);
  return has_kernel(input, target) && gather(input, target, std::nullopt, [&] { return moments; });
}

TORCH_LIBRARY_IMPL(torchintro, CPU, m) {
  m.impl("_linear_moments", linear_moments_cpu);
}

} // namespace torchintro::fit
