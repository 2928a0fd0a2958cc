// Narrow inputs: panels by columns, so that a vector holds one feature of several rows. Included after panel_impl.h.
//
//   xt[d][r] the panel, p[o][r] its predictions or g; r counts the panel's rows, in vectors; columns are
//   kNarrowPanelRows apart.
//
// A row shorter than a vector would leave lanes empty and need a sum over lanes for every product; here every lane works,
// and the only sum over lanes is the one at the end of a run. Operations per panel: 2 r D O for each of p, dw and dx.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

// Vectors of a register tile along the rows, and outputs: 16 accumulators of the 32 registers, 8 of 16.
constexpr int64_t kNarrowTileRows = TORCHINTRO_VECTOR_BYTES >= 64 ? 4 : 2;
constexpr int64_t kNarrowTileOutputs = 4;

template <typename A, int64_t Q>
TORCHINTRO_INLINE void narrow_predict_tile(
    const A* xt, const A* w, const A* bias, int64_t features, int64_t rows, A* p) {
  constexpr int64_t L = kLanes<A>, R = kNarrowTileRows;
  for (int64_t row = 0; row < rows; row += R * L) {
    Vector<A> sum[Q][R];
    for (int64_t q = 0; q < Q; ++q) {
      for (int64_t r = 0; r < R; ++r) {
        sum[q][r] = Vector<A>{} + (bias ? bias[q] : A(0));
      }
    }
    for (int64_t d = 0; d < features; ++d) {
      Vector<A> x[R];
      for (int64_t r = 0; r < R; ++r) {
        x[r] = Memory<A>::load(xt + d * kNarrowPanelRows + row + r * L);
      }
      for (int64_t q = 0; q < Q; ++q) {
        for (int64_t r = 0; r < R; ++r) {
          sum[q][r] += x[r] * w[q * features + d];
        }
      }
    }
    for (int64_t q = 0; q < Q; ++q) {
      for (int64_t r = 0; r < R; ++r) {
        Memory<A>::store(p + q * kNarrowPanelRows + row + r * L, sum[q][r]);
      }
    }
  }
}

// p[o][r] = b[o] + sum_d w[o][d] xt[d][r], the bias first: it costs no rounding of its own
template <typename A>
TORCHINTRO_FUNCTION void narrow_predict(
    const A* xt, const A* w, const A* bias, int64_t features, int64_t outputs, int64_t rows, A* p) {
  constexpr int64_t Q = kNarrowTileOutputs;
  int64_t o = 0;
  for (; o + Q <= outputs; o += Q) {
    narrow_predict_tile<A, Q>(
        xt, w + o * features, bias ? bias + o : nullptr, features, rows, p + o * kNarrowPanelRows);
  }
  for (; o < outputs; ++o) {
    narrow_predict_tile<A, 1>(
        xt, w + o * features, bias ? bias + o : nullptr, features, rows, p + o * kNarrowPanelRows);
  }
}

template <typename A, int64_t Q, int64_t C>
TORCHINTRO_INLINE void narrow_gradient_tile(
    const A* xt, const A* g, int64_t features, int64_t rows, bool fresh, A* dw) {
  constexpr int64_t L = kLanes<A>;
  Vector<A> sum[Q][C] = {}; // the panel's own sum first: a shorter chain of roundings
  for (int64_t row = 0; row < rows; row += L) {
    Vector<A> x[C];
    for (int64_t c = 0; c < C; ++c) {
      x[c] = Memory<A>::load(xt + c * kNarrowPanelRows + row);
    }
    for (int64_t q = 0; q < Q; ++q) {
      const Vector<A> residual = Memory<A>::load(g + q * kNarrowPanelRows + row);
      for (int64_t c = 0; c < C; ++c) {
        sum[q][c] += residual * x[c];
      }
    }
  }
  for (int64_t q = 0; q < Q; ++q) {
    for (int64_t c = 0; c < C; ++c) {
      A* to = dw + (q * features + c) * L;
      Memory<A>::store(to, fresh ? sum[q][c] : Memory<A>::load(to) + sum[q][c]);
    }
  }
}

template <typename A, int64_t Q>
TORCHINTRO_INLINE void narrow_gradient_rows(
    const A* xt, const A* g, int64_t features, int64_t rows, bool fresh, A* dw) {
  constexpr int64_t L = kLanes<A>, C = TORCHINTRO_VECTOR_BYTES >= 64 ? 4 : 2;
  int64_t d = 0;
  for (; d + C <= features; d += C) {
    narrow_gradient_tile<A, Q, C>(xt + d * kNarrowPanelRows, g, features, rows, fresh, dw + d * L);
  }
  for (; d < features; ++d) {
    narrow_gradient_tile<A, Q, 1>(xt + d * kNarrowPanelRows, g, features, rows, fresh, dw + d * L);
  }
}

// dw[o][d] (a vector each) (+)= g[o][r] xt[d][r], over the vectors r; overwritten if `fresh`
template <typename A>
TORCHINTRO_FUNCTION void narrow_weight_gradient(
    const A* xt, const A* g, int64_t features, int64_t outputs, int64_t rows, bool fresh, A* dw) {
  constexpr int64_t L = kLanes<A>, Q = kNarrowTileOutputs;
  int64_t o = 0;
  for (; o + Q <= outputs; o += Q) {
    narrow_gradient_rows<A, Q>(xt, g + o * kNarrowPanelRows, features, rows, fresh, dw + o * features * L);
  }
  for (; o < outputs; ++o) {
    narrow_gradient_rows<A, 1>(xt, g + o * kNarrowPanelRows, features, rows, fresh, dw + o * features * L);
  }
}

// dxt[d][r] = sum_o w[o][d] g[o][r]
template <typename A>
TORCHINTRO_FUNCTION void narrow_input_gradient(
    const A* g, const A* w, int64_t features, int64_t outputs, int64_t rows, A* dxt) {
  constexpr int64_t L = kLanes<A>, R = kNarrowTileRows;
  for (int64_t row = 0; row < rows; row += R * L) {
    for (int64_t d = 0; d < features; ++d) {
      Vector<A> sum[R] = {};
      for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t r = 0; r < R; ++r) {
          sum[r] += Memory<A>::load(g + o * kNarrowPanelRows + row + r * L) * w[o * features + d];
        }
      }
      for (int64_t r = 0; r < R; ++r) {
        Memory<A>::store(dxt + d * kNarrowPanelRows + row + r * L, sum[r]);
      }
    }
  }
}

// sums[o][d] (+)= the lanes of dw[o][d]; overwritten if `fresh`
template <typename A>
TORCHINTRO_FUNCTION void narrow_flush(const A* dw, int64_t size, bool fresh, double* sums) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t i = 0; i < size; ++i) {
    double sum = fresh ? 0.0 : sums[i];
    for (int64_t lane = 0; lane < L; ++lane) {
      sum += dw[i * L + lane];
    }
    sums[i] = sum;
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
