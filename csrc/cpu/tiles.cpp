#include "cpu/tiles.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchintro::cpu {
namespace {

int64_t knob(const char* n, int64_t d) { const char* v = std::getenv(n); return v ? std::atoll(v) : d; }

int64_t divide(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// The length of the fewest equal parts of `whole` that are no longer than `most`, a multiple of `multiple` if there is more
// than one.
int64_t equal_parts(int64_t whole, int64_t most, int64_t multiple) {
  if (whole <= most) {
    return whole;
  }
  const int64_t length = divide(whole, divide(whole, most));
  return divide(length, multiple) * multiple;
}

} // namespace

Tiles make_tiles(const Problem& p) {
  const int64_t n = p.rows, o = p.out_features, d = p.in_features;
  const int64_t size = static_cast<int64_t>(p.input.element_size());
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t kTogetherBytes = knob("HM_TILE", 16 << 20), kLaneBytes = knob("HM_LANE", 1 << 20), kLaneLeastRows = knob("HM_LROWS", 256);

  Tiles tiles{};
  const int64_t lane_rows = std::max(kLaneLeastRows, kLaneBytes / (size * o));
  if (threads > 1 && knob("HM_LANES", 1) && n >= 2 * threads * std::min(lane_rows, int64_t(1024)) && d * threads * knob("HM_LMEM", 4) <= n && n * o > knob("HM_LMIN", 1 << 18)) {
    tiles.lanes = threads;
    tiles.rows_per_lane = divide(divide(n, threads), 64) * 64;
    tiles.lanes = divide(n, tiles.rows_per_lane);
    tiles.rows = equal_parts(tiles.rows_per_lane, lane_rows, 64);
    tiles.outputs = o;
  } else {
    const int64_t elements = kTogetherBytes / size;
    const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(elements)));
    tiles.lanes = 1;
    tiles.rows_per_lane = n;
    if (size == 2) {
      tiles.rows = equal_parts(n, std::max<int64_t>(1024, elements / o), 64);
      tiles.outputs = o;
    } else {
      tiles.rows = equal_parts(n, std::max(side, elements / o), 64);
      tiles.outputs = equal_parts(o, std::max(side, elements / std::min(n, tiles.rows)), 64);
    }
  }
  tiles.wide_weight_gradient = size == 2 && tiles.rows < n;
  return tiles;
}

void use_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  static const int64_t least = knob("HM_HUGE", 4 << 20);
  if (static_cast<int64_t>(tensor.nbytes()) >= least) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const auto begin = (address + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (address + tensor.nbytes()) / kHugePage * kHugePage;
    if (begin < end) {
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
  }
#endif
}

} // namespace torchintro::cpu
