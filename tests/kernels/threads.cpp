// The operator's loop over blocks of rows (cpu/kernels/blocks.h) on std::thread, for ThreadSanitizer (`make sanitize`): every
// kernel at every level, from one thread to more threads than rows, and several calls at once on the same tensors. Results
// must have the same bits whatever the number of threads.
//
//   threads                 runs everything
//   threads --self-test     a race put in on purpose, which ThreadSanitizer must report
#include "cpu/kernels/blocks.h"
#include "moments.h"
#include "residual.h"
#include "self_test.h"
#include "sums.h"

#include <cstdio>
#include <thread>

namespace torchintro::fuzz {
namespace {

using cpu::Level;

// As at::parallel_for, but it cuts the range into as many pieces as there are threads, however small: more borders
// between threads than ATen's grain would make.
struct ParallelFor {
  int64_t threads;

  template <typename Run>
  void operator()(int64_t begin, int64_t end, int64_t /*grain*/, const Run& run) const {
    const int64_t pieces = std::min(threads, end - begin);
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t from = begin + (end - begin) * i / pieces;
      const int64_t to = begin + (end - begin) * (i + 1) / pieces;
      pool.emplace_back([&run, from, to] { run(from, to); });
    }
    for (std::thread& thread : pool) {
      thread.join();
    }
  }
};

// With the gradients that the operator makes of the sums.
struct FewOutputsGradients : FewOutputsResults {
  AddUpProblem adding;
  Buffer linear_weight; // absent if not asked for
  Buffer linear_bias;

  using FewOutputsResults::FewOutputsResults;
};

bool same_bits(const FewOutputsGradients& a, const FewOutputsGradients& b) {
  const FewOutputsResults &results = a, &others = b;
  return same_bits(results, others) && same_bits(a.linear_weight, b.linear_weight) &&
      same_bits(a.linear_bias, b.linear_bias);
}

void check(const FewOutputsProblem& p, const FewOutputsGradients& results, int64_t begin, int64_t end) {
  check_few_outputs(p, results, begin, end);
  results.linear_bias.check_guards("linear_bias");
  check_add_up(results.adding, results.linear_bias.data(), 1, 1 + p.outputs);
  if (p.wants_weight) {
    results.linear_weight.check_guards("linear_weight");
    check_add_up(results.adding, results.linear_weight.data(), 1 + p.outputs, p.sums());
  }
}
void check(const ResidualProblem& p, const ResidualResults& results, int64_t begin, int64_t end) {
  check_residual(p, results, begin, end);
}
void check(const MomentsProblem& p, const MomentsResults& results, int64_t begin, int64_t end) {
  check_moments(p, results, begin, end);
}

FewOutputsGradients run(const FewOutputsProblem& p, Level level, int64_t threads, int64_t most_blocks) {
  Random random(1);
  FewOutputsGradients results(random, p);
  const cpu::FewOutputs call = call_few_outputs(p, results);
  const auto kernels = cpu::find_kernels(p.input_type, p.target_type, level);
  const ParallelFor parallel_for{threads};
  const auto [sums, blocks] = cpu::run_blocks(
      parallel_for,
      p.rows,
      most_blocks,
      p.features * p.outputs,
      p.sums(),
      few_outputs_scratch_bytes(call),
      [&](int64_t begin, int64_t end, double* partial, void* scratch) {
        kernels.few_outputs(call, begin, end, partial, scratch);
      });

  constexpr double kScale = 0.75;
  const auto add_up = [&, first = sums.get(), count = blocks](int64_t offset, int64_t elements) {
    Buffer gradient = draw_output(random, p.input_type, elements);
    parallel_for(0, elements, 1, [&](int64_t begin, int64_t end) {
      kernels.add_up(first + offset, count, p.sums(), begin, end, kScale, gradient.data());
    });
    return gradient;
  };
  results.linear_bias = add_up(1, p.outputs);
  if (p.wants_weight) {
    results.linear_weight = add_up(1 + p.outputs, p.outputs * p.features);
  }
  results.adding = {p.input_type, blocks, p.sums(), 0, p.sums(), kScale, {}};
  results.adding.sums.assign(sums.get(), sums.get() + blocks * p.sums());
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < p.sums(); ++i) {
      results.sums[static_cast<size_t>(i)] += sums[block * p.sums() + i];
    }
  }
  return results;
}

ResidualResults run(const ResidualProblem& p, Level level, int64_t threads, int64_t blocks) {
  Random random(1);
  ResidualResults results(random, p);
  const cpu::Residual call = call_residual(p, results);
  const auto kernel = cpu::find_kernels(p.input_type, p.target_type, level).residual;
  const auto sums = cpu::sum_blocks(
      ParallelFor{threads},
      p.rows,
      blocks,
      p.outputs,
      p.sums(),
      residual_scratch_bytes(call),
      [&](int64_t begin, int64_t end, double* partial, void* scratch) { kernel(call, begin, end, partial, scratch); });
  results.sums.assign(sums.get(), sums.get() + p.sums());
  return results;
}

MomentsResults run(const MomentsProblem& p, Level level, int64_t threads, int64_t blocks) {
  const cpu::RowMoments call = call_moments(p);
  const auto kernel = cpu::find_kernels(p.input_type, p.input_type, level).moments;
  const auto sums = cpu::sum_blocks(
      ParallelFor{threads},
      p.rows,
      blocks,
      p.features,
      p.sums(),
      moments_scratch_bytes(call),
      [&](int64_t begin, int64_t end, double* partial, void* scratch) { kernel(call, begin, end, partial, scratch); });
  return {{sums.get(), sums.get() + p.sums()}};
}

// For every number of threads, from several callers at once, who share what they read and, through the first call of all,
// the choice of the level.
template <typename Problem>
void check_threads(const Problem& p, Level level, int64_t blocks) {
  try {
    const auto alone = run(p, level, 1, blocks);
    check(p, alone, 0, p.rows);
    for (const int64_t threads : {int64_t{2}, int64_t{3}, p.rows + 3}) {
      std::vector<std::thread> callers;
      std::vector<int> differs(2);
      for (size_t caller = 0; caller < differs.size(); ++caller) {
        callers.emplace_back([&, caller] { differs[caller] = !same_bits(alone, run(p, level, threads, blocks)); });
      }
      for (std::thread& caller : callers) {
        caller.join();
      }
      for (const int differing : differs) {
        if (differing != 0) {
          throw Failure("other bits with " + std::to_string(threads) + " threads than with one");
        }
      }
    }
  } catch (const Failure& failure) {
    throw Failure(p.text() + ", at " + cpu::level_name(level) + ": " + failure.what());
  }
}

int check_all() {
  std::vector<std::thread> first;
  for (int i = 0; i < 4; ++i) {
    first.emplace_back([] { cpu::find_kernels(DType::Float32, DType::Float32); });
  }
  for (std::thread& thread : first) {
    thread.join();
  }
  int64_t problems = 0;
  Random random(1);
  for (const Level level : levels()) {
    for (const auto& [input_type, target_type] : kDtypePairs) {
      for (const int64_t rows : {1, 3, 17, 150}) {
        for (const int64_t features : {1, 9, 40}) {
          FewOutputsProblem p =
              draw_few_outputs_problem(random, input_type, target_type, rows, features, features == 9 ? 5 : 1);
          p.wants_input = p.wants_weight = p.wants_target = true; // all that is written
          check_threads(p, level, random.between(1, std::min<int64_t>(rows, 20)));
          ResidualProblem r = draw_residual_problem(random, input_type, target_type, rows, features);
          r.wants_residual = r.wants_bias = r.wants_target = true;
          check_threads(r, level, random.between(1, std::min<int64_t>(rows, 20)));
          const MomentsProblem m = draw_moments_problem(random, input_type, target_type, rows, features, 2);
          check_threads(m, level, random.between(1, std::min<int64_t>(rows, 20)));
          problems += 3;
        }
      }
    }
  }
  std::printf(
      "threads: %lld problems, with 1 thread to more threads than rows: no race, the same bits\n",
      static_cast<long long>(problems));
  return 0;
}

// Two threads on the same rows, each with sums of its own: they write the same gradient.
int self_test() {
  SelfTest test;
  for (const Level level : levels()) {
    test.must_notice(std::string("a race at ") + cpu::level_name(level), [&] {
      Random random(1);
      FewOutputsProblem p = draw_few_outputs_problem(random, DType::Float32, DType::Float32, 40, 64, 1);
      p.wants_input = true;
      p.wants_target = false;
      const FewOutputsResults results(random, p);
      const cpu::FewOutputs call = call_few_outputs(p, results);
      const auto kernel = cpu::find_kernels(p.input_type, p.target_type, level).few_outputs;
      cpu::sum_blocks(
          ParallelFor{2},
          2,
          2,
          1,
          p.sums(),
          few_outputs_scratch_bytes(call),
          [&](int64_t, int64_t, double* partial, void* scratch) { kernel(call, 0, p.rows, partial, scratch); });
    });
  }
  return test.result();
}

} // namespace
} // namespace torchintro::fuzz

int main(int count, char** arguments) {
  try {
    return count > 1 && std::string(arguments[1]) == "--self-test" ? torchintro::fuzz::self_test()
                                                                   : torchintro::fuzz::check_all();
  } catch (const torchintro::fuzz::Failure& failure) {
    std::fprintf(stderr, "threads: %s\n", failure.what());
    return 1;
  }
}
