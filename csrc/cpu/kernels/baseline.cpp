// The kernels for the level 'baseline'.
#include "cpu/kernels/kernels.h"

#define TORCHINTRO_LEVEL baseline
#define TORCHINTRO_VECTOR_BYTES 16
#define TORCHINTRO_TARGET

// clang-format off: each needs the ones before
#include "cpu/kernels/simd.h"
#include "cpu/kernels/panel_impl.h"
#include "cpu/kernels/narrow_impl.h"
#include "cpu/kernels/wide_impl.h"
#include "cpu/kernels/few_outputs_impl.h"
#include "cpu/kernels/residual_impl.h"
#include "cpu/kernels/moments_impl.h"
#include "cpu/kernels/sums_impl.h"
#include "cpu/kernels/row_products_impl.h"
#include "cpu/kernels/level_table.h"
// clang-format on
