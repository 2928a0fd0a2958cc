// Wide inputs: panels by rows, a vector holds neighbouring features of one row. Included after panel_impl.h.
//
//   x[r * stride + d]  the panel's rows, in as many rows as fill a tile;  p[o][r] their predictions or g, columns
//   kWidePanelRows apart, which the compiler then counts in addresses
//
// The last vector of a row reaches back over the one before it, so that nothing is read behind a row and no row is copied;
// the lanes that were counted already are masked out. Features >= lanes.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

// Accumulators of a register tile: half of the registers.
constexpr int64_t kTile = TORCHINTRO_VECTOR_BYTES >= 64 ? 16 : 8;
// Rows of a tile of Q outputs.
template <int64_t Q>
constexpr int64_t kTileRows = Q == 1 ? kTile
    : Q == 2                         ? kTile / 2
                                     : kTile / 4;

// Lines of each page to ask for at a step of a tile of Q outputs: one output does little with what it reads.
template <int64_t Q>
constexpr int64_t kLinesAhead = Q == 1 ? 2 : 1;

// Row r of a tile, from every fourth row's address: the others are reached by the processor's own scaled index.
template <typename T>
TORCHINTRO_INLINE const T* at(const T* x, int64_t stride, int64_t r) {
  return x + (r / 4) * (4 * stride) + (r % 4) * stride;
}

template <typename A>
struct Columns { // how a row is cut into vectors
  int64_t features;
  int64_t begin, whole; // whole vectors from `begin` to `whole`
  bool tail; // and then the last, reaching back: its new lanes are those of the mask
  typename VectorOf<A>::integer mask;

  TORCHINTRO_INLINE Columns of(int64_t features) {
    constexpr int64_t L = kLanes<A>;
    const int64_t whole = features / L * L;
    return {features, 0, whole, whole < features, lanes_from<A>(L - (features - whole))};
  }

  TORCHINTRO_INLINE Columns part(const Columns& all, int64_t begin, int64_t size) {
    Columns part = all;
    part.begin = begin;
    if (begin + size < all.whole) {
      part.whole = begin + size;
      part.tail = false;
    }
    return part;
  }
};

// Columns of a row that are worked on for all rows of a panel before the next ones, where there are more outputs than a tile
// has: the weights of the tile then stay in the first-level cache. With fewer columns the sums over the lanes, one for each
// product of a row and an output, would cost more than that saves: 1024 features in cache, 16 outputs, one core of an Intel
// Xeon with AMX: 166 GFLOP/s with all columns, 157 with 512, 145 with 256.
template <typename A>
constexpr int64_t kDotColumns = 4096 / sizeof(A);

// p[q][r] (+)= sum_d x[r][d] w[q][d], for a tile of R rows and Q outputs; added where the columns are not a row's first
template <typename T, int64_t R, int64_t Q>
TORCHINTRO_INLINE void dot_tile(
    const T* x,
    int64_t stride,
    const Accumulator<T>* w,
    const Columns<Accumulator<T>>& columns,
    Ahead& ahead,
    Accumulator<T>* p) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, S = (R * Q + L - 1) / L * L;
  Vector<A> sum[S] = {};
  const char* next = ahead.next;
  for (int64_t d = columns.begin; d < columns.whole; d += L) {
    next = Ahead::step<kLinesAhead<Q>>(ahead, next, d / L);
    Vector<A> weight[Q];
    for (int64_t q = 0; q < Q; ++q) {
      weight[q] = Memory<A>::load(w + q * columns.features + d);
    }
    for (int64_t r = 0; r < R; ++r) {
      const Vector<A> value = Memory<T>::load(at(x, stride, r) + d);
      for (int64_t q = 0; q < Q; ++q) {
        sum[q * R + r] += value * weight[q];
      }
    }
  }
  ahead.next = next;
  if (columns.tail) {
    const int64_t last = columns.features - L;
    for (int64_t r = 0; r < R; ++r) {
      const Vector<A> value = keep<A>(Memory<T>::load(at(x, stride, r) + last), columns.mask);
      for (int64_t q = 0; q < Q; ++q) {
        sum[q * R + r] += value * keep<A>(Memory<A>::load(w + q * columns.features + last), columns.mask);
      }
    }
  }
  A sums[S];
  for (int64_t i = 0; i < S; i += L) {
    Memory<A>::store(sums + i, sum_each<A>(sum + i));
  }
  const bool first = columns.begin == 0;
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t r = 0; r < R; ++r) {
      A* to = p + q * kWidePanelRows + r;
      *to = first ? sums[q * R + r] : *to + sums[q * R + r];
    }
  }
}

template <typename T, int64_t Q>
TORCHINTRO_INLINE void dot_rows(
    const T* x,
    int64_t stride,
    int64_t rows,
    const Accumulator<T>* w,
    const Columns<Accumulator<T>>& columns,
    Ahead& ahead,
    Accumulator<T>* p) {
  for (int64_t r = 0; r < rows; r += kTileRows<Q>) {
    dot_tile<T, kTileRows<Q>, Q>(x + r * stride, stride, w, columns, ahead, p + r);
  }
}

// p[o][r] for all outputs and at least `rows` rows, which are rounded up to a tile
template <typename T>
TORCHINTRO_FUNCTION void wide_predict(
    const T* x,
    int64_t stride,
    int64_t rows,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    Ahead& ahead,
    Accumulator<T>* p) {
  using A = Accumulator<T>;
  const auto all = Columns<A>::of(features);
  // With one tile of outputs nothing is used again, and whole rows are what the memory likes best: 65536 x 1024 -> 1 takes
  // 1.2 times as long by blocks.
  const int64_t size = outputs > 4 ? kDotColumns<A> : features;
  for (int64_t begin = 0; begin == 0 || begin < all.whole; begin += size) {
    const auto columns = Columns<A>::part(all, begin, size);
    int64_t o = 0;
    for (; o + 4 <= outputs; o += 4) {
      dot_rows<T, 4>(x, stride, rows, w + o * features, columns, ahead, p + o * kWidePanelRows);
    }
    if (outputs - o == 3) {
      dot_rows<T, 3>(x, stride, rows, w + o * features, columns, ahead, p + o * kWidePanelRows);
    } else if (outputs - o == 2) {
      dot_rows<T, 2>(x, stride, rows, w + o * features, columns, ahead, p + o * kWidePanelRows);
    } else if (outputs - o == 1) {
      dot_rows<T, 1>(x, stride, rows, w + o * features, columns, ahead, p + o * kWidePanelRows);
    }
  }
}

template <typename T>
struct WeightGradient { // dw[o][...] (+)= sum_r g[o][r] x[r][...]
  using A = Accumulator<T>;
  const T* x;
  int64_t stride, rows;
  Columns<A> columns;
  const A* g;
  bool fresh; // dw is overwritten, not added to
  A* dw; // rows are cut as the columns are: whole vectors, then the last one, whose masked lanes are of no use
  int64_t dw_stride;
};

// A tile of Q outputs from o and V vectors from feature d, and with `Tail` the one that reaches back.
template <typename T, int64_t Q, int64_t V, bool Tail>
TORCHINTRO_INLINE void gradient_tile(const WeightGradient<T>& a, int64_t o, int64_t d, Ahead& ahead) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, All = V + Tail;
  const T* x = a.x + d;
  const T* tail = a.x + a.columns.features - L;
  const A* g = a.g + o * kWidePanelRows;
  const int64_t stride = a.stride, rows = a.rows;
  const char* next = ahead.next;
  Vector<A> sum[Q][All]; // the panel's own sum first: a shorter chain of roundings
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t v = 0; v < All; ++v) {
      sum[q][v] = Vector<A>{};
    }
  }
  for (int64_t r = 0; r < rows; ++r, x += stride, tail += stride) {
    Vector<A> value[All];
    next = Ahead::step<kLinesAhead<Q>>(ahead, next, r);
    for (int64_t v = 0; v < V; ++v) {
      value[v] = Memory<T>::load(x + v * L);
    }
    if constexpr (Tail) {
      value[V] = keep<A>(Memory<T>::load(tail), a.columns.mask);
    }
    for (int64_t q = 0; q < Q; ++q) {
      const A residual = g[q * kWidePanelRows + r];
      for (int64_t v = 0; v < All; ++v) {
        sum[q][v] += value[v] * residual;
      }
    }
  }
  ahead.next = next;
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t v = 0; v < All; ++v) {
      A* to = a.dw + (o + q) * a.dw_stride + d + v * L;
      Memory<A>::store(to, a.fresh ? sum[q][v] : Memory<A>::load(to) + sum[q][v]);
    }
  }
}

// What is left of the features from d on: up to V vectors and the one that reaches back, in one tile, since few sums in turn
// would wait for each other.
template <typename T, int64_t Q, int64_t V>
TORCHINTRO_INLINE void gradient_rest(const WeightGradient<T>& a, int64_t o, int64_t d, Ahead& ahead) {
  if constexpr (V > 0) {
    if (a.columns.whole - d < V * kLanes<Accumulator<T>>) {
      gradient_rest<T, Q, V - 1>(a, o, d, ahead);
      return;
    }
  }
  if (a.columns.tail) {
    gradient_tile<T, Q, V, true>(a, o, d, ahead);
  } else if constexpr (V > 0) {
    gradient_tile<T, Q, V, false>(a, o, d, ahead);
  }
}

// All features for Q outputs from o. Returns the output after them.
template <typename T, int64_t Q, int64_t V>
TORCHINTRO_INLINE int64_t gradient_rows(const WeightGradient<T>& a, int64_t o, Ahead& ahead) {
  constexpr int64_t L = kLanes<Accumulator<T>>;
  int64_t d = 0;
  for (; d + V * L <= a.columns.whole; d += V * L) {
    gradient_tile<T, Q, V, false>(a, o, d, ahead);
  }
  gradient_rest<T, Q, V - 1>(a, o, d, ahead);
  return o + Q;
}

template <typename T>
TORCHINTRO_FUNCTION void wide_weight_gradient(const WeightGradient<T>& a, int64_t outputs, Ahead& ahead) {
  int64_t o = 0;
  if constexpr (kTile == 16) {
    // Eight outputs read the rows half as often as four, from the second-level cache: 1024 features there, 16 outputs, one
    // core of an Intel Xeon with AMX: 183 GFLOP/s instead of 156.
    while (o + 8 <= outputs) {
      o = gradient_rows<T, 8, 3>(a, o, ahead);
    }
    if (o + 4 <= outputs) {
      o = gradient_rows<T, 4, 4>(a, o, ahead);
    }
    if (o + 3 == outputs) {
      o = gradient_rows<T, 3, 4>(a, o, ahead);
    }
  }
  while (o + 2 <= outputs) {
    o = gradient_rows<T, 2, 4>(a, o, ahead);
  }
  if (o < outputs) { // more vectors in flight where there is but one product for each
    gradient_rows<T, 1, 8>(a, o, ahead);
  }
}

// to[r][v] = scale * sum_o g[o][r] w[o][v], for a tile of R rows and V vectors
template <typename T, int64_t R, int64_t V, bool PastCaches>
TORCHINTRO_INLINE void input_gradient_tile(
    const Accumulator<T>* g,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    Accumulator<T> scale,
    Ahead& ahead,
    int64_t number,
    T* to) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  ahead.next = Ahead::step<1>(ahead, ahead.next, number);
  Vector<A> sum[R][V] = {};
  for (int64_t o = 0; o < outputs; ++o) {
    Vector<A> weight[V];
    for (int64_t v = 0; v < V; ++v) {
      weight[v] = Memory<A>::load(w + o * features + v * L);
    }
    for (int64_t r = 0; r < R; ++r) {
      const A residual = g[o * kWidePanelRows + r];
      for (int64_t v = 0; v < V; ++v) {
        sum[r][v] += weight[v] * residual;
      }
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < V; ++v) {
      if constexpr (PastCaches) {
        store_past_caches<T>(to + r * features + v * L, scale * sum[r][v]);
      } else {
        Memory<T>::store(to + r * features + v * L, scale * sum[r][v]);
      }
    }
  }
}

template <typename T, int64_t R, bool PastCaches>
TORCHINTRO_INLINE void input_gradient_rows(
    const Accumulator<T>* g,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    Accumulator<T> scale,
    Ahead& ahead,
    T* to) {
  constexpr int64_t L = kLanes<Accumulator<T>>, V = 4;
  int64_t d = 0;
  for (; d + V * L <= features; d += V * L) {
    input_gradient_tile<T, R, V, PastCaches>(g, w + d, features, outputs, scale, ahead, d / (V * L), to + d);
  }
  for (; d + L <= features; d += L) {
    input_gradient_tile<T, R, 1, PastCaches>(g, w + d, features, outputs, scale, ahead, d / L, to + d);
  }
  if (d < features) { // the same values once more where it reaches back
    input_gradient_tile<T, R, 1, false>(g, w + features - L, features, outputs, scale, ahead, d / L, to + features - L);
  }
}

// `rows` rows of dx, contiguous; past the caches where `past_caches` says that nobody reads them soon
template <typename T>
TORCHINTRO_FUNCTION void wide_input_gradient(
    const Accumulator<T>* g,
    int64_t rows,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    Accumulator<T> scale,
    bool past_caches,
    Ahead& ahead,
    T* to) {
  constexpr int64_t R = kTile / 4;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % kStoredBytes<T> == 0 && features % kLanes<Accumulator<T>> == 0;
  int64_t r = 0;
  if (past_caches && aligned && outputs == 1) { // whole rows one after the other: what the memory likes best
    for (; r < rows; ++r) {
      input_gradient_rows<T, 1, true>(g + r, w, features, outputs, scale, ahead, to + r * features);
    }
  } else if (past_caches && aligned) {
    for (; r + R <= rows; r += R) {
      input_gradient_rows<T, R, true>(g + r, w, features, outputs, scale, ahead, to + r * features);
    }
  } else {
    for (; r + R <= rows; r += R) {
      input_gradient_rows<T, R, false>(g + r, w, features, outputs, scale, ahead, to + r * features);
    }
  }
  for (; r < rows; ++r) {
    input_gradient_rows<T, 1, false>(g + r, w, features, outputs, scale, ahead, to + r * features);
  }
}

// sums[o][d] (+)= dw[o][...]; overwritten if `fresh`
template <typename A>
TORCHINTRO_FUNCTION void wide_flush(
    const A* dw, int64_t dw_stride, int64_t features, int64_t outputs, bool fresh, double* sums) {
  constexpr int64_t L = kLanes<A>;
  const int64_t whole = features / L * L;
  for (int64_t o = 0; o < outputs; ++o) {
    const A* from = dw + o * dw_stride;
    double* to = sums + o * features;
    for (int64_t d = 0; d < whole; ++d) {
      to[d] = from[d] + (fresh ? 0.0 : to[d]);
    }
    for (int64_t i = whole; i < features; ++i) { // the lanes of the last vector that are not masked
      to[i] = from[whole + L - features + i] + (fresh ? 0.0 : to[i]);
    }
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
