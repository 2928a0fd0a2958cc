// Which of PyTorch's two libraries makes the float32 matrix products of the many-outputs regime.
#pragma once

namespace torchintro::cpu {

enum class MatrixRoute { Blas, OneDnn };

// The one that TORCHINTRO_MATRIX_ROUTE (blas, onednn) names, or the one that is faster on this processor. Read once, so
// that a process computes the same bits from beginning to end.
//
// PyTorch's BLAS is MKL, whose float32 product runs at half of oneDNN's rate on AMD (4096 x 1024 x 1024, two cores:
// Zen 4 110 against 219 GFLOP/s, Zen 5 200 against 400); on Intel they are even (Sapphire Rapids 355 against 330).
MatrixRoute active_matrix_route();

const char* matrix_route_name(MatrixRoute route);

} // namespace torchintro::cpu
