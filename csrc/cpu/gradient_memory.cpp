#include "cpu/gradient_memory.h"

#include "problem.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace torchintro::cpu {
namespace {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

// Below, malloc keeps what is freed by itself (its threshold grows up to 32 MB with what it is asked for), and asks the system
// for nothing: a step of 1 x 4096 -> 1024, whose weight gradient has 16 MB, takes 0.78 ms so and 0.99 ms with blocks of ours.
constexpr size_t kLarge = size_t{32} << 20;
constexpr size_t kHugePage = size_t{2} << 20;
// A step has two large gradients at the most: the input's and the target's.
constexpr size_t kKeptBlocks = 2;

struct Block {
  void* memory = nullptr;
  size_t bytes = 0;
};

// TORCHINTRO_KEEP_MEMORY=0 gives everything back at once.
bool keeps_memory() {
  static const bool keeps = [] {
    const char* wanted = std::getenv("TORCHINTRO_KEEP_MEMORY");
    return wanted == nullptr || std::strcmp(wanted, "0") != 0;
  }();
  return keeps;
}

class KeptBlocks {
 public:
  // The smallest kept block that is large enough and not a third too large.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Block* best = nullptr;
    for (auto& block : blocks_) {
      if (block.bytes >= bytes && block.bytes / 4 <= bytes / 3 && (best == nullptr || block.bytes < best->bytes)) {
        best = &block;
      }
    }
    return best == nullptr ? Block{} : std::exchange(*best, Block{});
  }

  void lock() {
    mutex_.lock();
  }
  void unlock() {
    mutex_.unlock();
  }

  void keep(Block block) {
    if (keeps_memory()) {
      madvise(block.memory, block.bytes, MADV_FREE);
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto is_free = [](const Block& kept) { return kept.memory == nullptr; };
      auto* place = std::find_if(blocks_.begin(), blocks_.end(), is_free);
      if (place == blocks_.end()) { // the oldest makes room: sizes that nobody asks for any more go
        place = &blocks_[oldest_];
        oldest_ = (oldest_ + 1) % kKeptBlocks;
      }
      std::swap(block, *place);
    }
    if (block.memory != nullptr) {
      munmap(block.memory, block.bytes);
    }
  }

 private:
  std::mutex mutex_;
  std::array<Block, kKeptBlocks> blocks_;
  size_t oldest_ = 0;
};

// Never destroyed: a gradient may outlive every static object.
KeptBlocks& kept_blocks() {
  static auto* const blocks = [] {
    // A child that is forked while another thread holds the lock would never get it.
    pthread_atfork([] { kept_blocks().lock(); }, [] { kept_blocks().unlock(); }, [] { kept_blocks().unlock(); });
    return new KeptBlocks;
  }();
  return *blocks;
}

Block map_block(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // One huge page more than needed, and what lies before and behind the aligned part given back.
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(
      OutOfMemoryError, mapped != MAP_FAILED, "linear_mse_loss: no memory for a gradient of ", bytes, " bytes");
  const auto begin = reinterpret_cast<uintptr_t>(mapped);
  const auto first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (first > begin) {
    munmap(mapped, first - begin);
  }
  if (first < begin + kHugePage) {
    munmap(reinterpret_cast<void*>(first + bytes), begin + kHugePage - first);
  }
  auto* const memory = reinterpret_cast<void*>(first);
  madvise(memory, bytes, MADV_HUGEPAGE);
  return {memory, bytes};
}

class GradientAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Block block = kept_blocks().take(bytes);
    if (block.memory == nullptr) {
      block = map_block(bytes);
    }
    return {block.memory, new Block(block), give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

 private:
  static void give_back(void* context) {
    auto* const block = static_cast<Block*>(context);
    kept_blocks().keep(*block);
    delete block;
  }
};

at::Tensor large_gradient(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static GradientAllocator allocator;
  return at::detail::empty_generic(
      sizes,
      &allocator,
      c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::typeMetaToScalarType(options.dtype()),
      /*memory_format_opt=*/std::nullopt);
}

bool is_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize() >= kLarge;
}

#else

at::Tensor large_gradient(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return empty_result(sizes, options);
}

bool is_large(at::IntArrayRef /*sizes*/, const at::TensorOptions& /*options*/) {
  return false;
}

#endif

} // namespace

at::Tensor empty_gradient(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return is_large(sizes, options) ? large_gradient(sizes, options) : empty_result(sizes, options);
}

} // namespace torchintro::cpu
