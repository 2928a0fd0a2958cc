// The CPU kernels: raw pointers, sizes and strides (in elements); no torch, no threads, no allocation visible outside.
//
// Each kernel handles one block of rows and is called from any thread; blocks are fixed by the sizes alone, and their sums
// are added in block order, so results do not depend on the number of threads.
#pragma once

#include "cpu/kernels/level.h"

#include <cstdint>

namespace torchintro::cpu {

constexpr int64_t kScratchAlignment = 64;

enum class DType { Float64, Float32, BFloat16, Float16 };

template <typename T>
struct Strided {
  T* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// The few-outputs kernel: loss and gradients from one pass over a block of rows of the input.
//
//   p[n][o]  = sum_d x[n][d] w[o][d] + b[o]
//   r        = p - t;   g = residual_scale * v * r
//   loss    += v r^2;   db[o] += g[n][o];   dw[o][d] += g[n][o] x[n][d];   dx[n][d] = input_scale * sum_o g[n][o] w[o][d]
//
// Accumulators: dot products and runs of rows of dw in float32 (float64 for float64), everything longer, and the loss, in
// float64. A panel of rows is read from memory once: the second use, for dw and dx, finds it in cache.
struct FewOutputs {
  Strided<const void> input; // (N, D), input dtype
  const void* linear_weight; // (O, D) contiguous, float32 (float64 for float64)
  const void* linear_bias; // (O) contiguous, same; null without
  Strided<const void> target; // (N, O / models), target dtype
  Strided<const void> weight; // (N, O / models), target dtype; null without
  int64_t rows; // N: what lies behind a block may be asked for ahead
  int64_t rows_between; // from a block's end to what its thread goes on with, which is asked for ahead
  int64_t in_features;
  int64_t out_features; // of all models together
  int64_t models; // that share the input and the target: target and weight have the columns of one
  double residual_scale;
  double target_scale; // dt = target_scale * g
  double input_scale;
  void* grad_input; // (N, D) contiguous, input dtype; null if not asked for
  void* grad_target; // (N, O) contiguous, target dtype; null if not asked for, and with several models
  bool wants_weight_gradient;
  bool past_caches; // grad_input is larger than the caches: nobody finds it there afterwards
};

// A block's sums: the loss of each of M models, O values of the bias gradient, then O x D of the weight gradient (if wanted).
// All overwritten. `scratch` holds few_outputs_scratch_bytes, aligned to kScratchAlignment.
using FewOutputsKernel =
    void (*)(const FewOutputs&, int64_t row_begin, int64_t row_end, double* partial, void* scratch);

constexpr int64_t kMaximumFewOutputs = 64;
constexpr int64_t kMaximumLanes = 16;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Up to so many features a panel is laid out by columns (narrow_impl.h), beyond by rows (wide_impl.h). 1M x 16 -> 1, where
// both would do: 1.8 ms by columns, 2.5 ms by rows (two cores of an Intel Xeon with AMX).
constexpr int64_t kNarrowFeatures = 16;

// Rows of a panel, a multiple of every register tile. By columns: enough that the accumulators of dw are loaded and stored
// once for eight vectors. By rows: a part of the second-level cache, where the next panel has room too while this one is used
// again, and enough that dw's accumulators do not pass through the registers too often. 65536 x 1024 -> 4, two cores of an
// Intel Xeon with AMX: 10.4 ms with 16 rows, 10.0 ms with 32;  20000 x 4096 -> 8: 16.3 ms with 16, 18.8 ms with 32.
constexpr int64_t kNarrowPanelRows = 128, kWidePanelRows = 64; // at most
inline int64_t panel_rows(const FewOutputs& a) {
  if (a.in_features <= kNarrowFeatures) {
    return kNarrowPanelRows;
  }
  constexpr int64_t bytes = int64_t{128} << 10, least = 16;
  const int64_t rows = bytes / (4 * a.in_features) / least * least;
  return rows < least ? least : rows > kWidePanelRows ? kWidePanelRows : rows;
}

// Enough for every dtype and level: see Scratch in few_outputs_impl.h for the parts.
inline int64_t few_outputs_scratch_bytes(const FewOutputs& a) {
  const bool narrow = a.in_features <= kNarrowFeatures;
  const int64_t panel = narrow ? kNarrowPanelRows : kWidePanelRows;
  const int64_t d = round_up(a.in_features, kMaximumLanes) + kMaximumLanes;
  const int64_t dw = !a.wants_weight_gradient ? 0 : a.out_features * (narrow ? a.in_features * kMaximumLanes : d);
  return 8 * (dw + 3 * a.out_features * panel + (narrow ? 2 * a.in_features * panel : (panel_rows(a) + 1) * d));
}

// The residual kernel of the many-outputs regime: over a block of rows of a tile of R rows and Q outputs, the product p in
// place to g = residual_scale * v * (p + b - t), dt = target_scale * g, and the block's sums.
struct Residual {
  void* product; // (R, Q) contiguous, input dtype
  const void* linear_bias; // (Q) contiguous, float32 (float64 for float64); null without, or where the product has it
  Strided<const void> target; // (R, Q), target dtype
  Strided<const void> weight; // (R, Q), target dtype; null without
  int64_t outputs; // Q
  double residual_scale;
  double target_scale;
  void* grad_target; // (R, Q), target dtype, columns side by side; null if not asked for
  int64_t grad_target_row_stride;
  bool wants_residual;
  bool wants_bias_gradient;
};

// partial[0] the loss, partial[1 .. Q] the bias gradient (if wanted). All overwritten. `scratch` holds
// residual_scratch_bytes, aligned to kScratchAlignment.
using ResidualKernel = void (*)(const Residual&, int64_t row_begin, int64_t row_end, double* partial, void* scratch);

inline int64_t residual_scratch_bytes(const Residual& a) {
  return a.wants_bias_gradient ? (a.outputs + 16) * 8 : 0;
}

// Elements [begin, end) of a gradient of the dtype that stands for input's in find_kernels: scale times the sum, in block
// order, of sums[block * stride + i].
using AddUpKernel = void (*)(
    const double* sums, int64_t blocks, int64_t stride, int64_t begin, int64_t end, double scale, void* gradient);

// The moments kernel: second moments of a block of rows about a shift s near the mean, all in float64. With the rows' weights v
// (1 without), dx = x - s_x and dy = y - s_y:
//
//   count = sum v;  sum_y = sum v dy;  syy = sum v dy^2;  sum_x = sum v dx;  sxy = sum v dy dx';  sxx = sum v dx dx'
struct RowMoments {
  Strided<const void> input; // (N, D)
  Strided<const void> target; // (N, O), target_type
  DType target_type; // any, whatever the kernel's own, which is the input's
  const double* weight; // (N); null without
  const double* shift; // s_x with zeros up to a multiple of 16, then s_y
  int64_t rows; // N: what lies behind a block may be asked for ahead
  int64_t in_features;
  int64_t out_features;
};

// A block's sums, all overwritten: count; sum_y (O); syy (O); then a matrix of rows moments_stride apart: sum_x, O rows sxy,
// a row or none for padding, and sxx from row moments_extra on, of which only the upper triangle means something.
inline int64_t moments_stride(const RowMoments& a) {
  return round_up(a.in_features, 8);
}
inline int64_t moments_extra(const RowMoments& a) {
  return round_up(1 + a.out_features, 2);
}
inline int64_t moments_matrix(const RowMoments& a) {
  return 1 + 2 * a.out_features;
}
inline int64_t moments_sums(const RowMoments& a) {
  return moments_matrix(a) + (moments_extra(a) + moments_stride(a)) * moments_stride(a);
}
// `scratch` holds moments_scratch_bytes, aligned to kScratchAlignment.
using MomentsKernel = void (*)(const RowMoments&, int64_t row_begin, int64_t row_end, double* partial, void* scratch);

// Beyond so many features or outputs matrix products are used. Processor time of one core of an Intel Xeon with AMX: 20000 x 512
// -> 1 97 ms, and 122 ms by products of float64 chunks; 200000 x 64 -> 64 55 ms, -> 65 by products 118 ms.
constexpr int64_t kMostMomentsFeatures = 512;
constexpr int64_t kMostMomentsOutputs = 64;

// Rows of a panel. By columns as in kNarrowPanelRows. By rows: the panel in float64 is 36 KB for 64 features, inside the
// first-level cache, and the sums are loaded and stored once for so many rows.
constexpr int64_t kMomentsNarrowRows = 128, kMomentsWideRows = 64;

// Enough for every dtype and level: see MomentsScratch in moments_impl.h for the parts.
inline int64_t moments_scratch_bytes(const RowMoments& a) {
  const int64_t extra = moments_extra(a), d = round_up(a.in_features, kMaximumLanes) + kMaximumLanes;
  if (a.in_features <= kNarrowFeatures) {
    const int64_t left = round_up(extra + a.in_features, 4), right = a.in_features + 1;
    const int64_t staged = a.in_features > a.out_features ? a.in_features : a.out_features;
    return 8 * ((left + right + staged) * kMomentsNarrowRows + left * right * (kMaximumLanes / 2));
  }
  const int64_t staged = d > a.out_features ? d : a.out_features, panels = a.weight ? 2 : 1;
  return 8 * ((extra + staged) * kMomentsWideRows + panels * (kMomentsWideRows + 1) * d);
}

// Columns [column_begin, column_end) of to = from * matrix, in float64, for a few rows; where the columns are cut does not
// change a bit of them.
struct RowProducts {
  const double* from; // (rows, inner) contiguous
  const double* matrix; // (inner, columns) contiguous
  double* to; // (rows, columns) contiguous
  int64_t rows, inner, columns;
};
using RowProductsKernel = void (*)(const RowProducts&, int64_t column_begin, int64_t column_end);

struct Kernels {
  FewOutputsKernel few_outputs;
  ResidualKernel residual;
  AddUpKernel add_up;
  MomentsKernel moments;
  RowProductsKernel row_products; // the same for all dtypes
};

// For an input and a target dtype. The pairs are (T, T), and 16-bit inputs with a float32 target.
Kernels find_kernels(DType input, DType target, Level level = active_level());

} // namespace torchintro::cpu
