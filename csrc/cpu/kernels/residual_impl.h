// The residual kernel of the many-outputs regime (see kernels.h), included by each level's file after simd.h.
//
// Per element: product and target (and weight) read, g written over the product, the target's gradient written; 6 operations
// or so beside 12 to 20 bytes in float32. A row's squares are added in two vectors of the accumulator type and go to float64
// row by row; the columns' sums of g in the accumulator type over kBiasRows rows, then in float64.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

constexpr int64_t kBiasRows = 64;

template <typename T>
TORCHINTRO_INLINE Vector<Accumulator<T>> load_strided(const T* from, int64_t stride, int64_t count) {
  Vector<Accumulator<T>> values{};
  for (int64_t i = 0; i < count; ++i) {
    values[i] = Memory<T>::get(from + i * stride);
  }
  return values;
}

template <typename T, typename U>
struct ResidualRow {
  T* p;
  const U* t;
  const U* v;
  U* dt;
};

template <typename T, typename U, bool Whole>
TORCHINTRO_INLINE void residual_vector(
    const Residual& a,
    const ResidualRow<T, U>& row,
    int64_t o,
    int64_t count,
    Accumulator<T>* db,
    Vector<Accumulator<T>>& squares) {
  using A = Accumulator<T>;
  Vector<A> difference = Whole ? Memory<T>::load(row.p + o) : load_first<T>(row.p + o, count);
  if (a.linear_bias) {
    const A* bias = static_cast<const A*>(a.linear_bias);
    difference += Whole ? Memory<A>::load(bias + o) : load_first<A>(bias + o, count);
  }
  if (a.target.column_stride == 1) {
    difference -= Whole ? Memory<U>::load(row.t + o) : load_first<U>(row.t + o, count);
  } else {
    difference -= load_strided<U>(row.t + o * a.target.column_stride, a.target.column_stride, count);
  }
  Vector<A> weighted = difference;
  if (row.v) {
    Vector<A> weight{};
    if (a.weight.column_stride == 0) {
      const A value = Memory<U>::get(row.v);
      if (Whole) {
        weight = Vector<A>{} + value;
      } else {
        for (int64_t i = 0; i < count; ++i) { // an infinite weight times the zeros behind the last output is NaN
          weight[i] = value;
        }
      }
    } else if (a.weight.column_stride == 1) {
      weight = Whole ? Memory<U>::load(row.v + o) : load_first<U>(row.v + o, count);
    } else {
      weight = load_strided<U>(row.v + o * a.weight.column_stride, a.weight.column_stride, count);
    }
    weighted *= weight;
  }
  squares += weighted * difference;
  const Vector<A> g = static_cast<A>(a.residual_scale) * weighted;
  if (a.wants_bias_gradient) {
    Memory<A>::store(db + o, Memory<A>::load(db + o) + g);
  }
  if (a.wants_residual) {
    if (Whole) {
      Memory<T>::store(row.p + o, g);
    } else {
      store_first<T>(row.p + o, g, count);
    }
  }
  if (row.dt) {
    const Vector<A> dt = static_cast<A>(a.target_scale) * g;
    if (Whole) {
      Memory<U>::store(row.dt + o, dt);
    } else {
      store_first<U>(row.dt + o, dt, count);
    }
  }
}

template <typename T, typename U>
TORCHINTRO_TARGET void residual(
    const Residual& call, int64_t row_begin, int64_t row_end, double* partial, void* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  const Residual a = call; // a copy of its own, which no store can change: it stays in registers
  const int64_t outputs = a.outputs;
  partial[0] = 0;
  for (int64_t o = 0; o < (a.wants_bias_gradient ? outputs : 0); ++o) {
    partial[1 + o] = 0;
  }
  const int64_t padded = a.wants_bias_gradient ? (outputs + L - 1) / L * L : 0;
  A* db = static_cast<A*>(scratch);
  ResidualRow<T, U> row{};
  for (int64_t run = row_begin; run < row_end; run += kBiasRows) {
    const int64_t run_end = run + kBiasRows < row_end ? run + kBiasRows : row_end;
    for (int64_t i = 0; i < padded; ++i) {
      db[i] = 0;
    }
    for (int64_t n = run; n < run_end; ++n) {
      row.p = static_cast<T*>(a.product) + n * outputs;
      row.t = static_cast<const U*>(a.target.data) + n * a.target.row_stride;
      row.v = a.weight.data ? static_cast<const U*>(a.weight.data) + n * a.weight.row_stride : nullptr;
      row.dt = a.grad_target ? static_cast<U*>(a.grad_target) + n * a.grad_target_row_stride : nullptr;
      Vector<A> squares{}, more_squares{};
      int64_t o = 0;
      for (; o + 2 * L <= outputs; o += 2 * L) {
        residual_vector<T, U, true>(a, row, o, L, db, squares);
        residual_vector<T, U, true>(a, row, o + L, L, db, more_squares);
      }
      if (o + L <= outputs) {
        residual_vector<T, U, true>(a, row, o, L, db, squares);
        o += L;
      }
      if (o < outputs) {
        residual_vector<T, U, false>(a, row, o, outputs - o, db, more_squares);
      }
      partial[0] += sum_lanes<A>(squares + more_squares);
    }
    for (int64_t o = 0; o < (a.wants_bias_gradient ? outputs : 0); ++o) {
      partial[1 + o] += db[o];
    }
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
