// The residual kernel of the many-outputs regime (see kernels.h), included by each level's file after simd.h.
//
// Per element: p and t (and v) read, g written over p, dt written. A row's squares are added in lanes of the accumulator
// type and go to float64 row by row; the columns' sums of g in float32 over kBiasRows rows, then in float64.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

constexpr int64_t kBiasRows = 64;

template <typename T, typename U>
TORCHINTRO_TARGET void residual(const Residual& a, int64_t row_begin, int64_t row_end, double* partial, void* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t outputs = a.out_features;
  const bool by_vector = a.target.column_stride == 1 || outputs == 1;
  const bool weight_by_vector = a.weight.column_stride == 1;
  const A residual_scale = static_cast<A>(a.residual_scale);
  const A target_scale = static_cast<A>(a.target_scale);
  partial[0] = 0;
  for (int64_t o = 0; o < (a.wants_bias_gradient ? outputs : 0); ++o) {
    partial[1 + o] = 0;
  }
  const int64_t padded = (outputs + L - 1) / L * L;
  A* db = static_cast<A*>(scratch);
  for (int64_t run = row_begin; run < row_end; run += kBiasRows) {
    const int64_t run_end = run + kBiasRows < row_end ? run + kBiasRows : row_end;
    for (int64_t i = 0; i < padded; ++i) {
      db[i] = 0;
    }
    for (int64_t row = run; row < run_end; ++row) {
      T* p = static_cast<T*>(a.prediction) + row * outputs;
      const U* t = static_cast<const U*>(a.target.data) + row * a.target.row_stride;
      const U* v = a.weight.data ? static_cast<const U*>(a.weight.data) + row * a.weight.row_stride : nullptr;
      U* dt = a.grad_target ? static_cast<U*>(a.grad_target) + row * outputs : nullptr;
      Vector<A> squares{};
      for (int64_t o = 0; o < outputs; o += L) {
        const int64_t count = outputs - o < L ? outputs - o : L;
        Vector<A> prediction, target, weight = Vector<A>{} + A(1);
        if (count == L) {
          prediction = Memory<T>::load(p + o);
        } else {
          prediction = load_first<T>(p + o, count);
        }
        if (by_vector) {
          target = count == L ? Memory<U>::load(t + o) : load_first<U>(t + o, count);
        } else {
          target = Vector<A>{};
          for (int64_t i = 0; i < count; ++i) {
            target[i] = Memory<U>::get(t + (o + i) * a.target.column_stride);
          }
        }
        const Vector<A> difference = prediction - target;
        if (v && a.weight.column_stride == 0) {
          const A value = Memory<U>::get(v);
          if (count == L) {
            weight = Vector<A>{} + value;
          } else {
            for (int64_t i = 0; i < count; ++i) { // an infinite weight times the zeros behind the last output is NaN
              weight[i] = value;
            }
          }
        } else if (v && weight_by_vector) {
          weight = count == L ? Memory<U>::load(v + o) : load_first<U>(v + o, count);
        } else if (v) {
          for (int64_t i = 0; i < count; ++i) {
            weight[i] = Memory<U>::get(v + (o + i) * a.weight.column_stride);
          }
        }
        squares += weight * difference * difference;
        const Vector<A> g = residual_scale * (weight * difference);
        if (a.wants_bias_gradient) {
          Memory<A>::store(db + o, Memory<A>::load(db + o) + g);
        }
        if (a.wants_residual) {
          if (count == L) {
            Memory<T>::store(p + o, g);
          } else {
            store_first<T>(p + o, g, count);
          }
        }
        if (dt && count == L) {
          Memory<U>::store(dt + o, target_scale * g);
        } else if (dt) {
          store_first<U>(dt + o, target_scale * g, count);
        }
      }
      partial[0] += sum_lanes<A>(squares);
    }
    for (int64_t o = 0; a.wants_bias_gradient && o < outputs; ++o) {
      partial[1 + o] += db[o];
    }
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
