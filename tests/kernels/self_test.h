// Faults put in on purpose, each in a process of its own, which must not come to a good end: a check that cannot fail checks
// nothing.
#pragma once

#include "memory.h"

#include <sys/wait.h>
#include <unistd.h>
#include <cstdio>

namespace torchintro::fuzz {

class SelfTest {
 public:
  template <typename Faulty>
  void must_notice(const std::string& fault, const Faulty& faulty) {
    ++faults_;
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      if (std::freopen("/dev/null", "w", stderr) == nullptr) { // the sanitizer's report
        _exit(0);
      }
      try {
        faulty();
      } catch (const Failure&) {
        _exit(1);
      }
      std::exit(0); // ThreadSanitizer puts its own status there
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status == 0) {
      std::printf("self-test: nobody noticed %s\n", fault.c_str());
      ++unnoticed_;
    }
  }

  int result() const {
    if (unnoticed_ == 0) {
      std::printf("self-test: all of %d faults put in were noticed\n", faults_);
    }
    return unnoticed_ == 0 ? 0 : 1;
  }

 private:
  int faults_ = 0;
  int unnoticed_ = 0;
};

} // namespace torchintro::fuzz
