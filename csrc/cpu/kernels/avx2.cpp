// The kernels for the level 'avx2'.
#if defined(__x86_64__)
#include "cpu/kernels/kernels.h"

#define TORCHINTRO_LEVEL avx2
#define TORCHINTRO_VECTOR_BYTES 32
#define TORCHINTRO_TARGET __attribute__((target("avx2,fma,f16c")))

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
#endif
