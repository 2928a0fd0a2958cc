// Threads that work through an epoch together: as many updates as there are batches, of some microseconds each, which is no
// more than it takes to wake a pool of threads. They stay awake and meet at a barrier instead.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torchintro::fit {

class Barrier {
 public:
  explicit Barrier(int64_t seats)
      : seats_(seats) {}

  // Returns when all seats have been taken; `count` by this call.
  void wait(int64_t count) {
    if (count == seats_) {
      return;
    }
    const int64_t round = round_.load(std::memory_order_acquire);
    if (taken_.fetch_add(count, std::memory_order_acq_rel) + count == seats_) {
      taken_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // Somebody else's thread may need this core to get to the barrier at all.
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int64_t kSpins = 256; // some 10 us

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  int64_t seats_;
  alignas(64) std::atomic<int64_t> taken_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

// What one thread has of a team of `seats`: the seats [begin, end).
struct Member {
  int64_t begin = 0, end = 1, seats = 1;
  Barrier* barrier = nullptr; // null where there is nobody to wait for

  void wait() const {
    if (barrier != nullptr) {
      barrier->wait(end - begin);
    }
  }

  // This member's part of `count` things.
  int64_t first(int64_t count) const {
    return count * begin / seats;
  }
  int64_t last(int64_t count) const {
    return count * end / seats;
  }
};

// Runs work(member) on up to `seats` threads at once. It may not throw where there are several: the others would wait for ever.
// ATen's pool gives each of its threads one piece of the range, all at the same time; where it gives fewer, one has several
// seats.
template <typename Work>
void run_team(int64_t seats, const Work& work) {
  if (seats <= 1 || at::in_parallel_region()) {
    work(Member{});
    return;
  }
  Barrier barrier(seats);
  at::parallel_for(0, seats, 1, [&](int64_t begin, int64_t end) { work(Member{begin, end, seats, &barrier}); });
}

} // namespace torchintro::fit
