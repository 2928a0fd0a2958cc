// Adds the blocks' sums up, in block order, and scales them to a gradient. Included after simd.h.
//
// Bytes: 8 per block and element, read once; the gradient, written once.

namespace torchintro::cpu::TORCHINTRO_LEVEL {

// Elements [begin, end) of `to`, T's: scale * sum over the blocks of sums[block * stride + i]
template <typename T>
TORCHINTRO_TARGET void add_up(
    const double* sums, int64_t blocks, int64_t stride, int64_t begin, int64_t end, double scale, void* gradient) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, H = kLanes<double>, Parts = L / H;
  typedef A Part __attribute__((vector_size(H * sizeof(A))));
  T* to = static_cast<T*>(gradient);
  int64_t i = begin;
  for (; i + L <= end; i += L) {
    Vector<double> sum[Parts] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t part = 0; part < Parts; ++part) {
        sum[part] += Memory<double>::load(sums + block * stride + i + part * H);
      }
    }
    Vector<A> all;
    for (int64_t part = 0; part < Parts; ++part) {
      const Part scaled = __builtin_convertvector(sum[part] * scale, Part);
      __builtin_memcpy(reinterpret_cast<char*>(&all) + part * sizeof(Part), &scaled, sizeof(Part));
    }
    Memory<T>::store(to + i, all);
  }
  for (; i < end; ++i) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      sum += sums[block * stride + i];
    }
    Memory<T>::set(to + i, static_cast<A>(sum * scale));
  }
}

} // namespace torchintro::cpu::TORCHINTRO_LEVEL
