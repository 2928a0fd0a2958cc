// Threads that end with the call that starts them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace torchintro::cpu {

// What a block loop of milliseconds runs on beside other work, such as reading the next piece of a table. ATen's threads
// (OpenMP's) stay awake for milliseconds afterwards, on the cores that the other work needs: the pass over a table took a third
// longer with them. Starting a thread takes some ten microseconds. Each thread takes small shares until none is left, so that
// one that has half a core delays nothing. As many as ATen would take; the results are those of any number.
struct OwnThreads {
  template <typename Run>
  void operator()(int64_t begin, int64_t end, int64_t grain, const Run& run) const {
    const int64_t most = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t count = std::min(most, (end - begin) / std::max<int64_t>(grain, 1));
    if (count <= 1) {
      return run(begin, end);
    }
    const int64_t share = std::max(grain, (end - begin) / (kShares * count));
    std::atomic<int64_t> next{begin};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    const auto work = [&] {
      try {
        for (int64_t at = next.fetch_add(share); at < end; at = next.fetch_add(share)) {
          run(at, std::min(end, at + share));
        }
      } catch (...) {
        if (!failed.exchange(true)) {
          error = std::current_exception();
        }
      }
    };
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(count - 1));
    try {
      for (int64_t i = 1; i < count; ++i) {
        threads.emplace_back(work);
      }
    } catch (const std::system_error&) { // no more threads to be had: those that there are do it
    }
    work();
    for (auto& thread : threads) {
      thread.join();
    }
    if (error) {
      std::rethrow_exception(error);
    }
  }

 private:
  static constexpr int64_t kShares = 8; // of each thread
};

} // namespace torchintro::cpu
