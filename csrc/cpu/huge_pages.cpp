#include "cpu/huge_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchintro::cpu {

void use_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr size_t kLeastBytes = size_t{4} << 20; // one whole huge page at least lies inside
  if (tensor.nbytes() >= kLeastBytes) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const auto begin = (address + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (address + tensor.nbytes()) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // a wish: failure changes nothing
  }
#endif
}

} // namespace torchintro::cpu
