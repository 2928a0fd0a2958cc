// The CPU kernels: raw pointers, sizes and strides (in elements); no torch, no threads, no allocation visible outside.
//
// Each kernel handles one block of rows and is called from any thread; blocks are fixed by the sizes alone, and their sums
// are added in block order, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace torchintro::cpu {

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
// Accumulators: dot products and runs of up to kRunRows rows of dw in float32 (float64 for float64), everything longer in
// float64. A group of rows is read from memory once: the second use, for dw and dx, finds it in cache.
struct FewOutputs {
  Strided<const void> input; // (N, D), input dtype
  const void* linear_weight; // (O, D) contiguous, float32 (float64 for float64)
  const void* linear_bias; // (O) contiguous, same; null without
  Strided<const void> target; // (N, O), target dtype
  Strided<const void> weight; // (N, O), target dtype; null without
  int64_t in_features;
  int64_t out_features;
  double residual_scale;
  double target_scale; // dt = target_scale * g
  double input_scale;
  void* grad_input; // (N, D) contiguous, input dtype; null if not asked for
  void* grad_target; // (N, O) contiguous, target dtype; null if not asked for
  bool wants_weight_gradient;
};

// A block's sums: partial[0] the loss, partial[1 .. O] the bias gradient, then O x D of the weight gradient (if wanted).
// All overwritten. `scratch` holds few_outputs_scratch_bytes, aligned as a double.
using FewOutputsKernel =
    void (*)(const FewOutputs&, int64_t row_begin, int64_t row_end, double* partial, void* scratch);

constexpr int64_t kMaximumFewOutputs = 64;

// The accumulators of dw, padded to the widest vector, and a group of rows made contiguous; enough for every dtype.
inline int64_t few_outputs_scratch_bytes(const FewOutputs& a) {
  return (a.wants_weight_gradient ? a.out_features * (a.in_features + 16) * 8 : 0) +
      (a.input.column_stride != 1 ? 8 * a.in_features * 8 : 0) + 8;
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
// residual_scratch_bytes, aligned as a double.
using ResidualKernel = void (*)(const Residual&, int64_t row_begin, int64_t row_end, double* partial, void* scratch);

inline int64_t residual_scratch_bytes(const Residual& a) {
  return a.wants_bias_gradient ? (a.outputs + 16) * 8 : 0;
}

struct Kernels {
  FewOutputsKernel few_outputs;
  ResidualKernel residual;
};

// For an input and a target dtype at the active level. The pairs are (T, T), and 16-bit inputs with a float32 target.
Kernels find_kernels(DType input, DType target);

} // namespace torchintro::cpu
