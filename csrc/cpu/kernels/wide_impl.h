// Wide inputs: panels by rows, a vector holds neighbouring features of one row. Included after panel_impl.h.
//
//   row[r]   the panel's rows, contiguous;  p[o][r] their predictions or g
//
// The last vector of a row reaches back over the one before it, so that nothing is read behind a row and no row is copied;
// the lanes that were counted already are masked out. Features >= lanes.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

// Accumulators of a register tile: half of the registers.
constexpr int64_t kTile = TORCHINTRO_VECTOR_BYTES >= 64 ? 16 : 8;
// Rows of a tile of Q outputs.
template <int64_t Q>
constexpr int64_t kTileRows = Q == 1 ? kTile : Q == 2 ? kTile / 2 : kTile / 4;

// Vectors whose elements, as stored, share a cache line of 64 bytes.
template <typename T>
constexpr int64_t kVectorsPerLine = 64 / kStoredBytes<T>;

template <typename A>
struct Columns { // how a row is cut into vectors
  int64_t features;
  int64_t whole; // features in whole vectors
  int64_t last; // where the last, reaching back, begins; only if whole < features
  typename VectorOf<A>::integer mask; // the lanes of it that are new

  TORCHINTRO_INLINE Columns of(int64_t features) {
    constexpr int64_t L = kLanes<A>;
    const int64_t whole = features / L * L;
    return {features, whole, features - L, lanes_from<A>(L - (features - whole))};
  }
};

// p[q][r] = sum_d row[r][d] w[q][d], for a tile of R rows and Q outputs
template <typename T, int64_t R, int64_t Q>
TORCHINTRO_INLINE void dot_tile(
    const T* const* row,
    const Accumulator<T>* w,
    const Columns<Accumulator<T>>& columns,
    int64_t p_stride,
    Accumulator<T>* p) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, S = (R * Q + L - 1) / L * L;
  Vector<A> sum[S] = {};
  for (int64_t d = 0; d < columns.whole; d += L) {
    Vector<A> weight[Q];
    for (int64_t q = 0; q < Q; ++q) {
      weight[q] = Memory<A>::load(w + q * columns.features + d);
    }
    for (int64_t r = 0; r < R; ++r) {
      const Vector<A> x = Memory<T>::load(row[r] + d);
      for (int64_t q = 0; q < Q; ++q) {
        sum[q * R + r] += x * weight[q];
      }
    }
  }
  if (columns.whole < columns.features) {
    for (int64_t r = 0; r < R; ++r) {
      const Vector<A> x = keep<A>(Memory<T>::load(row[r] + columns.last), columns.mask);
      for (int64_t q = 0; q < Q; ++q) {
        const Vector<A> weight = Memory<A>::load(w + q * columns.features + columns.last);
        sum[q * R + r] += x * keep<A>(weight, columns.mask);
      }
    }
  }
  A sums[S];
  for (int64_t i = 0; i < S; i += L) {
    Memory<A>::store(sums + i, sum_each<A>(sum + i));
  }
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t r = 0; r < R; ++r) {
      p[q * p_stride + r] = sums[q * R + r];
    }
  }
}

template <typename T, int64_t Q>
TORCHINTRO_INLINE void dot_rows(
    const T* const* row,
    int64_t rows,
    const Accumulator<T>* w,
    const Columns<Accumulator<T>>& columns,
    int64_t p_stride,
    Accumulator<T>* p) {
  for (int64_t r = 0; r < rows; r += kTileRows<Q>) {
    dot_tile<T, kTileRows<Q>, Q>(row + r, w, columns, p_stride, p + r);
  }
}

// p[o][r] for all outputs and at least `rows` rows, which are rounded up to a tile: row[] must reach that far
template <typename T>
TORCHINTRO_FUNCTION void wide_predict(
    const T* const* row,
    int64_t rows,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    int64_t p_stride,
    Accumulator<T>* p) {
  using A = Accumulator<T>;
  const auto columns = Columns<A>::of(features);
  int64_t o = 0;
  for (; o + 4 <= outputs; o += 4) {
    dot_rows<T, 4>(row, rows, w + o * features, columns, p_stride, p + o * p_stride);
  }
  w += o * features;
  p += o * p_stride;
  switch (outputs - o) {
    case 3:
      return dot_rows<T, 3>(row, rows, w, columns, p_stride, p);
    case 2:
      return dot_rows<T, 2>(row, rows, w, columns, p_stride, p);
    case 1:
      return dot_rows<T, 1>(row, rows, w, columns, p_stride, p);
    default:
      return;
  }
}

// The same by lanes of outputs, from the transposed weight wt[d][o] (rows of kWeightStride): no sum over lanes, but lanes
// that are empty where the outputs do not fill them. `buffer` holds kTile rows of K vectors.
template <typename A, int64_t K>
TORCHINTRO_INLINE void outer_tile(
    const A* const* row, const A* wt, int64_t wt_stride, int64_t features, int64_t outputs, int64_t p_stride, A* p) {
  constexpr int64_t L = kLanes<A>, R = kTile / K;
  static_assert(R * K == kTile);
  Vector<A> sum[R][K] = {};
  for (int64_t d = 0; d < features; ++d) {
    Vector<A> weight[K];
    for (int64_t k = 0; k < K; ++k) {
      weight[k] = Memory<A>::load(wt + d * wt_stride + k * L);
    }
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t k = 0; k < K; ++k) {
        sum[r][k] += weight[k] * row[r][d];
      }
    }
  }
  A lanes[R][K * L];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      Memory<A>::store(&lanes[r][k * L], sum[r][k]);
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t r = 0; r < R; ++r) {
      p[o * p_stride + r] = lanes[r][o];
    }
  }
}

template <typename A, int64_t K>
TORCHINTRO_INLINE void outer_rows(
    const A* const* row,
    int64_t rows,
    const A* wt,
    int64_t wt_stride,
    int64_t features,
    int64_t outputs,
    int64_t p_stride,
    A* p) {
  for (int64_t r = 0; r < rows; r += kTile / K) {
    outer_tile<A, K>(row + r, wt, wt_stride, features, outputs, p_stride, p + r);
  }
}

template <typename A>
TORCHINTRO_FUNCTION void wide_predict_outer(
    const A* const* row,
    int64_t rows,
    const A* wt,
    int64_t wt_stride,
    int64_t features,
    int64_t outputs,
    int64_t p_stride,
    A* p) {
  constexpr int64_t L = kLanes<A>;
  int64_t o = 0;
  for (; outputs - o > L; o += 2 * L) {
    outer_rows<A, 2>(
        row,
        rows,
        wt + o,
        wt_stride,
        features,
        outputs - o < 2 * L ? outputs - o : 2 * L,
        p_stride,
        p + o * p_stride);
  }
  if (o < outputs) {
    outer_rows<A, 1>(row, rows, wt + o, wt_stride, features, outputs - o, p_stride, p + o * p_stride);
  }
}

// dw[q][v] += sum_r g[q][r] row[r][v], for a tile of Q outputs and V vectors; with `Last` the one vector that reaches back.
template <typename T, int64_t Q, int64_t V, bool Last>
TORCHINTRO_INLINE void gradient_tile(
    const T* const* row,
    int64_t rows,
    int64_t next,
    int64_t d,
    const Columns<Accumulator<T>>& columns,
    const Accumulator<T>* g,
    int64_t g_stride,
    Accumulator<T>* dw,
    int64_t dw_stride) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  Vector<A> sum[Q][V] = {}; // the panel's own sum first: a shorter chain of roundings
  for (int64_t r = 0; r < rows; ++r) {
    Vector<A> x[V];
    if (next != 0) {
      for (int64_t v = 0; v < V; v += kVectorsPerLine<T>) {
        __builtin_prefetch(row[r] + next + d + v * L, 0, 2);
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      x[v] = Memory<T>::load(row[r] + d + v * L);
      if constexpr (Last) {
        x[v] = keep<A>(x[v], columns.mask);
      }
    }
    for (int64_t q = 0; q < Q; ++q) {
      const A residual = g[q * g_stride + r];
      for (int64_t v = 0; v < V; ++v) {
        sum[q][v] += x[v] * residual;
      }
    }
  }
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t v = 0; v < V; ++v) {
      A* to = dw + q * dw_stride + v * L;
      Memory<A>::store(to, Memory<A>::load(to) + sum[q][v]);
    }
  }
}

template <typename T, int64_t Q, int64_t V, bool Last>
TORCHINTRO_INLINE void gradient_outputs(
    const T* const* row,
    int64_t rows,
    int64_t next,
    int64_t d,
    const Columns<Accumulator<T>>& columns,
    int64_t outputs,
    const Accumulator<T>* g,
    int64_t g_stride,
    Accumulator<T>* dw,
    int64_t dw_stride) {
  int64_t o = 0;
  for (; o + Q <= outputs; o += Q) {
    gradient_tile<T, Q, V, Last>(
        row, rows, o == 0 ? next : 0, d, columns, g + o * g_stride, g_stride, dw + o * dw_stride, dw_stride);
  }
  if constexpr (Q > 1) {
    gradient_outputs<T, Q / 2, V, Last>(
        row, rows, o == 0 ? next : 0, d, columns, outputs - o, g + o * g_stride, g_stride, dw + o * dw_stride, dw_stride);
  }
}

// dw[o][...] += sum_r g[o][r] row[r][...]. Rows of dw are cut as the columns are: whole vectors, then the last one, whose
// masked lanes are of no use. The rows `next` elements further, if any, are asked for while these are worked on: the memory
// would be idle for a third of the time.
template <typename T>
TORCHINTRO_FUNCTION void wide_weight_gradient(
    const T* const* row,
    int64_t rows,
    int64_t next,
    int64_t features,
    int64_t outputs,
    const Accumulator<T>* g,
    int64_t g_stride,
    Accumulator<T>* dw,
    int64_t dw_stride) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, Q = kTile / 4, V = 4;
  const auto columns = Columns<A>::of(features);
  int64_t d = 0;
  if (outputs == 1) { // more vectors in flight where there is but one product for each
    for (; d + 8 * L <= columns.whole; d += 8 * L) {
      gradient_tile<T, 1, 8, false>(row, rows, next, d, columns, g, g_stride, dw + d, dw_stride);
    }
  }
  for (; d + V * L <= columns.whole; d += V * L) {
    gradient_outputs<T, Q, V, false>(row, rows, next, d, columns, outputs, g, g_stride, dw + d, dw_stride);
  }
  for (; d < columns.whole; d += L) {
    gradient_outputs<T, Q, 1, false>(row, rows, next, d, columns, outputs, g, g_stride, dw + d, dw_stride);
  }
  if (columns.whole < features) {
    gradient_outputs<T, Q, 1, true>(row, rows, next, columns.last, columns, outputs, g, g_stride, dw + d, dw_stride);
  }
}

// to[r][v] = scale * sum_o g[o][r] w[o][v], for a tile of R rows and V vectors
template <typename T, int64_t R, int64_t V, bool PastCaches>
TORCHINTRO_INLINE void input_gradient_tile(
    const Accumulator<T>* g,
    int64_t g_stride,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    Accumulator<T> scale,
    T* to) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  Vector<A> sum[R][V] = {};
  for (int64_t o = 0; o < outputs; ++o) {
    Vector<A> weight[V];
    for (int64_t v = 0; v < V; ++v) {
      weight[v] = Memory<A>::load(w + o * features + v * L);
    }
    for (int64_t r = 0; r < R; ++r) {
      const A residual = g[o * g_stride + r];
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
    int64_t g_stride,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    Accumulator<T> scale,
    T* to) {
  constexpr int64_t L = kLanes<Accumulator<T>>, V = 4;
  int64_t d = 0;
  for (; d + V * L <= features; d += V * L) {
    input_gradient_tile<T, R, V, PastCaches>(g, g_stride, w + d, features, outputs, scale, to + d);
  }
  for (; d + L <= features; d += L) {
    input_gradient_tile<T, R, 1, PastCaches>(g, g_stride, w + d, features, outputs, scale, to + d);
  }
  if (d < features) { // the same values once more where it reaches back
    input_gradient_tile<T, R, 1, false>(
        g, g_stride, w + features - L, features, outputs, scale, to + features - L);
  }
}

// `rows` rows of dx, contiguous; past the caches where `past_caches` says that nobody reads them soon
template <typename T>
TORCHINTRO_FUNCTION void wide_input_gradient(
    const Accumulator<T>* g,
    int64_t g_stride,
    int64_t rows,
    const Accumulator<T>* w,
    int64_t features,
    int64_t outputs,
    Accumulator<T> scale,
    bool past_caches,
    T* to) {
  constexpr int64_t R = kTile / 4;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % kStoredBytes<T> == 0 &&
      features % kLanes<Accumulator<T>> == 0;
  int64_t r = 0;
  if (past_caches && aligned && outputs == 1) { // whole rows one after the other: what the memory likes best
    for (; r < rows; ++r) {
      input_gradient_rows<T, 1, true>(g + r, g_stride, w, features, outputs, scale, to + r * features);
    }
  } else if (past_caches && aligned) {
    for (; r + R <= rows; r += R) {
      input_gradient_rows<T, R, true>(g + r, g_stride, w, features, outputs, scale, to + r * features);
    }
  } else {
    for (; r + R <= rows; r += R) {
      input_gradient_rows<T, R, false>(g + r, g_stride, w, features, outputs, scale, to + r * features);
    }
  }
  for (; r < rows; ++r) {
    input_gradient_rows<T, 1, false>(g + r, g_stride, w, features, outputs, scale, to + r * features);
  }
}

// sums[o][d] += dw[o][...], which is set back to zero
template <typename A>
TORCHINTRO_FUNCTION void wide_flush(A* dw, int64_t dw_stride, int64_t features, int64_t outputs, double* sums) {
  constexpr int64_t L = kLanes<A>;
  const int64_t whole = features / L * L;
  for (int64_t o = 0; o < outputs; ++o) {
    A* from = dw + o * dw_stride;
    double* to = sums + o * features;
    for (int64_t d = 0; d < whole; ++d) {
      to[d] += from[d];
    }
    for (int64_t i = whole; i < features; ++i) { // the lanes of the last vector that are not masked
      to[i] += from[whole + L - features + i];
    }
    for (int64_t d = 0; d < dw_stride; ++d) {
      from[d] = 0;
    }
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
