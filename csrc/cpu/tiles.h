// How the many-outputs regime is cut: the one place that decides it, from the sizes, the caches and the threads.
#pragma once

#include "problem.h"

namespace torchintro::cpu {

struct Tiles {
  int64_t rows; // of a tile
  int64_t outputs; // of a tile
  int64_t lanes; // runs of rows that are worked on at the same time, each by one thread; 1: all threads at one tile
  int64_t rows_per_lane;
  bool wide_weight_gradient; // 16-bit products of several tiles are added in float32
};

Tiles make_tiles(const Problem& problem);

} // namespace torchintro::cpu
