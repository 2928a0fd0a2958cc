// The CUDA kernels on random problems, on the processor (emulation/machine.h), against plain loops in double
// precision. Meant for AddressSanitizer and UndefinedBehaviorSanitizer, and for the search for races
// (emulation/races.h) (`make sanitize`); without them it checks the values, the guards, the barriers, and that the
// order of blocks and threads changes no bit.
//
//   cuda_fuzz [--seed S] [--rounds R] [--first F]   rounds F .. F + R - 1 of seed S; a failure says how to repeat it
//   cuda_fuzz --self-test                           faults put in on purpose, each of which must be found
#include "emulation/faults.h"
#include "emulation/fit.h"
#include "emulation/problems.h"
#include "emulation/races.h"
#include "repeat.h"
#include "self_test.h"

#include <cinttypes>
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

void fuzz_round(uint64_t seed, int64_t round) {
  begin_round("cuda_fuzz", seed, round);
  Random random(seed * 0x2545f4914f6cdd1du + static_cast<uint64_t>(round));
  const int64_t kind = random.between(0, 7);
  if (kind < 2) {
    const CudaFit problem = draw_cuda_fit(random, cost());
    fuzz(random, problem, CudaFitResults(random, problem));
  } else if (kind < 4) {
    const CudaResidual problem = draw_cuda_residual(random, cost());
    fuzz(random, problem, CudaResidualResults(random, problem));
  } else {
    const CudaFewOutputs problem = draw_cuda_few_outputs(random, cost());
    fuzz(random, problem, CudaFewOutputsResults(random, problem));
  }
}

// --- the machine itself

void check_matrices() {
  Random random(1);
  std::array<float, 16 * 16> a{};
  std::array<float, 16 * 8> b{};
  const auto draw = [&] { return static_cast<float>(random.between(-8, 8)); }; // exact in every order
  std::generate(a.begin(), a.end(), draw);
  std::generate(b.begin(), b.end(), draw);
  for (const From from : {From::Columns, From::RowsByLoad, From::RowsInRegisters}) {
    const Product product = multiply(a, b, from);
    for (size_t row = 0; row < 16; ++row) {
      for (size_t column = 0; column < 8; ++column) {
        double sum = 0;
        for (size_t k = 0; k < 16; ++k) {
          sum += static_cast<double>(a[row * 16 + k]) * b[k * 8 + column];
        }
        check_value(
            "product",
            static_cast<int64_t>(row),
            static_cast<int64_t>(column),
            product[row * 8 + column],
            sum,
            0,
            DType::Float32);
      }
    }
  }
}

// Every 16-bit number, the halfway point above it, and the floats beside that.
void check_conversions() {
  for (const DType dtype : {DType::BFloat16, DType::Float16}) {
    const Format format = format_of(dtype);
    std::vector<float> values;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const auto value = static_cast<float>(decode16(format, static_cast<uint16_t>(bits)));
      const auto next = static_cast<float>(decode16(format, static_cast<uint16_t>(bits + 1)));
      const float half = value + (next - value) / 2;
      values.insert(values.end(), {value, half, std::nextafterf(half, value), std::nextafterf(half, next)});
    }
    const auto rounded = dtype == DType::BFloat16 ? round_to_bfloat16(values) : round_to_float16(values);
    for (size_t i = 0; i < values.size(); ++i) {
      const double expected = decode16(format, encode16(format, values[i]));
      const bool same = std::isnan(expected)
          ? std::isnan(rounded[i])
          : rounded[i] == expected && std::signbit(rounded[i]) == std::signbit(expected);
      if (!same) {
        throw Failure(std::string("the conversion of ") + std::to_string(values[i]) + " to " + format.name);
      }
    }
  }
}

void must_be_right(bool right) {
  if (!right) {
    throw Failure("a wrong result");
  }
}

bool is_noticed_here(Needs needs) {
#if defined(__SANITIZE_ADDRESS__)
  constexpr bool kAddresses = true;
#else
  constexpr bool kAddresses = false;
#endif
  switch (needs) {
    case Needs::Nothing:
      return true;
    case Needs::AddressSanitizer:
      return kAddresses;
    case Needs::NoAddressSanitizer:
      return !kAddresses;
    case Needs::Races:
      return emulation::races_are_found();
  }
  return false;
}

void self_test_machine(SelfTest& test) {
  for (const Fault& fault : faults()) {
    for (uint64_t seed = 1; seed <= 20; ++seed) { // without the fault, nothing is noticed
      emulation::seed(seed);
      try {
        must_be_right(fault.run(false));
      } catch (const std::runtime_error& error) {
        throw Failure(std::string("beside ") + fault.name + ": " + error.what());
      }
    }
    if (!is_noticed_here(fault.needs)) {
      continue;
    }
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      test.must_notice(fault.name + std::string(", seed ") + std::to_string(seed), [&] {
        emulation::seed(seed);
        try {
          must_be_right(fault.run(true));
        } catch (const emulation::Error& error) {
          throw Failure(error.what());
        }
      });
    }
  }
}

// --- the comparison

void self_test_values(SelfTest& test, DType dtype) {
  Random random(1);
  CudaFewOutputs problem;
  do { // one without infinities and NaN
    problem = draw_cuda_few_outputs(random, dtype, dtype, 33, 17, 3);
  } while (!std::isfinite(expect_few_outputs(problem.p, 0, 33).loss.at(0, 0).value));
  FewOutputsProblem& p = problem.p;
  p.input = draw_matrix(random, dtype, contiguous(33, 17), Place());
  p.wants_input = p.wants_weight = p.wants_target = problem.wants_bias = true;
  const std::string of = std::string(" of ") + format_of(dtype).name;
  const auto good = [&] {
    CudaFewOutputsResults results(random, problem);
    run_cuda(random, call_cuda(problem, results));
    return results;
  };
  check_cuda(problem, good());
  const auto swapped = [&](const char* name, Buffer CudaFewOutputsResults::* buffer) {
    test.must_notice(std::string("a wrong ") + name + of, [&] {
      const auto results = good();
      const Buffer& memory = results.*buffer;
      const auto size = static_cast<size_t>(bytes_of(dtype == DType::Float16 ? DType::Float32 : dtype));
      std::swap_ranges(memory.data(), memory.data() + size, memory.data() + size);
      check_cuda(problem, results);
    });
  };
  swapped("input gradient", &CudaFewOutputsResults::grad_input);
  swapped("weight gradient", &CudaFewOutputsResults::grad_weight);
  swapped("target gradient", &CudaFewOutputsResults::grad_target);
  swapped("bias gradient", &CudaFewOutputsResults::grad_bias);
  const auto call_wrongly = [&](const char* name, void (*change)(cuda::FewOutputsCall&)) {
    test.must_notice(name + of, [&] {
      CudaFewOutputsResults results(random, problem);
      auto call = call_cuda(problem, results);
      change(call);
      run_cuda(random, call);
      check_cuda(problem, results);
    });
  };
  call_wrongly("a row left out", [](cuda::FewOutputsCall& call) { --call.rows; });
  call_wrongly("a row too many", [](cuda::FewOutputsCall& call) { ++call.rows; });
  call_wrongly("a column left out", [](cuda::FewOutputsCall& call) { --call.in_features; });
  call_wrongly("a wrong factor of the loss", [](cuda::FewOutputsCall& call) { call.loss_factor *= 1.05; });
  call_wrongly("a wrong factor of g", [](cuda::FewOutputsCall& call) { call.residual_factor *= 1.05; });
#if defined(__SANITIZE_ADDRESS__)
  test.must_notice("a workspace too small" + of, [&] {
    CudaFewOutputsResults results(random, problem);
    run_cuda(random, call_cuda(problem, results), 256);
  });
#endif

  CudaResidual step;
  do {
    step = draw_cuda_residual(random, dtype, dtype, 33, 17);
  } while (!std::isfinite(expect_residual(step.p, 0, 33).loss.at(0, 0).value));
  step.p.wants_residual = step.p.wants_target = true;
  const auto step_wrongly = [&](void (*change)(cuda::ResidualStepCall&)) {
    CudaResidualResults results(random, step);
    auto call = call_cuda(step, results);
    change(call);
    run_cuda(random, call);
    check_cuda(step, results);
  };
  step_wrongly([](cuda::ResidualStepCall&) {});
  test.must_notice(
      "a step's row left out" + of, [&] { step_wrongly([](cuda::ResidualStepCall& call) { --call.rows; }); });
  test.must_notice("g written against the call's wish" + of, [&] {
    step.p.wants_residual = false;
    step_wrongly([](cuda::ResidualStepCall& call) { call.writes_g = true; });
  });
}

void self_test_fit(SelfTest& test, DType dtype) {
  Random random(3);
  const std::string of = std::string(" of ") + format_of(dtype).name;
  CudaFit problem;
  const auto call_wrongly = [&](void (*change)(cuda::FitRowsCall&)) {
    CudaFitResults results(random, problem);
    auto call = call_cuda(problem, results);
    change(call);
    run_cuda(random, call);
    check_cuda(problem, results);
  };
  const auto must_notice = [&](const char* name, void (*change)(cuda::FitRowsCall&)) {
    test.must_notice(name + of, [&] { call_wrongly(change); });
  };
  // One that never stops, and that has all there is to be wrong.
  const auto is_good = [&] {
    const auto expected = expect_fit(problem);
    const auto finite = [](const FitExpected& e) { return e.stopped < 0 && !e.on_edge; };
    return std::all_of(expected.begin(), expected.end(), finite) && problem.adam && problem.linear_bias.present() &&
        problem.train_weight && problem.train_bias && problem.validation_rows > 1 && problem.batches() > 2 &&
        problem.epochs > 1 && problem.step > 0 && problem.step < 100 && !problem.order.empty() &&
        problem.input.layout.row_stride > 1 && problem.target.layout.row_stride > 0;
  };
  do {
    problem = draw_cuda_fit(random, dtype, 37, 5, 2);
    problem.step = problem.batches();
    problem.epoch = 1;
  } while (!is_good());
  call_wrongly([](cuda::FitRowsCall&) {});
  must_notice("a training row left out", [](cuda::FitRowsCall& call) { --call.rows; });
  must_notice("a training row too many", [](cuda::FitRowsCall& call) { ++call.rows; });
  must_notice("a feature left out", [](cuda::FitRowsCall& call) { --call.in_features; });
  must_notice("another batch size", [](cuda::FitRowsCall& call) { --call.batch_rows; });
  must_notice("rows in no order", [](cuda::FitRowsCall& call) { call.order = nullptr; });
  must_notice("a validation row left out", [](cuda::FitRowsCall& call) { --call.validation_rows; });
  must_notice("an epoch left out", [](cuda::FitRowsCall& call) { --call.epochs; });
  must_notice("an update not counted", [](cuda::FitRowsCall& call) { ++call.step; });
  must_notice("a bias not trained", [](cuda::FitRowsCall& call) { call.train_bias = false; });
  must_notice("a weight not trained", [](cuda::FitRowsCall& call) { call.train_weight = false; });
  must_notice("another optimizer", [](cuda::FitRowsCall& call) { call.adam = call.decoupled = false; });
  must_notice("another epoch's learning rate", [](cuda::FitRowsCall& call) {
    auto* lr = const_cast<double*>(call.lr);
    lr[call.models] *= 1.05;
    lr[0] *= 1.05;
  });
  problem.target.set(problem.order[0], 0, std::numeric_limits<double>::quiet_NaN());
  call_wrongly([](cuda::FitRowsCall&) {});
  must_notice("another epoch of the end", [](cuda::FitRowsCall& call) { ++call.epoch; });
  must_notice("a model that began as it was", [](cuda::FitRowsCall& call) { call.step = 0; });
}

int self_test() {
  SelfTest test;
  try {
    check_matrices();
    check_conversions();
    self_test_machine(test);
    for (const DType dtype : {DType::Float64, DType::Float32, DType::BFloat16, DType::Float16}) {
      self_test_values(test, dtype);
    }
    self_test_fit(test, DType::Float64);
    self_test_fit(test, DType::Float32);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "cuda_fuzz --self-test: %s\n", error.what());
    return 1;
  }
  return test.result();
}

int main(int count, char** arguments) {
  uint64_t seed = 1;
  int64_t rounds = 1000;
  int64_t first = 0;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--self-test") {
      return self_test();
    }
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
