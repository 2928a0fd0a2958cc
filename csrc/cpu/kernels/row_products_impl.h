// Products of a few rows with a matrix that stays in the caches: included after simd.h.
//
//   to[m][d] = sum_j from[m][j] matrix[j][d]
//
// Operations: 2 M J D. Bytes: the matrix once for every four rows.
namespace torchintro::cpu::TORCHINTRO_LEVEL {

template <int64_t M, int64_t V>
TORCHINTRO_INLINE void row_products_tile(const RowProducts& a, int64_t m, int64_t d, int64_t last) {
  constexpr int64_t L = kLanes<double>;
  Vector<double> sum[M][V] = {};
  for (int64_t j = 0; j < a.inner; ++j) {
    const double* row = a.matrix + j * a.columns + d;
    Vector<double> value[V];
    for (int64_t v = 0; v < V; ++v) {
      value[v] = v + 1 < V || last == L ? Memory<double>::load(row + v * L) : load_first<double>(row + v * L, last);
    }
    for (int64_t i = 0; i < M; ++i) {
      const double factor = a.from[(m + i) * a.inner + j];
      for (int64_t v = 0; v < V; ++v) {
        sum[i][v] += value[v] * factor;
      }
    }
  }
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t v = 0; v < V; ++v) {
      double* to = a.to + (m + i) * a.columns + d + v * L;
      if (v + 1 < V || last == L) {
        Memory<double>::store(to, sum[i][v]);
      } else {
        store_first<double>(to, sum[i][v], last);
      }
    }
  }
}

template <int64_t M>
TORCHINTRO_INLINE void row_products_rows(const RowProducts& a, int64_t m, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<double>;
  int64_t d = begin;
  for (; d + 4 * L <= end; d += 4 * L) {
    row_products_tile<M, 4>(a, m, d, L);
  }
  for (; d + L <= end; d += L) {
    row_products_tile<M, 1>(a, m, d, L);
  }
  if (d < end) {
    row_products_tile<M, 1>(a, m, d, end - d);
  }
}

TORCHINTRO_TARGET void row_products(const RowProducts& a, int64_t column_begin, int64_t column_end) {
  int64_t m = 0;
  for (; m + 4 <= a.rows; m += 4) {
    row_products_rows<4>(a, m, column_begin, column_end);
  }
  for (; m < a.rows; ++m) {
    row_products_rows<1>(a, m, column_begin, column_end);
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
