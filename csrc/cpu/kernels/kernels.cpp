#include "cpu/kernels/kernels.h"

namespace torchintro::cpu {

namespace baseline {
Kernels find(DType input, DType target);
}
#if defined(__x86_64__)
namespace avx2 {
Kernels find(DType input, DType target);
}
namespace avx512 {
Kernels find(DType input, DType target);
}
#endif

Kernels find_kernels(DType input, DType target, Level level) {
#if defined(__x86_64__)
  switch (level) {
    case Level::Avx512:
      return avx512::find(input, target);
    case Level::Avx2:
      return avx2::find(input, target);
    case Level::Baseline:
      break;
  }
#endif
  return baseline::find(input, target);
}

} // namespace torchintro::cpu
