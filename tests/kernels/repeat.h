// How to repeat a fuzzer's round, told also when a sanitizer, or the processor, ends the program in the middle of it.
#pragma once

#include <unistd.h>
#include <cinttypes>
#include <csignal>
#include <cstdio>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace torchintro::fuzz {

// What to print when a sanitizer, or the processor, ends the program.
inline char current[100] = "";

inline void print_current() {
  if (::write(STDERR_FILENO, current, std::strlen(current)) < 0) {
    _exit(1);
  }
}
[[maybe_unused]] inline void end_after_fault(int) {
  print_current();
  _exit(1);
}
inline void tell_what_ran() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(print_current);
#else
  std::signal(SIGSEGV, end_after_fault);
  std::signal(SIGBUS, end_after_fault);
  std::signal(SIGILL, end_after_fault);
#endif
}

inline void begin_round(const char* program, uint64_t seed, int64_t round) {
  std::snprintf(
      current,
      sizeof current,
      "To repeat it: %s --seed %" PRIu64 " --first %" PRId64 " --rounds 1\n",
      program,
      seed,
      round);
}

} // namespace torchintro::fuzz
