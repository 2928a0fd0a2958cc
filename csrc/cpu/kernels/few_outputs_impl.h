// The few-outputs kernel (see kernels.h for the formula), included by each level's file after narrow_impl.h and wide_impl.h.
//
// Per panel of rows: predictions p, residuals, and then, while the rows are still in cache, the update of dw and the rows of
// dx. p and g are kept by columns, [o][r], so that the residual's vectors hold rows whatever O is.
// Bytes: X, the target and the weights once, dx and dt once. Operations: 2 N D O for the loss, 2 N D O more for dw and for dx.
// Order of summation: fixed by the sizes and the level: lanes, panel, run, block.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

// Rows whose gradient is added in float32 before it goes to float64: a longer run rounds more, a shorter one spends more on
// the flush. By columns every lane has its own sum, of a sixteenth or less of the rows.
constexpr int64_t kNarrowRunRows = 2048;
constexpr int64_t kWideRunRows = 256;

// The parts of the scratch memory, which few_outputs_scratch_bytes adds up; each begins at a multiple of 16 elements.
template <typename A>
struct Scratch {
  A* dw; // O x D vectors, or O rows of D rounded up and a vector more
  A* p; // [o][column]: predictions, then g
  A* t; // [o][column]: the target
  A* v; // [o][column]: the weights
  A* x; // narrow: [d][column];  wide: [panel][d], rows that are not contiguous accumulators already
  A* dx; // narrow: [d][column]
  int64_t dw_size, dw_stride, x_stride, column; // from one column of p, t, v, and of narrow x and dx, to the next

  TORCHINTRO_INLINE Scratch lay_out(const FewOutputs& a, int64_t panel, bool narrow, void* memory) {
    Scratch s;
    const int64_t padded = round_up(a.in_features, kMaximumLanes);
    s.x_stride = padded + kMaximumLanes;
    s.column = narrow ? kNarrowPanelRows : kWidePanelRows;
    s.dw_stride = narrow ? a.in_features * kLanes<A> : s.x_stride;
    s.dw_size = a.wants_weight_gradient ? a.out_features * s.dw_stride : 0;
    s.dw = static_cast<A*>(memory);
    s.p = s.dw + s.dw_size;
    s.t = s.p + a.out_features * s.column;
    s.v = s.t + a.out_features * s.column;
    s.x = s.v + a.out_features * s.column;
    s.dx = s.x + (narrow ? a.in_features * s.column : panel * s.x_stride);
    return s;
  }
};

// A panel of the target or of the weights, by columns.
template <typename U>
TORCHINTRO_INLINE void load_operand(
    const Strided<const void>& from,
    int64_t row,
    int64_t row_end,
    int64_t rows,
    int64_t padded_rows,
    int64_t columns,
    Accumulator<U>* to,
    int64_t to_stride,
    Ahead* ahead = nullptr) {
  const U* data = static_cast<const U*>(from.data);
  const U* end = data + (row_end - 1) * from.row_stride + (columns - 1) * from.column_stride + 1;
  load_by_columns<U>(
      data + row * from.row_stride,
      from.row_stride,
      from.column_stride,
      end,
      rows,
      padded_rows,
      columns,
      to,
      to_stride,
      ahead);
}

using Doubles = Vector<double>;
typedef float HalfOfFloats __attribute__((vector_size(TORCHINTRO_VECTOR_BYTES / 2))); // as many as Doubles has

// squares += v r^2 and sum += v r, in float64
template <typename A>
TORCHINTRO_INLINE void add_residuals(Doubles& squares, Doubles& sum, Vector<A> difference, Vector<A> weighted) {
  if constexpr (sizeof(A) == 8) {
    squares += difference * weighted;
    sum += weighted;
  } else {
    HalfOfFloats d[2], w[2];
    __builtin_memcpy(d, &difference, sizeof(d));
    __builtin_memcpy(w, &weighted, sizeof(w));
    for (int64_t i = 0; i < 2; ++i) {
      const Doubles wide = __builtin_convertvector(w[i], Doubles);
      squares += __builtin_convertvector(d[i], Doubles) * wide;
      sum += wide;
    }
  }
}

// p (+ bias, where given) -> g for `rows` rows of a panel, zeros in the rows behind them; the panel's losses and bias gradient
// are added to `losses` and `db`. A single model's loss stays in the lanes of `loss`, which cost a sum each panel otherwise.
template <typename A>
TORCHINTRO_FUNCTION void residuals(
    const FewOutputs& a,
    const Scratch<A>& s,
    const A* bias,
    int64_t rows,
    int64_t padded_rows,
    Doubles& loss,
    double* losses,
    double* db) {
  constexpr int64_t L = kLanes<A>;
  const A scale = static_cast<A>(a.residual_scale);
  const bool weighted = a.weight.data != nullptr;
  const int64_t v_stride = a.weight.column_stride == 0 ? 0 : s.column;
  const int64_t columns = a.out_features / a.models;
  for (int64_t m = 0; m < a.models; ++m) {
    Doubles squares{};
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t o = m * columns + column;
      const A b = bias ? bias[o] : A(0);
      Doubles sum{};
      for (int64_t r = 0; r < padded_rows; r += L) {
        A* p = s.p + o * s.column + r;
        Vector<A> difference = Memory<A>::load(p) + b - Memory<A>::load(s.t + column * s.column + r);
        Vector<A> product = weighted ? difference * Memory<A>::load(s.v + column * v_stride + r) : difference;
        if (r + L > rows) {
          const auto mask = lanes_below<A>(rows - r);
          difference = keep<A>(difference, mask);
          product = keep<A>(product, mask);
        }
        add_residuals<A>(squares, sum, difference, product);
        Memory<A>::store(p, product * scale);
      }
      db[o] += a.residual_scale * sum_lanes<double>(sum);
    }
    if (a.models == 1) {
      loss += squares;
    } else {
      losses[m] += sum_lanes<double>(squares);
    }
  }
}

// The panel's rows as contiguous accumulators, in s.x.
template <typename T>
TORCHINTRO_INLINE void copy_rows(
    const FewOutputs& a, int64_t row, int64_t row_end, int64_t rows, const Scratch<Accumulator<T>>& s) {
  const T* data = static_cast<const T*>(a.input.data);
  const T* from = data + row * a.input.row_stride;
  if (a.input.row_stride == 1 && a.input.column_stride > 1) { // features are contiguous, not rows: transpose
    const T* end = data + row_end + (a.in_features - 1) * a.input.column_stride;
    load_by_columns<T>(from, a.input.column_stride, 1, end, a.in_features, a.in_features, rows, s.x, s.x_stride);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      load_row<T>(from + r * a.input.row_stride, a.input.column_stride, a.in_features, s.x + r * s.x_stride);
    }
  }
}

// What to ask for while the panel at `row` is worked on: as much as it has, with the gaps between the rows, where these are
// small beside the rows or no line of their own. Behind a block's end lies what the caller says that its thread goes on with.
template <typename T>
TORCHINTRO_INLINE Ahead panel_ahead(const FewOutputs& a, int64_t row, int64_t row_end, int64_t panel, bool narrow) {
  constexpr int64_t kLineSize = Ahead::kLine / static_cast<int64_t>(sizeof(T));
  const int64_t stride = a.input.row_stride, gap = stride - a.in_features;
  const bool close = a.input.column_stride == 1 && gap >= 0 && (gap <= a.in_features / 2 || stride <= kLineSize);
  const int64_t next_row = row + panel + (row + panel < row_end ? 0 : a.rows_between);
  if (!close || next_row >= a.rows) {
    return Ahead::idle(a.input.data);
  }
  constexpr int64_t L = kLanes<Accumulator<T>>;
  const int64_t outputs = a.out_features, rest = outputs % 4;
  const int64_t round = narrow ? (a.in_features + Ahead::kPages - 1) / Ahead::kPages : a.in_features / L;
  int64_t steps;
  if (narrow) {
    steps = panel / L * round;
  } else { // of register tiles, for every 48 vectors of the panel; those of odd sizes are a little more
    const int64_t rest_rows = rest == 1 ? kTileRows<1> : rest == 2 ? kTileRows<2> : kTileRows<3>;
    steps = outputs / 4 * (48 / kTileRows<4>)+(rest ? 48 / rest_rows : 0);
    if (a.wants_weight_gradient) {
      steps += outputs == 1 ? 6
          : kTile == 16     ? outputs / 8 * 16 + (outputs % 8 / 4 + (rest > 1)) * 12
                            : outputs / 2 * 12;
    }
    if (a.grad_input) {
      steps += outputs == 1 ? 12 : 48 / kTile;
    }
    steps = panel * a.in_features / L * steps / 48;
  }
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(T));
  const char* origin = static_cast<const char*>(a.input.data);
  // Four pages are complete when the fifth is begun.
  const char* next = origin + next_row * row_bytes + Ahead::kPages * Ahead::kPage;
  return Ahead::from(origin, next, panel * row_bytes, steps, round);
}

template <typename A>
TORCHINTRO_FUNCTION void set_zero(A* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = 0;
  }
}

template <typename T, typename U>
TORCHINTRO_TARGET void few_outputs(
    const FewOutputs& a, int64_t row_begin, int64_t row_end, double* partial, void* scratch) {
  using A = Accumulator<T>;
  const bool narrow = a.in_features <= kNarrowFeatures;
  // 16-bit rows are converted as they are used where that is twice, and once beforehand where it is more often.
  const bool usable = a.input.column_stride == 1 && (sizeof(T) == sizeof(A) || a.out_features == 1);
  const int64_t features = a.in_features, outputs = a.out_features, panel = panel_rows(a);
  const int64_t tile = narrow ? kNarrowTileRows * kLanes<A> : kTile;
  const int64_t run_rows = narrow ? kNarrowRunRows : kWideRunRows;
  const auto s = Scratch<A>::lay_out(a, panel, narrow, scratch);
  const A* w = static_cast<const A*>(a.linear_weight);
  const A* bias = static_cast<const A*>(a.linear_bias);
  const int64_t models = a.models, columns = outputs / models; // of target and weight
  double* const db = partial + models;
  double* const sums = db + outputs;
  // The first panel overwrites the weight gradient's sums, where there is one.
  set_zero(partial, models + outputs + (a.wants_weight_gradient && row_begin >= row_end ? outputs * features : 0));
  Doubles loss{};
  int64_t run = 0; // rows in dw
  bool fresh = true; // nothing is in sums yet
  const T* input = static_cast<const T*>(a.input.data);

  for (int64_t row = row_begin; row < row_end; row += panel) {
    const int64_t rows = row_end - row < panel ? row_end - row : panel;
    const int64_t padded_rows = round_up(rows, tile);
    Ahead ahead = panel_ahead<T>(a, row, row_end, panel, narrow);
    // Rows that do not fill a tile are copied too, with zeros behind them.
    const bool direct = !narrow && usable && rows == padded_rows;
    const T* x = input + row * a.input.row_stride;
    if (narrow) {
      load_operand<T>(a.input, row, row_end, rows, padded_rows, features, s.x, s.column, &ahead);
      narrow_predict<A>(s.x, w, bias, features, outputs, padded_rows, s.p);
    } else if (direct) {
      wide_predict<T>(x, a.input.row_stride, rows, w, features, outputs, ahead, s.p);
    } else {
      copy_rows<T>(a, row, row_end, rows, s);
      set_zero(s.x + rows * s.x_stride, (padded_rows - rows) * s.x_stride);
      wide_predict<A>(s.x, s.x_stride, rows, w, features, outputs, ahead, s.p);
    }
    const int64_t residual_rows = narrow ? padded_rows : round_up(rows, kLanes<A>);
    load_operand<U>(a.target, row, row_end, rows, residual_rows, columns, s.t, s.column);
    if (a.weight.data) {
      load_operand<U>(
          a.weight, row, row_end, rows, residual_rows, a.weight.column_stride == 0 ? 1 : columns, s.v, s.column);
    }
    residuals<A>(a, s, narrow ? nullptr : bias, rows, residual_rows, loss, partial, db);
    if (a.grad_target) {
      U* to = static_cast<U*>(a.grad_target) + row * outputs;
      store_by_rows<U>(s.p, s.column, rows, outputs, static_cast<A>(a.target_scale), to);
    }
    if (a.wants_weight_gradient && narrow) {
      narrow_weight_gradient<A>(s.x, s.p, features, outputs, padded_rows, run == 0, s.dw);
    } else if (a.wants_weight_gradient && direct) {
      wide_weight_gradient<T>(
          {x, a.input.row_stride, rows, Columns<A>::of(features), s.p, run == 0, s.dw, s.dw_stride}, outputs, ahead);
    } else if (a.wants_weight_gradient) {
      wide_weight_gradient<A>(
          {s.x, s.x_stride, rows, Columns<A>::of(features), s.p, run == 0, s.dw, s.dw_stride}, outputs, ahead);
    }
    if (a.grad_input) {
      T* to = static_cast<T*>(a.grad_input) + row * features;
      const A scale = static_cast<A>(a.input_scale);
      if (narrow) {
        narrow_input_gradient<A>(s.p, w, features, outputs, padded_rows, s.dx);
        store_by_rows<T>(s.dx, s.column, rows, features, scale, to);
      } else {
        wide_input_gradient<T>(s.p, rows, w, features, outputs, scale, a.past_caches, ahead, to);
      }
    }
    run += rows;
    if (a.wants_weight_gradient && (run + panel > run_rows || row + panel >= row_end)) {
      if (narrow) {
        narrow_flush<A>(s.dw, outputs * features, fresh, sums);
      } else {
        wide_flush<A>(s.dw, s.dw_stride, features, outputs, fresh, sums);
      }
      fresh = false;
      run = 0;
    }
  }
  if (models == 1) {
    partial[0] = sum_lanes<double>(loss);
  }
  if (a.past_caches) {
    finish_stores_past_caches();
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
