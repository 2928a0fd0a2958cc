#include "cpu/regime.h"

#include "cpu/kernels/kernels.h"

#include <ATen/native/CPUBlas.h>

namespace torchintro::cpu {
namespace {

// All measurements: speed-up over eager, few outputs' kernel against matrix products, steps in float32, two cores of an
// Intel Xeon with AVX-512 and AMX.

// Up to so many outputs our own pass pays whatever the rest: 1 x 4096 -> 4: 1.24, 64 x 4096 -> 1: 1.30. It is also what gives
// them the same bits for any number of threads.
constexpr int64_t kAlwaysFewOutputs = 4;

// Weights up to which our own pass pays whatever the rows: 16 x 1024 -> 8: 1.8 against 1.7, -> 16: 1.6 against 1.7.
constexpr int64_t kFewWeights = 8192;

// With more weights the block's own sums of the gradient must be worth their rows.
struct Border {
  int64_t rows; // at least
  int64_t outputs; // at most
  int64_t weights; // at most
};
constexpr Border kBorders[] = {
    {16384, 64, 131072}, // 65536 x 1024 -> 64: 1.20 against 1.08;  x 4096 -> 32: 1.28 against 1.04, -> 64: 0.97
    {1024,
     32,
     131072}, // 4096 x 1024 -> 32: 1.11 against 1.03, -> 48: 0.99 against 1.09;  1024 x 256 -> 32: 1.46 against 1.47
    {256, 16, 131072}, // 256 x 1024 -> 16: 1.49 against 1.41, -> 32: 1.18 against 1.34
};
static_assert(kBorders[0].outputs <= kMaximumFewOutputs);

// Instructions for 16-bit products do several times the operations of those in float32, which our kernel converts to.
// bfloat16, 256 x 1024 -> 8: 1.6 against 1.5, -> 16: 1.1 against 1.5;  4096 x 256 -> 32: 1.1 against 1.5.
bool has_16_bit_products(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && at::native::cpublas::could_pack(dtype);
}

} // namespace

Regime choose_regime(const Problem& p) {
  if (p.out_features > kMaximumFewOutputs) {
    return Regime::ManyOutputs;
  }
  const int64_t weights = p.in_features * p.out_features;
  // Narrow: 4096 x 16 -> 64: 3.2 against 2.0, in bfloat16 3.8 against 2.1.
  if (p.out_features <= kAlwaysFewOutputs || p.in_features <= kNarrowFeatures || weights <= kFewWeights) {
    return Regime::FewOutputs;
  }
  if (!has_16_bit_products(p.input.scalar_type())) {
    for (const auto& border : kBorders) {
      if (p.rows >= border.rows && p.out_features <= border.outputs && weights <= border.weights) {
        return Regime::FewOutputs;
      }
    }
  }
  return Regime::ManyOutputs;
}

} // namespace torchintro::cpu
