#include "cpu/many_outputs.h"

#include "cpu/call.h"
#include "cpu/gradient_memory.h"
#include "cpu/products.h"
#include "cpu/tiles.h"
#include "loss_per_element.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

namespace torchintro::cpu {
namespace {

// Elements of a block of the residual kernel, at most so many blocks of a tile: fixed by the sizes, so that the sums are too.
constexpr int64_t kBlockElements = 32768; // ATen's own grain size: what is worth waking a thread for
constexpr int64_t kMaximumBlocks = 64;

// After so many rows a share of the weight gradient ends and is added to the sum of all, in float64. Products add to what
// is there in their own dtype, some BLAS one row after the other: the same float32 number added 10 million times, by MKL on
// an AMD processor, is 15 % off. It is also long enough that adding the share, some 20 bytes for each of its elements, is
// nothing beside the 2 x 4096 operations of that element.
constexpr int64_t kRowsOfShare = 4096;

at::Tensor part(const at::Tensor& tensor, int64_t dim, int64_t begin, int64_t count) {
  return !tensor.defined() || (begin == 0 && count == tensor.size(dim)) ? tensor : tensor.narrow(dim, begin, count);
}

at::Tensor part(const at::Tensor& tensor, int64_t row, int64_t rows, int64_t output, int64_t outputs) {
  return part(part(tensor, 0, row, rows), 1, output, outputs);
}

// A matrix stored by columns, in rows: the residual kernel goes along the rows, and one element of each line of cache is all
// that it would use before the line is gone.
at::Tensor by_rows(const at::Tensor& matrix) {
  return matrix.defined() && matrix.stride(1) > 1 && matrix.stride(1) > matrix.stride(0) && matrix.stride(0) > 0
      ? matrix.contiguous()
      : matrix;
}

// Some of the rows, tile by tile, and their sums.
class TiledRows {
 public:
  TiledRows(const Problem& p, const Tiles& tiles, const std::array<at::Tensor, 4>& gradients)
      : p_(p),
        tiles_(tiles),
        gradients_(gradients),
        kernel_(find_kernels(dtype_of(p.input), dtype_of(p.target)).residual) {
    wide_ = p.mask[kLinearWeight] && tiles.wide_weight_gradient;
    share_ = wide_ ? at::zeros_like(gradients[kLinearWeight], at::kFloat, at::MemoryFormat::Contiguous)
                   : gradients[kLinearWeight];
    // In 16 bits the product's bias is rounded once, with it; else it is cheaper in the residual kernel, where it is no pass
    // of its own over the prediction.
    bias_in_kernel_ = p.input.element_size() > 2;
    if (p.linear_bias.defined() && bias_in_kernel_) {
      bias_ = p.linear_bias.contiguous();
    }
    if (p.mask[kLinearBias]) {
      bias_sums_.resize(p.out_features);
    }
    buffer_ = at::empty({tiles.rows * tiles.outputs}, p.input.options());
  }

  // Memory of its own for the weight gradient, for other rows than those that the gradient itself is given to.
  void make_weight_gradient() {
    if (p_.mask[kLinearWeight] && !wide_) {
      share_ = at::empty_like(share_);
    }
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += tiles_.rows) {
      if (share_rows_ >= kRowsOfShare) {
        end_share();
      }
      const int64_t rows = std::min(tiles_.rows, end - row);
      const auto input = without_gaps(part(p_.input, 0, row, rows));
      for (int64_t output = 0; output < p_.out_features; output += tiles_.outputs) {
        run_tile(input, row, rows, output, std::min(tiles_.outputs, p_.out_features - output));
      }
      share_rows_ += rows;
    }
  }

  double loss() const {
    return loss_;
  }
  const std::vector<double>& bias_sums() const {
    return bias_sums_;
  }
  // In float64 if there was more than one share, else in the dtype of a share.
  const at::Tensor& weight_gradient() {
    if (sum_.defined()) {
      end_share();
      return sum_;
    }
    return share_;
  }
  const at::Tensor& input_gradient() const {
    return gradients_[kInput];
  }

  void add(TiledRows& other) {
    loss_ += other.loss_;
    for (size_t o = 0; o < bias_sums_.size(); ++o) {
      bias_sums_[o] += other.bias_sums_[o];
    }
    if (p_.mask[kLinearWeight]) {
      if (other.sum_.defined()) {
        end_share();
      }
      weight_gradient().add_(other.weight_gradient());
    }
  }

 private:
  void run_tile(const at::Tensor& input, int64_t row, int64_t rows, int64_t output, int64_t outputs) {
    const auto linear_weight = part(p_.linear_weight, 0, output, outputs);
    const auto buffer = part(buffer_, 0, 0, rows * outputs).view({rows, outputs});
    const auto bias = bias_in_kernel_ ? at::Tensor() : p_.linear_bias;
    const auto g = product_with_transposed(buffer, input, linear_weight, bias);
    residual(g, row, rows, output, outputs);
    const bool whole = rows == p_.rows && outputs == p_.out_features;
    if (p_.mask[kInput]) {
      auto out = part(gradients_[kInput], 0, row, rows);
      product(out, g, linear_weight, p_.input_gradient_factor, /*add=*/output > 0, whole);
      if (whole) {
        gradients_[kInput] = out;
      }
    }
    if (wide_) {
      add_wide_product(part(share_, 0, output, outputs), g, input);
    } else if (p_.mask[kLinearWeight]) {
      auto out = part(share_, 0, output, outputs);
      product(out, g.t(), input, p_.weight_gradient_factor, /*add=*/share_rows_ > 0, whole);
      if (whole) {
        share_ = out;
      }
    }
  }

  void end_share() {
    if (!p_.mask[kLinearWeight] || share_rows_ == 0) {
      return;
    }
    if (sum_.defined()) {
      sum_.add_(share_);
    } else {
      sum_ = share_.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
    }
    if (wide_) {
      share_.zero_();
    }
    share_rows_ = 0;
  }

  void residual(const at::Tensor& g, int64_t row, int64_t rows, int64_t output, int64_t outputs) {
    const auto target = by_rows(part(p_.target, row, rows, output, outputs));
    const auto weight = by_rows(part(p_.weight, row, rows, output, outputs));
    Residual call{};
    call.product = g.mutable_data_ptr();
    if (bias_.defined()) {
      call.linear_bias = static_cast<const char*>(bias_.const_data_ptr()) + output * bias_.element_size();
    }
    call.target = strided(target);
    call.weight = strided(weight);
    call.outputs = outputs;
    call.residual_scale = residual_scale(p_);
    call.target_scale = p_.target_gradient_factor;
    if (const auto& gradient = gradients_[kTarget]; gradient.defined()) {
      call.grad_target_row_stride = p_.out_features;
      call.grad_target = static_cast<char*>(gradient.mutable_data_ptr()) +
          (row * p_.out_features + output) * static_cast<int64_t>(gradient.element_size());
    }
    call.wants_residual = p_.mask[kInput] || p_.mask[kLinearWeight];
    call.wants_bias_gradient = p_.mask[kLinearBias];

    const int64_t size = 1 + (call.wants_bias_gradient ? outputs : 0);
    const auto sums = sum_blocks(
        AtenThreads{},
        rows,
        std::clamp<int64_t>(rows * outputs / kBlockElements, 1, kMaximumBlocks),
        outputs,
        size,
        residual_scratch_bytes(call),
        [&](int64_t begin, int64_t end, double* partial, void* scratch) {
          kernel_(call, begin, end, partial, scratch);
        });
    loss_ += sums[0];
    for (int64_t o = 0; o + 1 < size; ++o) {
      bias_sums_[output + o] += sums[1 + o];
    }
  }

  const Problem& p_;
  const Tiles& tiles_;
  std::array<at::Tensor, 4> gradients_;
  ResidualKernel kernel_;
  bool wide_;
  bool bias_in_kernel_;
  // Of the weight gradient: what the rows since the last share have added, how many these are, and the sum of the others.
  at::Tensor share_;
  int64_t share_rows_ = 0;
  at::Tensor sum_;
  at::Tensor bias_;
  at::Tensor buffer_;
  double loss_ = 0;
  std::vector<double> bias_sums_;
};

} // namespace

std::tuple<at::Tensor, std::array<at::Tensor, 4>> many_outputs(const Problem& p) {
  auto gradients = empty_gradients(p, empty_gradient);
  const auto tiles = make_tiles(p);

  std::vector<TiledRows> lanes;
  lanes.reserve(tiles.lanes);
  for (int64_t lane = 0; lane < tiles.lanes; ++lane) {
    lanes.emplace_back(p, tiles, gradients);
    if (lane > 0) {
      lanes[lane].make_weight_gradient();
    }
  }
  if (tiles.lanes == 1) {
    lanes[0].run(0, p.rows);
  } else {
    at::parallel_for(0, tiles.lanes, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView guard; // as in the thread that called
      for (int64_t lane = begin; lane < end; ++lane) {
        lanes[lane].run(lane * tiles.rows_per_lane, std::min(p.rows, (lane + 1) * tiles.rows_per_lane));
      }
    });
  }
  auto& total = lanes[0];
  for (int64_t lane = 1; lane < tiles.lanes; ++lane) {
    total.add(lanes[lane]);
  }

  if (tiles.lanes == 1) {
    gradients[kInput] = total.input_gradient(); // a product may have made it
  }
  if (p.mask[kLinearWeight]) {
    const at::Tensor& sum = total.weight_gradient();
    if (tiles.wide_weight_gradient && p.weight_gradient_factor != 1.0) {
      sum.mul_(p.weight_gradient_factor);
    }
    if (sum.scalar_type() == gradients[kLinearWeight].scalar_type()) {
      gradients[kLinearWeight] = sum;
    } else {
      gradients[kLinearWeight].copy_(sum);
    }
  }
  if (p.mask[kLinearBias]) {
    const auto& gradient = gradients[kLinearBias];
    find_kernels(dtype_of(gradient), dtype_of(gradient))
        .add_up(
            total.bias_sums().data(),
            /*blocks=*/1,
            /*stride=*/0,
            0,
            p.out_features,
            p.weight_gradient_factor,
            gradient.mutable_data_ptr());
  }
  return {loss_of(p, total.loss()), gradients};
}

} // namespace torchintro::cpu
