#include "cpu/tiles.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace torchintro::cpu {
namespace {

// All measurements: steps with the input's gradient in float32, 2 cores of an Intel Xeon with AMX (2 MB of second-level
// cache each), other work on the machine: differences below a tenth say nothing.

// A tile that all threads work on: still in the outer cache when the products for the gradients read it. 4, 16 and 32 MB are
// even for 4096 x 1024 -> 1024, 16384 x 256 -> 1024 and 2048 x 512 -> 32768, 1 MB takes 1.05 to 1.1 times as long. It is
// also the memory that a step needs beside its gradients.
constexpr int64_t kTileBytes = int64_t{8} << 20;

// In 16 bits only rows are cut, since the input's gradient would be rounded with every block of outputs. Below so many rows
// the sums of the weight gradient, 8 bytes each, are what is moved.
constexpr int64_t kLeastRows16 = 1024;

// A tile that one thread works on alone: inside its second-level cache. 0.25 to 2 MB are even for 1M x 8 -> 32, 200000 x 64
// -> 32 and -> 128, 4 MB takes up to 1.2 times as long for 100000 x 16 -> 512 and 65536 x 1024 -> 32. Below so many rows the
// thread's own weight gradient is what is moved.
constexpr int64_t kLaneTileBytes = int64_t{1} << 20;
constexpr int64_t kLeastLaneRows = 256;

// Threads with rows of their own neither wait for each other after each product nor share the small products of narrow
// inputs: 1M x 8 -> 32 takes 28 instead of 36 ms, 100000 x 16 -> 512 33 instead of 51, 65536 x 256 -> 64 as long. But each
// has a weight gradient of its own: all of them together no more than a quarter of the prediction. And not below so many
// elements of the prediction, nor so many tiles' worth of rows for each.
constexpr int64_t kLaneMemoryDivisor = 4;
constexpr int64_t kLeastLaneElements = int64_t{1} << 18;
constexpr int64_t kLeastTilesOfLane = 2;

// A wide input's product is long enough for all threads, and its rows do not fit a thread's cache beside the prediction:
// 65536 x 256 -> 32 in bfloat16 takes 1.1 times eager's time in lanes and 0.6 of it without, 65536 x 4096 -> 128 in float32
// 1.3 and 0.94.
constexpr int64_t kWidestLaneInput = 128;

constexpr int64_t kRowMultiple = 64; // whole vectors and register tiles in all but the last tile

int64_t divide(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// The length of the fewest equal parts of `whole` that are about as long as `most`.
int64_t equal_parts(int64_t whole, int64_t most) {
  if (whole <= most) {
    return whole;
  }
  return divide(divide(whole, divide(whole, most)), kRowMultiple) * kRowMultiple;
}

} // namespace

Tiles make_tiles(const Problem& p) {
  const int64_t rows = p.rows, outputs = p.out_features;
  const auto size = static_cast<int64_t>(p.input.element_size());
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t lane_rows = std::max(kLeastLaneRows, kLaneTileBytes / (size * outputs));
  const bool rows_for_lanes = rows >= threads * kLeastTilesOfLane * std::min(lane_rows, 4 * kLeastLaneRows);
  const bool memory_for_lanes = p.in_features * threads * kLaneMemoryDivisor <= rows;

  Tiles tiles{};
  if (threads > 1 && rows * outputs >= kLeastLaneElements && rows_for_lanes && memory_for_lanes &&
      p.in_features <= kWidestLaneInput) {
    tiles.rows_per_lane = divide(divide(rows, threads), kRowMultiple) * kRowMultiple;
    tiles.lanes = divide(rows, tiles.rows_per_lane);
    tiles.rows = equal_parts(tiles.rows_per_lane, lane_rows);
    tiles.outputs = outputs;
  } else {
    tiles.rows_per_lane = rows;
    tiles.lanes = 1;
    // A square moves the least: each row of tiles adds to the whole weight gradient, each column to the whole input's.
    const int64_t elements = kTileBytes / size;
    const auto side = static_cast<int64_t>(std::sqrt(static_cast<double>(elements)));
    if (size == 2) {
      tiles.rows = equal_parts(rows, std::max(kLeastRows16, elements / outputs));
      tiles.outputs = outputs;
    } else {
      tiles.rows = equal_parts(rows, std::max(side, elements / outputs));
      tiles.outputs = equal_parts(outputs, std::max(side, elements / tiles.rows));
    }
  }
  // In 16 bits each tile's share would be rounded; and float16's is float32 to the end.
  tiles.wide_weight_gradient = size == 2 && (tiles.rows < rows || p.input.scalar_type() == at::kHalf);
  return tiles;
}

} // namespace torchintro::cpu
