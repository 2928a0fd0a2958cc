// The CUDA kernels on random problems, on the processor (emulation/machine.h), against plain loops in double precision. Meant
// for AddressSanitizer and UndefinedBehaviorSanitizer, and for the search for races (emulation/races.h) (`make sanitize`);
// without them it checks the values, the guards, the barriers, and that the order of blocks and threads changes no bit.
//
//   cuda_fuzz [--seed S] [--rounds R] [--first F]   rounds F .. F + R - 1 of seed S; a failure says how to repeat it alone
#include "emulation/problems.h"
#include "emulation/races.h"
#include "self_test.h"

#include <cinttypes>
#include <csignal>
#include <cstdio>

namespace torchintro::fuzz {
namespace {

// How much work a problem may be: a search for races looks at every access.
int64_t cost() {
  return emulation::races_are_found() ? 20000 : 60000;
}

// Runs the problem twice, in other orders, on the same memory.
template <typename Problem, typename Results>
void fuzz(Random& random, const Problem& problem, Results results) {
  try {
    std::vector<Bytes> before;
    for (const Buffer* buffer : results.all()) {
      before.push_back(bytes_in(*buffer));
    }
    const auto call = call_cuda(problem, results);
    emulation::seed(random.next());
    run_cuda(random, call);
    check_cuda(problem, results);

    std::vector<Bytes> after;
    for (size_t i = 0; i < before.size(); ++i) {
      after.push_back(bytes_in(*results.all()[i]));
      put_bytes(*results.all()[i], before[i]);
    }
    emulation::seed(random.next());
    run_cuda(random, call);
    for (size_t i = 0; i < before.size(); ++i) {
      if (bytes_in(*results.all()[i]) != after[i]) {
        throw Failure("other bits in another order of blocks and threads");
      }
    }
  } catch (const std::runtime_error& error) {
    throw Failure(problem.text() + ": " + error.what());
  }
}

// What to print when a sanitizer, or the processor, ends the program.
char current[100] = "";

void print_current() {
  if (::write(STDERR_FILENO, current, std::strlen(current)) < 0) {
    _exit(1);
  }
}
[[maybe_unused]] void end_after_fault(int) {
  print_current();
  _exit(1);
}
void tell_what_ran() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(print_current);
#else
  std::signal(SIGSEGV, end_after_fault);
  std::signal(SIGBUS, end_after_fault);
  std::signal(SIGILL, end_after_fault);
#endif
}

void fuzz_round(uint64_t seed, int64_t round) {
  std::snprintf(
      current,
      sizeof current,
      "To repeat it: cuda_fuzz --seed %" PRIu64 " --first %" PRId64 " --rounds 1\n",
      seed,
      round);
  Random random(seed * 0x2545f4914f6cdd1du + static_cast<uint64_t>(round));
  if (random.one_in(4)) {
    const CudaResidual problem = draw_cuda_residual(random, cost());
    fuzz(random, problem, CudaResidualResults(random, problem));
  } else {
    const CudaFewOutputs problem = draw_cuda_few_outputs(random, cost());
    fuzz(random, problem, CudaFewOutputsResults(random, problem));
  }
}

int main(int count, char** arguments) {
  uint64_t seed = 1;
  int64_t rounds = 1000;
  int64_t first = 0;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const char* value = i + 1 < count ? arguments[++i] : "";
    if (argument == "--seed") {
      seed = std::strtoull(value, nullptr, 10);
    } else if (argument == "--rounds") {
      rounds = std::strtoll(value, nullptr, 10);
    } else if (argument == "--first") {
      first = std::strtoll(value, nullptr, 10);
    } else {
      std::fprintf(stderr, "cuda_fuzz: unknown argument %s\n", argument.c_str());
      return 2;
    }
  }
  tell_what_ran();
  for (int64_t round = first; round < first + rounds; ++round) {
    try {
      fuzz_round(seed, round);
    } catch (const Failure& failure) {
      std::fprintf(stderr, "cuda_fuzz: %s\n%s", failure.what(), current);
      return 1;
    }
  }
  std::printf("cuda_fuzz: %" PRId64 " rounds of seed %" PRIu64 ": no fault\n", rounds, seed);
  return 0;
}

} // namespace
} // namespace torchintro::fuzz

int main(int count, char** arguments) {
  return torchintro::fuzz::main(count, arguments);
}
