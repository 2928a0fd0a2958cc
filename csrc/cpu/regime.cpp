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

// Weights up to which our own pass pays whatever the rows: 16 x 1024 -> 8: 1.9 against 1.8, -> 16: 1.5 against 1.6.
constexpr int64_t kFewWeights = 8192;

// With more weights the block's own sums of the gradient must be worth their rows.
struct Border {
  int64_t rows; // at least
  int64_t outputs; // at most
  int64_t weights; // at most
};
constexpr Border kBorders[] = {
    // 65536 x 1024 -> 64: 1.24 against 1.06;  x 4096 -> 32: 1.29 against 1.01, -> 48: 1.00 against 0.99
    {16384, 64, 131072},
    // 4096 x 1024 -> 32: 1.14 against 1.08, -> 48: 1.02 against 1.04;  x 4096 -> 24: 1.17 against 1.01
    {4096, 32, 131072},
    // 1024 x 1024 -> 24: 1.27 against 1.17, -> 32: 1.07 against 1.25;  x 4096 -> 16: 1.14 against 1.04, -> 24: 0.98
    {1024, 24, 65536},
    // 256 x 1024 -> 16: 1.52 against 1.37, -> 32: 1.12 against 1.34;  x 4096 -> 16: 1.30 against 1.18
    {256, 16, 65536},
};
static_assert(kBorders[0].outputs <= kMaximumFewOutputs);

// Instructions for 16-bit products do several times the operations of those in float32, which our kernel converts to.
// bfloat16, 4096 x 256 -> 8: 2.3 against 1.3, -> 16: 1.4 against 1.5;  65536 x 256 -> 8: 1.2 against 1.0, -> 16: 0.9
// against 1.3;  x 64 -> 32: 1.5 against 1.4.
constexpr int64_t kFewWeightsOf16BitProducts = 2048;
bool has_16_bit_products(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && at::native::cpublas::could_pack(dtype);
}

} // namespace

Regime choose_regime(const Problem& p) {
  if (p.out_features > kMaximumFewOutputs) {
    return Regime::ManyOutputs;
  }
  const int64_t weights = p.in_features * p.out_features;
  const bool products_16 = has_16_bit_products(p.input.scalar_type());
  const int64_t few_weights = products_16 ? kFewWeightsOf16BitProducts : kFewWeights;
  // Narrow: 4096 x 16 -> 64: 3.2 against 2.0, in bfloat16 3.8 against 2.1.
  if (p.out_features <= kAlwaysFewOutputs || p.in_features <= kNarrowFeatures || weights <= few_weights) {
    return Regime::FewOutputs;
  }
  if (!products_16) {
    for (const auto& border : kBorders) {
      if (p.rows >= border.rows && p.out_features <= border.outputs && weights <= border.weights) {
        return Regime::FewOutputs;
      }
    }
  }
  return Regime::ManyOutputs;
}

} // namespace torchintro::cpu
