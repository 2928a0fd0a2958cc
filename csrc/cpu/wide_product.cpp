// The weight gradient of 16-bit operands in float32.
//
// Where the processor has instructions for 16-bit products, by oneDNN's kernel for small blocks, which ATen exports:
//   C (up to 64 x 64, float32) += A (64 x K) B (K x 64),   A = g' of a block of outputs, B = x of a block of features
// B is packed once for all blocks of outputs, with the rows in pairs as the instructions take them; a thread owns blocks of
// outputs and transposes their g as it comes to them. Each element of the sum belongs to one thread and adds its rows in
// their order. Elsewhere float32 products of copies.
#include "cpu/kernels/kernels.h"
#include "cpu/products.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>

#include <algorithm>
#include <memory>

namespace torchintro::cpu {
namespace {

constexpr int64_t kBlock = 64; // outputs and features of a block: 16 KB of sums, 4 x 4 tiles of AMX
constexpr int64_t kBlockRows = 512; // 64 KB of each operand beside them: inside the second cache
constexpr int64_t kRowsMultiple = 32; // of one AMX instruction; filled up with zeros
constexpr int64_t kFeaturesPerTask = 16 * kBlock; // for which a block's g is transposed once

// to[o][r] = from[r][o], for `count` outputs, and zeros up to `padded_rows`.
void transpose_block(
    const uint16_t* from, int64_t row_stride, int64_t rows, int64_t padded_rows, int64_t count, uint16_t* to) {
  constexpr int64_t kTile = 8;
  for (int64_t row = 0; row < padded_rows; row += kTile) {
    for (int64_t o = 0; o < count; o += kTile) {
      uint16_t tile[kTile][kTile] = {};
      const int64_t width = std::min(kTile, count - o);
      for (int64_t i = 0; i < std::min(kTile, rows - row); ++i) {
        const uint16_t* line = from + (row + i) * row_stride + o;
        if (width == kTile) {
          std::copy(line, line + kTile, tile[i]);
        } else {
          std::copy(line, line + width, tile[i]);
        }
      }
      for (int64_t j = 0; j < width; ++j) {
        uint16_t* line = to + (o + j) * padded_rows + row;
        for (int64_t i = 0; i < kTile; ++i) {
          line[i] = tile[i][j];
        }
      }
    }
  }
}

// to[r / 2][d][r % 2] = from[r][d], with zeros up to kBlock features and to `padded_rows`.
void pack_block(
    const uint16_t* from, int64_t row_stride, int64_t rows, int64_t padded_rows, int64_t count, uint16_t* to) {
  for (int64_t row = 0; row < padded_rows; row += 2) {
    uint16_t pair[2][kBlock] = {};
    for (int64_t i = 0; i < std::min<int64_t>(2, rows - row); ++i) {
      std::copy(from + (row + i) * row_stride, from + (row + i) * row_stride + count, pair[i]);
    }
    for (int64_t d = 0; d < kBlock; ++d) {
      to[row * kBlock + 2 * d] = pair[0][d];
      to[row * kBlock + 2 * d + 1] = pair[1][d];
    }
  }
}

template <typename T>
void add_block_products(const at::Tensor& sum, const at::Tensor& g, const at::Tensor& x) {
  const int64_t rows = g.size(0), outputs = g.size(1), features = x.size(1);
  const auto* g_data = static_cast<const uint16_t*>(g.const_data_ptr());
  const auto* x_data = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* sum_data = sum.mutable_data_ptr<float>();
  const int64_t row_stride = x.stride(0);
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t feature_blocks = (features + kBlock - 1) / kBlock;
  const int64_t padded_rows = round_up(std::min(rows, kBlockRows), kRowsMultiple);
  const int64_t packed_size = padded_rows * kBlock;
  const auto rows_of = [&](int64_t block) { return std::min(kBlockRows, rows - block * kBlockRows); };

  const std::unique_ptr<uint16_t[]> packed(new uint16_t[row_blocks * feature_blocks * packed_size]);
  at::parallel_for(0, row_blocks * feature_blocks, /*grain_size=*/4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block / feature_blocks, feature = block % feature_blocks * kBlock;
      pack_block(
          x_data + row * kBlockRows * row_stride + feature,
          row_stride,
          rows_of(row),
          round_up(rows_of(row), kRowsMultiple),
          std::min(kBlock, features - feature),
          packed.get() + block * packed_size);
    }
  });

  const int64_t output_blocks = (outputs + kBlock - 1) / kBlock;
  const int64_t feature_groups = (features + kFeaturesPerTask - 1) / kFeaturesPerTask;
  at::parallel_for(0, output_blocks * feature_groups, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint16_t[]> transposed(new uint16_t[packed_size]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t output = task / feature_groups * kBlock;
      const int64_t first_feature = task % feature_groups * kFeaturesPerTask;
      const int64_t end_feature = std::min(features, first_feature + kFeaturesPerTask);
      const int64_t output_count = std::min(kBlock, outputs - output);
      for (int64_t row = 0; row < row_blocks; ++row) {
        const int64_t depth = round_up(rows_of(row), kRowsMultiple);
        transpose_block(
            g_data + row * kBlockRows * outputs + output, outputs, rows_of(row), depth, output_count, transposed.get());
        for (int64_t feature = first_feature; feature < end_feature; feature += kBlock) {
          at::native::cpublas::brgemm(
              output_count,
              std::min(kBlock, features - feature),
              depth,
              /*ld_a=*/depth,
              /*ld_b=*/kBlock,
              /*ld_c=*/features,
              /*add_C=*/true,
              reinterpret_cast<const T*>(transposed.get()),
              reinterpret_cast<const T*>(packed.get() + (row * feature_blocks + feature / kBlock) * packed_size),
              sum_data + output * features + feature);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

// Of copies in float32, which are pieces that stay in cache: not twice the memory of the prediction.
void add_product_of_copies(const at::Tensor& sum, const at::Tensor& g, const at::Tensor& x) {
  constexpr int64_t kRows = 1024, kElements = int64_t{1} << 21;
  for (int64_t row = 0; row < g.size(0); row += kRows) {
    const int64_t rows = std::min(kRows, g.size(0) - row);
    const auto x_rows = x.narrow(0, row, rows).to(at::kFloat);
    for (int64_t output = 0; output < g.size(1); output += kElements / kRows) {
      const int64_t outputs = std::min(kElements / kRows, g.size(1) - output);
      auto out = sum.narrow(0, output, outputs);
      at::addmm_out(out, out, g.narrow(0, row, rows).narrow(1, output, outputs).to(at::kFloat).t(), x_rows);
    }
  }
}

} // namespace

void add_wide_product(const at::Tensor& sum, const at::Tensor& g, const at::Tensor& x) {
  if (!at::native::cpublas::could_pack(g.scalar_type())) {
    add_product_of_copies(sum, g, x);
  } else if (x.stride(1) != 1) {
    add_wide_product(sum, g, x.contiguous());
  } else {
    AT_DISPATCH_REDUCED_FLOATING_TYPES(
        g.scalar_type(), "linear_mse_loss", [&] { add_block_products<scalar_t>(sum, g, x); });
  }
}

} // namespace torchintro::cpu
