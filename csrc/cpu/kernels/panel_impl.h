// Panels: the rows that a kernel works on at a time, brought into the layout it wants. Included after simd.h.
//
// By columns: element (row, column) at [column * stride + row], a vector holds one column of as many rows as it has lanes.
// By rows: pointers to rows that are contiguous and of the accumulator's type.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

template <typename T, int64_t W>
TORCHINTRO_INLINE typename Piece<T, W>::type load_piece(const T* from) {
  return *reinterpret_cast<const typename Piece<T, W>::unaligned*>(from);
}

template <typename T, int64_t W, int... J>
TORCHINTRO_INLINE auto join(
    typename Piece<T, W>::type a, typename Piece<T, W>::type b, std::integer_sequence<int, J...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, J...);
#else
  return typename Piece<T, 2 * W>::type{(J < W ? a[J % W] : b[J % W])...};
#endif
}

// One vector of the W values at each of lanes / W addresses, `distance` apart.
template <typename T, int64_t W>
TORCHINTRO_INLINE typename Piece<T, kLanes<Accumulator<T>>>::type load_pieces(const T* from, int64_t distance) {
  constexpr int64_t L = kLanes<Accumulator<T>>;
  if constexpr (W == L) {
    return load_piece<T, W>(from);
  } else if constexpr (2 * W == L) {
    using Lanes = std::make_integer_sequence<int, static_cast<int>(L)>;
    return join<T, W>(load_piece<T, W>(from), load_piece<T, W>(from + distance), Lanes{});
  } else {
    using Half = std::make_integer_sequence<int, static_cast<int>(2 * W)>;
    using Lanes = std::make_integer_sequence<int, static_cast<int>(L)>;
    const auto first = join<T, W>(load_piece<T, W>(from), load_piece<T, W>(from + distance), Half{});
    const auto second =
        join<T, W>(load_piece<T, W>(from + 2 * distance), load_piece<T, W>(from + 3 * distance), Half{});
    return join<T, 2 * W>(first, second, Lanes{});
  }
}

template <typename T>
TORCHINTRO_INLINE Vector<Accumulator<T>> widened(typename Piece<T, kLanes<Accumulator<T>>>::type stored) {
  if constexpr (sizeof(T) == 2) {
    return widen((Half16)stored, T{});
  } else {
    return (Vector<T>)stored;
  }
}

// Asks for rows to come while others are worked on, evenly: the memory would else be idle while the registers are busy, and
// the registers while it is not. Four pages at a time, a line of each at every step, since the processor's own prefetching,
// which runs ahead of what it sees, ends with a page. The address of a page must be translated before anything of it can
// come, which takes as long as the line itself (longer in a virtual machine), and the processor translates several at once
// if it is asked to: one line of each of four pages, well before their turn.
// Two cores of an Intel Xeon with AMX, a virtual machine with pages of 4 KiB, against asking for one line after the other:
// 1M x 64 -> 1 13.5 -> 10.0 ms, 1M x 16 -> 1 2.6 -> 1.8 ms, 65536 x 1024 -> 4 14.7 -> 11.0 ms; reading alone 9.2, 1.5, 9.4.
struct Ahead {
  static constexpr int64_t kLine = 64, kPage = 4096, kPages = 4, kTranslated = 8; // pages before their turn
  static constexpr int64_t kMostSteps = 8; // that one of them stands for
  const char* next; // in the first page
  int64_t page; // from one page to the next
  int64_t pace; // bytes of each page for a step that asks
  int64_t mask; // the steps that ask: those whose numbers have none of these bits

  // Always the same line, which costs little.
  TORCHINTRO_INLINE Ahead idle(const void* somewhere) {
    return {static_cast<const char*>(somewhere), 0, 0, kMostSteps - 1};
  }

  // From `at` on, `bytes` in so many steps, which are numbered in rounds of `round`. The pages are counted by fours from the
  // one of `origin`.
  TORCHINTRO_INLINE Ahead from(const char* origin, const char* at, int64_t bytes, int64_t steps, int64_t round) {
    origin -= reinterpret_cast<uintptr_t>(origin) % kPage;
    const int64_t done = at - origin, four = kPage * kPages, offset = done % four / kPages;
    const int64_t pace = bytes / kPages / (steps + 1) + 1;
    int64_t each = 1; // a step that asks stands for so many
    while (each < kMostSteps && 2 * each <= round && 2 * each * pace <= kLine) {
      each *= 2;
    }
    return {origin + done / four * four + offset, kPage, each * pace, each - 1};
  }

  // Returns `next` as it is afterwards, which a tile keeps in a register.
  template <int64_t kLines>
  TORCHINTRO_INLINE const char* step(const Ahead& ahead, const char* next, int64_t number) {
    if (kLines == 1 && (number & ahead.mask) != 0) {
      return next;
    }
    for (int64_t line = 0; line < kLines; ++line) {
      for (int64_t page = 0; page < kPages; ++page) {
        __builtin_prefetch(next + page * ahead.page + line * kLine, 0, 2);
      }
    }
    const char* moved = next + ahead.pace;
    if (((reinterpret_cast<uintptr_t>(moved) ^ reinterpret_cast<uintptr_t>(next)) & kPage) != 0) { // a page's end
      moved += (kPages - 1) * kPage;
      for (int64_t page = kTranslated; page < kTranslated + kPages; ++page) {
        __builtin_prefetch(moved + page * kPage, 0, 2);
      }
    }
    return moved;
  }
};

// As many rows as a vector has lanes, W of their columns, of which `columns` are wanted; whole pieces of W are read.
template <typename T, int64_t W>
TORCHINTRO_INLINE void transpose_rows(
    const T* from, int64_t row_stride, int64_t columns, Accumulator<T>* to, int64_t to_stride) {
  using A = Accumulator<T>;
  Vector<A> v[W];
  for (int64_t i = 0; i < W; ++i) {
    v[i] = widened<T>(load_pieces<T, W>(from + i * row_stride, W * row_stride));
  }
  transpose<A, W>(v);
  for (int64_t c = 0; c < W; ++c) {
    if (c < columns) {
      Memory<A>::store(to + c * to_stride, v[c]);
    }
  }
}

// The widest and the narrowest piece of a row that is worth transposing by itself.
template <typename A>
constexpr int64_t kWide = kLanes<A>;
template <typename A>
constexpr int64_t kNarrow = kLanes<A> >= 16 ? kLanes<A> / 4
    : kLanes<A> >= 8                        ? kLanes<A> / 2
                                            : kLanes<A>;

template <typename T>
TORCHINTRO_INLINE void transpose_rows(
    const T* from, int64_t row_stride, int64_t columns, Accumulator<T>* to, int64_t to_stride) {
  using A = Accumulator<T>;
  constexpr int64_t half = kWide<A> / 2 > kNarrow<A> ? kWide<A> / 2 : kNarrow<A>;
  if (columns <= kNarrow<A>) {
    transpose_rows<T, kNarrow<A>>(from, row_stride, columns, to, to_stride);
  } else if (columns <= half) {
    transpose_rows<T, half>(from, row_stride, columns, to, to_stride);
  } else {
    transpose_rows<T, kWide<A>>(from, row_stride, columns, to, to_stride);
  }
}

// A panel by columns from a matrix of any strides: rows [0, rows) of `from`, zeros in those up to `padded_rows`, a multiple
// of the vector. Nothing is read from `end` on, the place behind the last element that may be read. `ahead`, where given,
// goes along.
template <typename T>
TORCHINTRO_FUNCTION void load_by_columns(
    const T* from,
    int64_t row_stride,
    int64_t column_stride,
    const T* end,
    int64_t rows,
    int64_t padded_rows,
    int64_t columns,
    Accumulator<T>* to,
    int64_t to_stride,
    Ahead* ahead = nullptr) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  int64_t row = 0;
  if (row_stride == 1) { // each column contiguous
    for (; row + L <= rows; row += L) {
      for (int64_t c = 0; c < columns; ++c) {
        Memory<A>::store(to + c * to_stride + row, Memory<T>::load(from + row + c * column_stride));
      }
    }
  } else if (column_stride == 1 && row_stride > 0) {
    for (; row + L <= rows; row += L) {
      const T* first = from + row * row_stride;
      if (end - first < (L - 1) * row_stride + (columns + L - 1) / L * L) {
        break; // the pieces of the last row would reach too far
      }
      for (int64_t column = 0; ahead && column < columns; column += Ahead::kPages) {
        ahead->next = Ahead::step<1>(*ahead, ahead->next, column / Ahead::kPages);
      }
      for (int64_t c = 0; c < columns; c += L) {
        transpose_rows<T>(first + c, row_stride, columns - c, to + c * to_stride + row, to_stride);
      }
    }
  }
  for (; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      to[c * to_stride + row] = Memory<T>::get(from + row * row_stride + c * column_stride);
    }
  }
  for (; row < padded_rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      to[c * to_stride + row] = 0;
    }
  }
}

// scale * panel, from by columns to contiguous rows of `columns` elements.
template <typename T>
TORCHINTRO_FUNCTION void store_by_rows(
    const Accumulator<T>* from, int64_t from_stride, int64_t rows, int64_t columns, Accumulator<T> scale, T* to) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  if (columns == 1) {
    int64_t row = 0;
    for (; row + L <= rows; row += L) {
      Memory<T>::store(to + row, scale * Memory<A>::load(from + row));
    }
    if (row < rows) {
      store_first<T>(to + row, scale * Memory<A>::load(from + row), rows - row);
    }
    return;
  }
  for (int64_t row = 0; row < rows; row += L) {
    const int64_t count = rows - row < L ? rows - row : L;
    for (int64_t c = 0; c < columns; c += L) {
      const int64_t width = columns - c < L ? columns - c : L;
      Vector<A> v[L];
      for (int64_t i = 0; i < L; ++i) {
        v[i] = i < width ? scale * Memory<A>::load(from + (c + i) * from_stride + row) : Vector<A>{};
      }
      transpose<A, L>(v);
      for (int64_t i = 0; i < L; ++i) {
        if (i < count && width == L) {
          Memory<T>::store(to + (row + i) * columns + c, v[i]);
        } else if (i < count) {
          store_first<T>(to + (row + i) * columns + c, v[i], width);
        }
      }
    }
  }
}

// One row of any column stride as contiguous accumulators.
template <typename T>
TORCHINTRO_INLINE void load_row(const T* from, int64_t column_stride, int64_t columns, Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  if (column_stride == 1 && columns >= L) {
    for (int64_t c = 0; c + L <= columns; c += L) {
      Memory<A>::store(to + c, Memory<T>::load(from + c));
    }
    Memory<A>::store(to + columns - L, Memory<T>::load(from + columns - L));
  } else {
    for (int64_t c = 0; c < columns; ++c) {
      to[c] = Memory<T>::get(from + c * column_stride);
    }
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
