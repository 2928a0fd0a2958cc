// The few-outputs kernel (see kernels.h for the formula), included by each level's file after simd.h.
//
// Per group of kGroupRows rows: predictions (a register tile of rows x outputs over the vectors of D), residuals, and then,
// while the rows are still in cache, the update of dw and the rows of dx. Bytes: X once, dx once, and per kRunRows rows
// 12 O D bytes of accumulators. Operations: 2 N D O for the loss, 2 N D O more for dw and for dx.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

// Rows whose gradient is added in one float32 accumulator before it goes to float64: a longer run rounds more, a shorter
// one spends more on the flush (3 accumulators read or written per run and weight, beside kRunRows values of X).
constexpr int64_t kRunRows = 128;
// Rows that share the loads of dw's accumulators: 8 rows and one output are 8 vectors of predictions in registers.
constexpr int64_t kGroupRows = 8;
// Register tile for several outputs: rows x outputs accumulators beside the operands.
constexpr int64_t kTileRows = 4;
constexpr int64_t kTileOutputs = TORCHINTRO_VECTOR_BYTES >= 64 ? 4 : 2;

template <typename T>
struct Rows { // a group's rows of the input, contiguous along D
  const T* row[kGroupRows];
  const T* end; // behind the last element that may be read
};

// sums[r][o] = sum_d row[r][d] w[o][d], for R rows from `first` and P outputs
template <typename T, int64_t R, int64_t P>
TORCHINTRO_INLINE void dot(
    const Rows<T>& rows,
    int64_t first,
    const Accumulator<T>* w,
    const Accumulator<T>* w_end,
    int64_t features,
    Accumulator<T>* sums,
    int64_t sums_stride) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  Vector<A> sum[R][P] = {};
  const int64_t whole = features / L * L;
  for (int64_t d = 0; d < whole; d += L) {
    Vector<A> x[R];
    for (int64_t r = 0; r < R; ++r) {
      x[r] = Memory<T>::load(rows.row[first + r] + d);
    }
    for (int64_t o = 0; o < P; ++o) {
      const Vector<A> weight = Memory<A>::load(w + o * features + d);
      for (int64_t r = 0; r < R; ++r) {
        sum[r][o] += x[r] * weight;
      }
    }
  }
  if (whole < features) {
    const int64_t rest = features - whole;
    Vector<A> x[R];
    for (int64_t r = 0; r < R; ++r) {
      x[r] = load_first<T>(rows.row[first + r] + whole, rest, rows.end);
    }
    for (int64_t o = 0; o < P; ++o) {
      const Vector<A> weight = load_first<A>(w + o * features + whole, rest, w_end);
      for (int64_t r = 0; r < R; ++r) {
        sum[r][o] += x[r] * weight;
      }
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t o = 0; o < P; ++o) {
      sums[r * sums_stride + o] = sum_lanes<A>(sum[r][o]);
    }
  }
}

// predictions[r][o] without the bias, for R rows
template <typename T, int64_t R>
TORCHINTRO_INLINE void predict(const FewOutputs& a, const Rows<T>& rows, Accumulator<T>* predictions) {
  using A = Accumulator<T>;
  const A* w = static_cast<const A*>(a.linear_weight);
  const A* w_end = w + a.out_features * a.in_features;
  int64_t o = 0;
  if constexpr (R == kGroupRows) {
    for (; o + kTileOutputs <= a.out_features; o += kTileOutputs) {
      for (int64_t r = 0; r < R; r += kTileRows) {
        dot<T, kTileRows, kTileOutputs>(
            rows,
            r,
            w + o * a.in_features,
            w_end,
            a.in_features,
            predictions + r * kMaximumFewOutputs + o,
            kMaximumFewOutputs);
      }
    }
  }
  for (; o < a.out_features; ++o) {
    dot<T, R, 1>(rows, 0, w + o * a.in_features, w_end, a.in_features, predictions + o, kMaximumFewOutputs);
  }
}

// dw[o][d] += sum_r g[r][o] row[r][d], dw with rows of `stride` >= D, a multiple of the vector
template <typename T, int64_t R>
TORCHINTRO_INLINE void add_weight_gradient(
    const FewOutputs& a, const Rows<T>& rows, const Accumulator<T>* g, Accumulator<T>* dw, int64_t stride) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  for (int64_t d = 0; d < a.in_features; d += L) {
    Vector<A> x[R];
    for (int64_t r = 0; r < R; ++r) {
      x[r] = d + L <= a.in_features ? Memory<T>::load(rows.row[r] + d)
                                    : load_first<T>(rows.row[r] + d, a.in_features - d, rows.end);
    }
    for (int64_t o = 0; o < a.out_features; ++o) {
      A* to = dw + o * stride + d;
      Vector<A> sum = x[0] * g[o]; // the group's own sum first: a shorter chain of roundings
      for (int64_t r = 1; r < R; ++r) {
        sum += x[r] * g[r * kMaximumFewOutputs + o];
      }
      Memory<A>::store(to, Memory<A>::load(to) + sum);
    }
  }
}

// dx[r][d] = input_scale * sum_o g[r][o] w[o][d]
template <typename T, int64_t R>
TORCHINTRO_INLINE void write_input_gradient(const FewOutputs& a, const Accumulator<T>* g, T* dx) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  const A* w = static_cast<const A*>(a.linear_weight);
  const A* w_end = w + a.out_features * a.in_features;
  const A scale = static_cast<A>(a.input_scale);
  for (int64_t d = 0; d < a.in_features; d += L) {
    const int64_t count = a.in_features - d < L ? a.in_features - d : L;
    Vector<A> sum[R] = {};
    for (int64_t o = 0; o < a.out_features; ++o) {
      const A* from = w + o * a.in_features + d;
      const Vector<A> weight = count == L ? Memory<A>::load(from) : load_first<A>(from, count, w_end);
      for (int64_t r = 0; r < R; ++r) {
        sum[r] += weight * g[r * kMaximumFewOutputs + o];
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      T* to = dx + r * a.in_features + d;
      if (count == L) {
        Memory<T>::store(to, scale * sum[r]);
      } else {
        store_first<T>(to, scale * sum[r], count);
      }
    }
  }
}

// The residuals of R rows from their predictions: g in place of p, the loss and db added to `partial`, dt written.
template <typename T, typename U, int64_t R>
TORCHINTRO_INLINE void residuals(const FewOutputs& a, int64_t row, Accumulator<T>* p, double* partial) {
  using A = Accumulator<T>;
  const U* target = static_cast<const U*>(a.target.data);
  const U* weight = static_cast<const U*>(a.weight.data);
  const A* bias = static_cast<const A*>(a.linear_bias);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t n = row + r;
    for (int64_t o = 0; o < a.out_features; ++o) {
      const A t = Memory<U>::get(target + n * a.target.row_stride + o * a.target.column_stride);
      const A v = weight ? Memory<U>::get(weight + n * a.weight.row_stride + o * a.weight.column_stride) : A(1);
      const A difference = p[r * kMaximumFewOutputs + o] + (bias ? bias[o] : A(0)) - t;
      const A g = static_cast<A>(a.residual_scale) * (v * difference);
      partial[0] += static_cast<double>(v) * difference * difference;
      partial[1 + o] += g;
      p[r * kMaximumFewOutputs + o] = g;
      if (a.grad_target) {
        Memory<U>::set(static_cast<U*>(a.grad_target) + n * a.out_features + o, static_cast<A>(a.target_scale) * g);
      }
    }
  }
}

// R rows from `row` on, which lie in `rows`.
template <typename T, typename U, int64_t R>
TORCHINTRO_INLINE void group(
    const FewOutputs& a, const Rows<T>& rows, int64_t row, Accumulator<T>* dw, int64_t dw_stride, double* partial) {
  Accumulator<T> g[R * kMaximumFewOutputs];
  predict<T, R>(a, rows, g);
  residuals<T, U, R>(a, row, g, partial);
  if (a.wants_weight_gradient) {
    add_weight_gradient<T, R>(a, rows, g, dw, dw_stride);
  }
  if (a.grad_input) {
    write_input_gradient<T, R>(a, g, static_cast<T*>(a.grad_input) + row * a.in_features);
  }
}

template <typename T, typename U>
TORCHINTRO_TARGET void few_outputs(
    const FewOutputs& a, int64_t row_begin, int64_t row_end, double* partial, void* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  const T* input = static_cast<const T*>(a.input.data);
  const bool strided = a.input.column_stride != 1 && a.in_features > 1;
  const int64_t dw_stride = (a.in_features + L - 1) / L * L;
  const int64_t dw_size = a.wants_weight_gradient ? a.out_features * dw_stride : 0;
  const int64_t partial_size = 1 + a.out_features + (a.wants_weight_gradient ? a.out_features * a.in_features : 0);
  for (int64_t i = 0; i < partial_size; ++i) {
    partial[i] = 0;
  }

  A* dw = static_cast<A*>(scratch);
  T* packed = reinterpret_cast<T*>(dw + dw_size); // a group of rows that are not contiguous
  const T* end =
      strided ? packed + kGroupRows * a.in_features : input + (row_end - 1) * a.input.row_stride + a.in_features;

  for (int64_t run = row_begin; run < row_end; run += kRunRows) {
    const int64_t run_end = run + kRunRows < row_end ? run + kRunRows : row_end;
    for (int64_t i = 0; i < dw_size; ++i) {
      dw[i] = 0;
    }
    for (int64_t row = run; row < run_end;) {
      const int64_t count = run_end - row >= kGroupRows ? kGroupRows : 1;
      Rows<T> rows;
      rows.end = end;
      for (int64_t r = 0; r < count; ++r) {
        const T* from = input + (row + r) * a.input.row_stride;
        if (strided) {
          for (int64_t d = 0; d < a.in_features; ++d) {
            packed[r * a.in_features + d] = from[d * a.input.column_stride];
          }
          from = packed + r * a.in_features;
        }
        rows.row[r] = from;
      }
      if (count == kGroupRows) {
        group<T, U, kGroupRows>(a, rows, row, dw, dw_stride, partial);
      } else {
        group<T, U, 1>(a, rows, row, dw, dw_stride, partial);
      }
      row += count;
    }
    double* sums = partial + 1 + a.out_features;
    for (int64_t o = 0; dw_size > 0 && o < a.out_features; ++o) {
      for (int64_t d = 0; d < a.in_features; ++d) {
        sums[o * a.in_features + d] += dw[o * dw_stride + d];
      }
    }
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
