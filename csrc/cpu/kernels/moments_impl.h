// The moments kernel (see RowMoments in kernels.h for the formulas). Included after few_outputs_impl.h.
//
// Per panel of rows: everything is widened to float64 and shifted, once, and then multiplied. The weights and v dy are kept by
// columns, [1 + o][r], the first column of them v itself, so that sum_x is a product like the others. dx, and v dx where there
// are weights, are laid out in one of two ways:
//
//   narrow (up to kNarrowFeatures): by columns. A vector holds one column of several rows, every sum has a vector of its own,
//     whose lanes are added at the block's end, and no product is computed twice.
//   wide: by rows. A vector holds neighbouring features of one row, which is multiplied by one number of the row at a time:
//     register tiles of kMomentsTileRows numbers x kMomentsTileVectors vectors. The vectors left of the diagonal are left out.
//
// Bytes: X, the target and the weights once. Operations: 2 N (D (D + 1) / 2 + D (O + 1)) in float64, and in the wide layout
// those of the diagonal's vectors that lie left of it: with D = 64, O = 1 and eight lanes 304 multiplications of vectors a row,
// where 276 would be the least, and 16 more instructions to widen and shift it. 1M x 64 -> 1: 4.9 GFLOP.
// Order of summation: fixed by the sizes and the level: panel, block; by columns lanes before that.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

// Accumulators: 24 of 32 registers, or 12 or 8 of 16.
constexpr int64_t kMomentsTileRows = TORCHINTRO_VECTOR_BYTES >= 64 ? 8 : 4;
constexpr int64_t kMomentsTileVectors = TORCHINTRO_VECTOR_BYTES >= 32 ? 3 : 2;
// The same for the few rows of v and v dy, two at a time.
constexpr int64_t kMomentsExtraVectors = TORCHINTRO_VECTOR_BYTES >= 64 ? 8 : 4;

TORCHINTRO_INLINE Doubles load_doubles(const double* from) {
  return Memory<double>::load(from);
}
TORCHINTRO_INLINE Doubles load_doubles(const float* from) {
  HalfOfFloats some;
  __builtin_memcpy(&some, from, sizeof(some));
  return __builtin_convertvector(some, Doubles);
}

// The parts of the scratch memory, which moments_scratch_bytes adds up.
template <typename A>
struct MomentsScratch {
  double* left; // [column][r]: v, v dy, zeros;  narrow: behind them v dx
  double* right; // narrow: [d][r] dx, which is `left`'s where there are no weights;  wide: [r][d]
  double* weighted; // wide: [r][d] v dx, `right` itself where there are no weights
  double* sums; // narrow: a vector for every pair of a left and a right column
  A* staged; // what is widened next, as it was loaded: the target or, where rows are not side by side, the input
  int64_t panel, stride; // from one column of `left` to the next; wide: from one row to the next

  TORCHINTRO_INLINE MomentsScratch lay_out(const RowMoments& a, bool narrow, void* memory) {
    MomentsScratch s;
    const int64_t extra = moments_extra(a), features = moments_stride(a);
    s.panel = narrow ? kMomentsNarrowRows : kMomentsWideRows;
    s.left = static_cast<double*>(memory);
    if (narrow) {
      const int64_t left = round_up(extra + a.in_features, 4);
      s.stride = 0;
      s.right = a.weight ? s.left + left * s.panel : s.left + extra * s.panel;
      s.weighted = nullptr;
      s.sums = s.left + (left + a.in_features + 1) * s.panel;
      s.staged = reinterpret_cast<A*>(s.sums + left * (a.in_features + 1) * 8);
    } else {
      // An odd number of cache lines: rows an even number apart would share the sets of the first-level cache.
      s.stride = features + (features % 16 == 0 ? 8 : 0);
      s.right = s.left + extra * s.panel;
      // A row's last vector may reach over the next row, which is written afterwards.
      const int64_t size = s.panel * s.stride + kMaximumLanes;
      s.weighted = a.weight ? s.right + size : s.right;
      s.sums = nullptr;
      s.staged = reinterpret_cast<A*>(s.weighted + size);
    }
    return s;
  }
};

// to[r] = v[r] (x[r] - shift), and unweighted[r] = x[r] - shift where it is wanted; returns the sums of v dx and v dx^2.
struct ColumnSums {
  double sum;
  double squares;
};
template <typename A>
TORCHINTRO_INLINE ColumnSums
centre_column(const A* x, double shift, const double* v, int64_t padded_rows, double* to, double* unweighted) {
  constexpr int64_t H = kLanes<double>;
  Doubles sum{}, squares{};
  for (int64_t r = 0; r < padded_rows; r += H) {
    const Doubles difference = load_doubles(x + r) - shift;
    const Doubles product = Memory<double>::load(v + r) * difference;
    Memory<double>::store(to + r, product);
    if (unweighted) {
      Memory<double>::store(unweighted + r, difference);
    }
    sum += product;
    squares += product * difference;
  }
  return {sum_lanes<double>(sum), sum_lanes<double>(squares)};
}

template <typename U, typename A>
TORCHINTRO_INLINE void moments_targets_of(
    const RowMoments& a,
    int64_t row,
    int64_t row_end,
    int64_t rows,
    int64_t padded_rows,
    const MomentsScratch<A>& s,
    double* partial) {
  using B = Accumulator<U>;
  const double* shift = a.shift + round_up(a.in_features, kMaximumLanes);
  B* staged = reinterpret_cast<B*>(s.staged);
  load_operand<U>(a.target, row, row_end, rows, padded_rows, a.out_features, staged, s.panel);
  for (int64_t o = 0; o < a.out_features; ++o) {
    const ColumnSums sums =
        centre_column<B>(staged + o * s.panel, shift[o], s.left, padded_rows, s.left + (1 + o) * s.panel, nullptr);
    partial[1 + o] += sums.sum;
    partial[1 + a.out_features + o] += sums.squares;
  }
}

// v and v dy of a panel, zeros in the rows up to padded_rows and in the column that may be there for padding, and their sums.
template <typename A>
TORCHINTRO_FUNCTION void moments_targets(
    const RowMoments& a,
    int64_t row,
    int64_t row_end,
    int64_t rows,
    int64_t padded_rows,
    const MomentsScratch<A>& s,
    double* partial) {
  double count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    s.left[r] = a.weight ? a.weight[row + r] : 1.0;
    count += s.left[r];
  }
  partial[0] += count;
  set_zero(s.left + rows, padded_rows - rows);
  if (moments_extra(a) > 1 + a.out_features) {
    set_zero(s.left + (1 + a.out_features) * s.panel, padded_rows);
  }
  switch (a.target_type) {
    case DType::Float64:
      return moments_targets_of<double>(a, row, row_end, rows, padded_rows, s, partial);
    case DType::Float32:
      return moments_targets_of<float>(a, row, row_end, rows, padded_rows, s, partial);
    case DType::BFloat16:
      return moments_targets_of<bfloat16>(a, row, row_end, rows, padded_rows, s, partial);
    case DType::Float16:
      return moments_targets_of<float16>(a, row, row_end, rows, padded_rows, s, partial);
  }
}

// What to ask for while the panel at `row` is worked on: the next one.
template <typename T>
TORCHINTRO_INLINE Ahead moments_ahead(const RowMoments& a, int64_t row, int64_t panel, bool narrow) {
  constexpr int64_t kLineSize = Ahead::kLine / static_cast<int64_t>(sizeof(T));
  const int64_t stride = a.input.row_stride, gap = stride - a.in_features;
  const bool close = a.input.column_stride == 1 && gap >= 0 && (gap <= a.in_features / 2 || stride <= kLineSize);
  if (!close || row + panel >= a.rows) {
    return Ahead::idle(a.input.data);
  }
  int64_t round, steps;
  if (narrow) { // as load_by_columns takes them
    round = (a.in_features + Ahead::kPages - 1) / Ahead::kPages;
    steps = panel / kLanes<Accumulator<T>> * round;
  } else { // a step for every row of every tile; there are some more of them than are counted here
    const int64_t vectors = moments_stride(a) / kLanes<double>;
    int64_t tiles = moments_extra(a) / 2 * (vectors / kMomentsExtraVectors);
    for (int64_t q = 0; q < moments_stride(a); q += kMomentsTileRows) {
      tiles += (vectors - q / kLanes<double> + kMomentsTileVectors - 1) / kMomentsTileVectors;
    }
    round = panel;
    steps = tiles * panel;
  }
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(T));
  const char* origin = static_cast<const char*>(a.input.data);
  // Four pages are complete when the fifth is begun.
  const char* next = origin + (row + panel) * row_bytes + Ahead::kPages * Ahead::kPage;
  return Ahead::from(origin, next, panel * row_bytes, steps, round);
}

// --- narrow

// sums[q][c] += left[q][r] right[c][r] for a tile of Q x C columns
template <int64_t Q, int64_t C>
TORCHINTRO_INLINE void moments_narrow_tile(
    const double* left, const double* right, int64_t column, int64_t padded_rows, double* sums, int64_t sums_row) {
  constexpr int64_t H = kLanes<double>;
  Doubles sum[Q][C];
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t c = 0; c < C; ++c) {
      sum[q][c] = Memory<double>::load(sums + q * sums_row + c * H);
    }
  }
  for (int64_t r = 0; r < padded_rows; r += H) {
    Doubles x[C];
    for (int64_t c = 0; c < C; ++c) {
      x[c] = Memory<double>::load(right + c * column + r);
    }
    for (int64_t q = 0; q < Q; ++q) {
      const Doubles factor = Memory<double>::load(left + q * column + r);
      for (int64_t c = 0; c < C; ++c) {
        sum[q][c] += factor * x[c];
      }
    }
  }
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t c = 0; c < C; ++c) {
      Memory<double>::store(sums + q * sums_row + c * H, sum[q][c]);
    }
  }
}

// A panel's products; what tiles at the edges have beyond the columns that mean something is not looked at.
TORCHINTRO_FUNCTION void moments_narrow_products(
    const RowMoments& a, const double* left, const double* right, int64_t padded_rows, double* sums) {
  constexpr int64_t Q = 4, C = 2, H = kLanes<double>;
  const int64_t column = kMomentsNarrowRows, features = a.in_features, extra = moments_extra(a);
  const int64_t sums_row = (features + 1) * H;
  for (int64_t d = 0; d < features; d += C) {
    const int64_t pair = d + C <= features ? C : 1; // columns
    for (int64_t q = 0; q < extra + d + pair; q += Q) {
      double* to = sums + q * sums_row + d * H;
      if (pair == C) {
        moments_narrow_tile<Q, C>(left + q * column, right + d * column, column, padded_rows, to, sums_row);
      } else {
        moments_narrow_tile<Q, 1>(left + q * column, right + d * column, column, padded_rows, to, sums_row);
      }
    }
  }
}

template <typename T>
TORCHINTRO_INLINE void moments_narrow_panel(
    const RowMoments& a, int64_t row, int64_t row_end, int64_t rows, const MomentsScratch<Accumulator<T>>& s) {
  const int64_t padded_rows = round_up(rows, kLanes<Accumulator<T>>);
  double* left = s.left + moments_extra(a) * s.panel;
  Ahead ahead = moments_ahead<T>(a, row, s.panel, true);
  load_operand<T>(a.input, row, row_end, rows, padded_rows, a.in_features, s.staged, s.panel, &ahead);
  for (int64_t d = 0; d < a.in_features; ++d) {
    double* unweighted = a.weight ? s.right + d * s.panel : nullptr;
    centre_column<Accumulator<T>>(
        s.staged + d * s.panel, a.shift[d], s.left, padded_rows, left + d * s.panel, unweighted);
  }
  moments_narrow_products(a, s.left, s.right, padded_rows, s.sums);
}

TORCHINTRO_FUNCTION void moments_narrow_finish(const RowMoments& a, const double* sums, double* matrix) {
  constexpr int64_t H = kLanes<double>;
  const int64_t extra = moments_extra(a), stride = moments_stride(a), sums_row = (a.in_features + 1) * H;
  for (int64_t q = 0; q < extra + a.in_features; ++q) {
    for (int64_t d = q < extra ? 0 : q - extra; d < a.in_features; ++d) {
      matrix[q * stride + d] = sum_lanes<double>(Memory<double>::load(sums + q * sums_row + d * H));
    }
  }
}

// --- wide

// dx of a row, zeros up to the end of its last vector
template <typename S>
TORCHINTRO_INLINE void centre_row(const S* from, const double* shift, int64_t columns, double* to) {
  using A = Accumulator<S>;
  constexpr int64_t L = kLanes<A>, H = kLanes<double>;
  int64_t c = 0;
  if constexpr (sizeof(S) == sizeof(A)) {
    for (; c + H <= columns; c += H) {
      Memory<double>::store(to + c, load_doubles(from + c) - Memory<double>::load(shift + c));
    }
  }
  constexpr int64_t kHalves = sizeof(S) == sizeof(A) ? 1 : 2; // less than a half is left, or nothing done
  for (; c < columns; c += L) {
    const Vector<A> value = c + L <= columns ? Memory<S>::load(from + c) : load_first<S>(from + c, columns - c);
    if constexpr (sizeof(A) == 8) {
      Memory<double>::store(to + c, value - Memory<double>::load(shift + c));
    } else {
      HalfOfFloats half[2];
      __builtin_memcpy(half, &value, sizeof(half));
      for (int64_t i = 0; i < kHalves; ++i) {
        const Doubles wide = __builtin_convertvector(half[i], Doubles);
        Memory<double>::store(to + c + i * H, wide - Memory<double>::load(shift + c + i * H));
      }
    }
  }
}

template <typename T>
TORCHINTRO_FUNCTION void moments_wide_rows(
    const RowMoments& a, int64_t row, int64_t row_end, int64_t rows, const MomentsScratch<Accumulator<T>>& s) {
  using A = Accumulator<T>;
  const T* data = static_cast<const T*>(a.input.data);
  const T* from = data + row * a.input.row_stride;
  const int64_t features = a.in_features, staged_stride = round_up(features, kMaximumLanes) + kMaximumLanes;
  if (a.input.column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      centre_row<T>(from + r * a.input.row_stride, a.shift, features, s.right + r * s.stride);
    }
  } else {
    if (a.input.row_stride == 1 && a.input.column_stride > 1) { // features are contiguous, not rows: transpose
      const T* end = data + row_end + (features - 1) * a.input.column_stride;
      load_by_columns<T>(from, a.input.column_stride, 1, end, features, features, rows, s.staged, staged_stride);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        load_row<T>(from + r * a.input.row_stride, a.input.column_stride, features, s.staged + r * staged_stride);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      centre_row<A>(s.staged + r * staged_stride, a.shift, features, s.right + r * s.stride);
    }
  }
  for (int64_t r = 0; a.weight && r < rows; ++r) {
    for (int64_t c = 0; c < moments_stride(a); c += kLanes<double>) {
      Memory<double>::store(
          s.weighted + r * s.stride + c, s.left[r] * Memory<double>::load(s.right + r * s.stride + c));
    }
  }
}

// Where a tile's numbers lie: those of one row, and those of one column, so far apart.
struct MomentsLeft {
  const double* data;
  int64_t row;
  int64_t column;
};

// to[q][v] += left[q][r] right[r][v] over the rows r, for Q numbers of a row and V vectors
template <int64_t Q, int64_t V>
TORCHINTRO_INLINE void moments_tile(
    const MomentsLeft& left,
    const double* right,
    int64_t right_row,
    int64_t rows,
    double* to,
    int64_t to_row,
    Ahead& ahead) {
  constexpr int64_t H = kLanes<double>;
  Doubles sum[Q][V] = {}; // the panel's own sum first: a shorter chain of roundings
  const double* factor = left.data;
  const char* next = ahead.next;
  for (int64_t r = 0; r < rows; ++r) {
    next = Ahead::step<1>(ahead, next, r);
    Doubles x[V];
    for (int64_t v = 0; v < V; ++v) {
      x[v] = Memory<double>::load(right + v * H);
    }
    for (int64_t q = 0; q < Q; ++q) {
      for (int64_t v = 0; v < V; ++v) {
        sum[q][v] += x[v] * factor[q * left.column];
      }
    }
    right += right_row;
    factor += left.row;
  }
  ahead.next = next;
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t v = 0; v < V; ++v) {
      double* sums = to + q * to_row + v * H;
      Memory<double>::store(sums, Memory<double>::load(sums) + sum[q][v]);
    }
  }
}

template <int64_t V>
TORCHINTRO_FUNCTION void moments_feature_tile(
    const double* left, const double* right, int64_t stride, int64_t rows, double* to, int64_t to_row, Ahead& ahead) {
  moments_tile<kMomentsTileRows, V>({left, stride, 1}, right, stride, rows, to, to_row, ahead);
}
template <int64_t V>
TORCHINTRO_FUNCTION void moments_extra_tile(
    const double* left, const double* right, int64_t stride, int64_t rows, double* to, int64_t to_row, Ahead& ahead) {
  moments_tile<2, V>({left, 1, kMomentsWideRows}, right, stride, rows, to, to_row, ahead);
}

// How many of `vectors` the next tile has: no tile of a single one, whose sums wait for each other, where it can be helped.
TORCHINTRO_INLINE int64_t next_vectors(int64_t vectors) {
  return vectors == kMomentsTileVectors + 1 && kMomentsTileVectors == 3 ? 2
      : vectors < kMomentsTileVectors                                   ? vectors
                                                                        : kMomentsTileVectors;
}

// A panel's products, from diagonal to right edge.
TORCHINTRO_FUNCTION void moments_wide_products(
    const RowMoments& a,
    const double* extra_left,
    const double* left,
    const double* right,
    int64_t stride,
    int64_t rows,
    double* matrix,
    Ahead& ahead) {
  constexpr int64_t H = kLanes<double>, Q = kMomentsTileRows, E = kMomentsExtraVectors;
  const int64_t columns = moments_stride(a), extra = moments_extra(a);
  for (int64_t q = 0; q < extra; q += 2) {
    const double* factors = extra_left + q * kMomentsWideRows;
    int64_t c = 0;
    for (; c + E * H <= columns; c += E * H) {
      moments_extra_tile<E>(factors, right + c, stride, rows, matrix + q * columns + c, columns, ahead);
    }
    for (; c + 2 * H <= columns; c += 2 * H) {
      moments_extra_tile<2>(factors, right + c, stride, rows, matrix + q * columns + c, columns, ahead);
    }
    for (; c < columns; c += H) {
      moments_extra_tile<1>(factors, right + c, stride, rows, matrix + q * columns + c, columns, ahead);
    }
  }
  for (int64_t q = 0; q < columns; q += Q) {
    double* to = matrix + (extra + q) * columns;
    for (int64_t c = q / H * H, vectors; c < columns; c += vectors * H) {
      vectors = next_vectors((columns - c) / H);
      if (vectors == 1) {
        moments_feature_tile<1>(left + q, right + c, stride, rows, to + c, columns, ahead);
      } else if (vectors == 2) {
        moments_feature_tile<2>(left + q, right + c, stride, rows, to + c, columns, ahead);
      } else {
        moments_feature_tile<3>(left + q, right + c, stride, rows, to + c, columns, ahead);
      }
    }
  }
}

template <typename T>
TORCHINTRO_TARGET void moments(
    const RowMoments& a, int64_t row_begin, int64_t row_end, double* partial, void* scratch) {
  using A = Accumulator<T>;
  const bool narrow = a.in_features <= kNarrowFeatures;
  const auto s = MomentsScratch<A>::lay_out(a, narrow, scratch);
  double* matrix = partial + moments_matrix(a);
  set_zero(partial, moments_sums(a));
  if (narrow) {
    const int64_t columns = moments_extra(a) + a.in_features, left = round_up(columns, 4);
    set_zero(s.sums, left * (a.in_features + 1) * kLanes<double>);
    // A tile's columns beyond the last one: whatever lies there could be subnormal, which costs a hundred times as much.
    set_zero(s.left + columns * s.panel, (left - columns) * s.panel);
  }
  for (int64_t row = row_begin; row < row_end; row += s.panel) {
    const int64_t rows = row_end - row < s.panel ? row_end - row : s.panel;
    // Whole vectors of what is loaded, whichever of the two types has more lanes.
    moments_targets<A>(a, row, row_end, rows, round_up(rows, kMaximumLanes), s, partial);
    if (narrow) {
      moments_narrow_panel<T>(a, row, row_end, rows, s);
    } else {
      Ahead ahead = moments_ahead<T>(a, row, s.panel, false);
      moments_wide_rows<T>(a, row, row_end, rows, s);
      moments_wide_products(a, s.left, s.weighted, s.right, s.stride, rows, matrix, ahead);
    }
  }
  if (narrow) {
    moments_narrow_finish(a, s.sums, matrix);
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
