// Fibers: stacks that one thread changes between. AddressSanitizer is told of every change.
#pragma once

#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
// Pushes the registers that a callee keeps, swaps the stack pointers, pops. swapcontext would change the signal mask
// as well: two system calls.
extern "C" void torchintro_emulation_switch(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace torchintro::emulation {

class Fiber {
 public:
  Fiber() { // of the thread that runs
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size_);
    pthread_attr_destroy(&attributes);
    bottom_ = static_cast<unsigned char*>(bottom);
  }
  Fiber(unsigned char* bottom, size_t size)
      : bottom_(bottom), size_(size) {}

  // The next change to this fiber calls entry(), which does not return.
  void start_at(void (*entry)()) {
#if defined(__x86_64__)
    auto** top = reinterpret_cast<void**>(bottom_ + size_);
    *--top = nullptr; // entry's return address
    *--top = reinterpret_cast<void*>(entry);
    for (int registers = 0; registers < 6; ++registers) {
      *--top = nullptr;
    }
    stack_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  void change_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size_);
#endif
#if defined(__x86_64__)
    torchintro_emulation_switch(&stack_, other.stack_);
#else
    swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }
  // What entry() calls first.
  static void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  }

 private:
  unsigned char* bottom_;
  size_t size_;
  void* fake_stack_ = nullptr;
#if defined(__x86_64__)
  void* stack_ = nullptr;
#else
  ucontext_t context_{};
#endif
};

// Memory for `count` stacks, each above a page that may not be touched.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 * 1024;
  static constexpr size_t kGuard = 4096;

  explicit Stacks(size_t count)
      : bytes_(count * kBytes) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    base_ = static_cast<unsigned char*>(memory);
    for (size_t i = 0; i < count; ++i) {
      mprotect(base_ + i * kBytes, kGuard, PROT_NONE);
    }
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  Fiber fiber(size_t i) const {
    return {base_ + i * kBytes + kGuard, kBytes - kGuard};
  }
  bool holds(const void* address) const {
    return static_cast<size_t>(static_cast<const unsigned char*>(address) - base_) < bytes_;
  }

 private:
  unsigned char* base_ = nullptr;
  size_t bytes_;
};

} // namespace torchintro::emulation
