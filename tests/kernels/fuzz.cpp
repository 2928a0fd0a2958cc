// The CPU kernels on random problems, at every level that this machine has, against plain loops in double precision. Meant
// for AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`); without them it checks the values and the guards.
//
//   fuzz [--seed S] [--rounds R] [--first F]    rounds F .. F + R - 1 of seed S; a failure says how to repeat it alone
//   fuzz --self-test                            faults put in on purpose, each of which must be found
#include "large.h"
#include "moments.h"
#include "repeat.h"
#include "residual.h"
#include "self_test.h"
#include "sums.h"

#include <cinttypes>
#include <cstdio>

namespace torchintro::fuzz {
namespace {

using cpu::Level;

// Rows begin .. end in blocks, some of which may be empty; the memory of each is as large as the kernel asks for.
struct Blocks {
  std::vector<int64_t> borders;
  int64_t scratch_before = 0;

  Blocks(Random& random, int64_t begin, int64_t end)
      : borders{begin, end} {
    for (int64_t more = random.between(0, 3); more > 0; --more) {
      borders.push_back(random.between(begin, end));
    }
    std::sort(borders.begin(), borders.end());
    scratch_before = random.between(0, 7) * cpu::kScratchAlignment;
  }

  template <typename Kernel>
  std::vector<double> sum(int64_t size, int64_t scratch_bytes, const Kernel& kernel) const {
    std::vector<double> sums(static_cast<size_t>(size));
    for (size_t block = 0; block + 1 < borders.size(); ++block) {
      const Buffer partial(size * 8, Buffer::kNan, Place{8});
      const Buffer scratch(scratch_bytes, Buffer::kNan, Place{scratch_before});
      auto* values = reinterpret_cast<double*>(partial.data());
      kernel(borders[block], borders[block + 1], values, scratch.data());
      partial.check_guards("sums");
      scratch.check_guards("scratch");
      for (size_t i = 0; i < sums.size(); ++i) {
        sums[i] += values[i];
      }
    }
    return sums;
  }
};

FewOutputsResults run(Random& random, const FewOutputsProblem& p, Level level, const Blocks& blocks) {
  FewOutputsResults results(random, p);
  const cpu::FewOutputs call = call_few_outputs(p, results);
  const auto kernel = cpu::find_kernels(p.input_type, p.target_type, level).few_outputs;
  results.sums = blocks.sum(
      p.sums(), few_outputs_scratch_bytes(call), [&](int64_t begin, int64_t end, double* partial, void* scratch) {
        kernel(call, begin, end, partial, scratch);
      });
  return results;
}

ResidualResults run(Random& random, const ResidualProblem& p, Level level, const Blocks& blocks) {
  ResidualResults results(random, p);
  const cpu::Residual call = call_residual(p, results);
  const auto kernel = cpu::find_kernels(p.input_type, p.target_type, level).residual;
  results.sums = blocks.sum(
      p.sums(), residual_scratch_bytes(call), [&](int64_t begin, int64_t end, double* partial, void* scratch) {
        kernel(call, begin, end, partial, scratch);
      });
  return results;
}

MomentsResults run(Random&, const MomentsProblem& p, Level level, const Blocks& blocks) {
  const cpu::RowMoments call = call_moments(p);
  const auto kernel = cpu::find_kernels(p.input_type, p.input_type, level).moments;
  return {blocks.sum(
      p.sums(), moments_scratch_bytes(call), [&](int64_t begin, int64_t end, double* partial, void* scratch) {
        kernel(call, begin, end, partial, scratch);
      })};
}

void check(const FewOutputsProblem& p, const FewOutputsResults& results, int64_t begin, int64_t end) {
  check_few_outputs(p, results, begin, end);
}
void check(const ResidualProblem& p, const ResidualResults& results, int64_t begin, int64_t end) {
  check_residual(p, results, begin, end);
}
void check(const MomentsProblem& p, const MomentsResults& results, int64_t begin, int64_t end) {
  check_moments(p, results, begin, end);
}

// All or some of the rows, at every level: right to rounding, hence the levels equal to it, and from the same values
// elsewhere in memory the same bits.
template <typename Problem>
void fuzz(Random& random, Problem problem) {
  const int64_t begin = random.coin() ? 0 : random.between(0, problem.rows);
  const int64_t end = random.coin() ? problem.rows : random.between(begin, problem.rows);
  const Blocks blocks(random, begin, end);
  const char* level_name = "";
  try {
    for (const Level level : levels()) {
      level_name = cpu::level_name(level);
      const auto results = run(random, problem, level, blocks);
      check(problem, results, begin, end);
      if (random.one_in(4)) {
        move(random, problem);
        if (!same_bits(results, run(random, problem, level, blocks))) {
          throw Failure("other bits from the same values at other addresses");
        }
      }
    }
  } catch (const Failure& failure) {
    throw Failure(
        problem.text() + ", rows " + std::to_string(begin) + " .. " + std::to_string(end) + " at " + level_name + ": " +
        failure.what());
  }
}

void fuzz(Random& random, const AddUpProblem& problem) {
  const char* level_name = "";
  try {
    for (const Level level : levels()) {
      level_name = cpu::level_name(level);
      // The target's dtype makes no difference, but has a table of its own.
      for (const auto& [input_type, target_type] : kDtypePairs) {
        if (input_type == problem.type) {
          check_add_up(problem, run_add_up(random, problem, cpu::find_kernels(input_type, target_type, level).add_up));
        }
      }
    }
  } catch (const Failure& failure) {
    throw Failure(problem.text() + " at " + level_name + ": " + failure.what());
  }
}

void fuzz_round(uint64_t seed, int64_t round) {
  begin_round("fuzz", seed, round);
  Random random(seed * 0x2545f4914f6cdd1du + static_cast<uint64_t>(round));
  if (random.one_in(4)) {
    fuzz(random, draw_residual_problem(random));
  } else if (random.one_in(10)) {
    fuzz(random, draw_add_up_problem(random, draw_dtypes(random).input));
  } else if (random.one_in(5)) {
    fuzz(random, draw_moments_problem(random));
  } else {
    fuzz(random, draw_few_outputs_problem(random));
  }
}

// Every 16-bit number through the residual kernel: as a product, whose g (with zeros as targets) goes unscaled into a
// float32 target gradient, and as what the halfway point above it, and its neighbours, are rounded to.
void check_conversions(Level level) {
  for (const DType dtype : {DType::BFloat16, DType::Float16}) {
    const Format format = format_of(dtype);
    const auto kernel = cpu::find_kernels(dtype, DType::Float32, level).residual;
    const auto run = [&](const std::vector<double>& products, const std::vector<double>& targets, Buffer& residual) {
      const auto count = static_cast<int64_t>(products.size());
      Buffer target(count * 4, Buffer::kNan);
      Buffer gradient(count * 4, Buffer::kMark);
      residual = Buffer(count * 2, Buffer::kMark);
      for (int64_t i = 0; i < count; ++i) {
        write(dtype, residual.data() + 2 * i, products[static_cast<size_t>(i)]);
        write(DType::Float32, target.data() + 4 * i, targets[static_cast<size_t>(i)]);
      }
      cpu::Residual call{};
      call.product = residual.data();
      call.target = {target.data(), count, 1};
      call.outputs = count;
      call.residual_scale = call.target_scale = 1;
      call.grad_target = gradient.data();
      call.grad_target_row_stride = count;
      call.wants_residual = true;
      double loss = 0;
      const Buffer scratch(residual_scratch_bytes(call), Buffer::kNan);
      kernel(call, 0, 1, &loss, scratch.data());
      return gradient;
    };
    const auto expect = [&](const char* what, double value, double expected) {
      const bool same = value == expected && std::signbit(value) == std::signbit(expected);
      if (!same && !(std::isnan(value) && std::isnan(expected))) {
        char text[200];
        std::snprintf(
            text,
            sizeof text,
            "%s %s at %s: %.9g instead of %.9g",
            format.name,
            what,
            cpu::level_name(level),
            value,
            expected);
        throw Failure(text);
      }
    };

    std::vector<double> all;
    for (int32_t bits = 0; bits < 65536; ++bits) {
      all.push_back(decode16(format, static_cast<uint16_t>(bits)));
    }
    Buffer residual;
    const Buffer widened = run(all, std::vector<double>(all.size()), residual);
    for (size_t i = 0; i < all.size(); ++i) {
      expect("widened", read(DType::Float32, widened.data() + 4 * i), all[i]);
      expect("widened and narrowed", read(dtype, residual.data() + 2 * i), all[i]);
    }

    std::vector<double> targets;
    for (const double value : all) {
      const auto single = static_cast<float>(value);
      const auto next = static_cast<float>(decode16(format, static_cast<uint16_t>(encode16(format, value) + 1)));
      const float half = single + (next - single) / 2;
      for (const float target : {half, std::nextafterf(half, single), std::nextafterf(half, next)}) {
        targets.push_back(target);
      }
    }
    run(std::vector<double>(targets.size()), targets, residual);
    for (size_t i = 0; i < targets.size(); ++i) {
      expect("narrowed", read(dtype, residual.data() + 2 * i), decode16(format, encode16(format, 0 - targets[i])));
    }
  }
}

// --- faults on purpose

void self_test_values(SelfTest& test, Level level, const FewOutputsProblem& p) {
  Random random(1);
  const std::string at = std::string(" at ") + cpu::level_name(level);
  const Blocks blocks(random, 0, p.rows);
  const auto good = [&] { return run(random, p, level, blocks); };
  check(p, good(), 0, p.rows); // without a fault there is none
  test.must_notice("a wrong loss" + at, [&] {
    auto results = good();
    results.sums[0] *= 1.001;
    check(p, results, 0, p.rows);
  });
  test.must_notice(
      "a row left out" + at, [&] { check(p, run(random, p, level, Blocks(random, 0, p.rows - 1)), 0, p.rows); });
  test.must_notice("a row too many" + at, [&] { check(p, good(), 0, p.rows - 1); });
  test.must_notice("a row counted twice" + at, [&] {
    auto results = good();
    const auto again = run(random, p, level, Blocks(random, 1, 2));
    for (size_t i = 0; i < results.sums.size(); ++i) {
      results.sums[i] += again.sums[i];
    }
    check(p, results, 0, p.rows);
  });
  test.must_notice("a wrong gradient" + at, [&] {
    const auto results = good();
    std::swap(results.grad_input.data()[3], results.grad_input.data()[7]);
    check(p, results, 0, p.rows);
  });
  test.must_notice("a write behind the gradient" + at, [&] {
    auto results = good();
    results.grad_target = results.grad_target.copy({});
    const Buffer wider(results.grad_target.bytes(), Buffer::kMark, Place(), 8);
    std::memcpy(wider.data(), results.grad_target.data(), static_cast<size_t>(wider.bytes()));
    wider.data()[wider.bytes()] = 0;
    wider.check_guards("target gradient");
  });
}

// Every buffer a little too short, and numbers at an odd address. Tensors end at a forbidden page, which needs no sanitizer.
void self_test_memory(SelfTest& test, Level level, const FewOutputsProblem& p) {
  Random random(1);
  const std::string at = std::string(" at ") + cpu::level_name(level);
  const auto kernel = cpu::find_kernels(p.input_type, p.target_type, level).few_outputs;
  struct Shorter {
    int64_t input, target, grad_input, grad_target, partial, scratch;
  };
  const auto run_with = [&](const Shorter& fewer, int64_t shift) {
    const Place place{0, Guard::PageAfter};
    const FewOutputsResults results(random, p);
    const Buffer input = p.input.memory.copy(place, fewer.input);
    const Buffer target = p.target.memory.copy(place, fewer.target);
    const Buffer grad_input(results.grad_input.bytes() - fewer.grad_input, Buffer::kMark, place);
    const Buffer grad_target(results.grad_target.bytes() - fewer.grad_target, Buffer::kMark, place);
    cpu::FewOutputs call = call_few_outputs(p, results);
    call.input.data = input.data() - shift;
    call.target.data = target.data();
    call.grad_input = grad_input.data();
    call.grad_target = grad_target.data();
    const Buffer partial(p.sums() * 8 - fewer.partial, Buffer::kNan);
    const Buffer scratch(few_outputs_scratch_bytes(call) - fewer.scratch, Buffer::kNan);
    kernel(call, 0, p.rows, reinterpret_cast<double*>(partial.data()), scratch.data());
  };
  const int64_t element = bytes_of(p.input_type);
  test.must_notice("an input too short" + at, [&] { run_with({element, 0, 0, 0, 0, 0}, 0); });
  test.must_notice("a target too short" + at, [&] { run_with({0, element, 0, 0, 0, 0}, 0); });
  test.must_notice("an input gradient too short" + at, [&] { run_with({0, 0, element, 0, 0, 0}, 0); });
  test.must_notice("a target gradient too short" + at, [&] { run_with({0, 0, 0, element, 0, 0}, 0); });
#if defined(__SANITIZE_ADDRESS__)
  const int64_t all_scratch = few_outputs_scratch_bytes(call_few_outputs(p, FewOutputsResults(random, p))) - 16;
  test.must_notice("sums too short" + at, [&] { run_with({0, 0, 0, 0, 8, 0}, 0); });
  test.must_notice("too little scratch" + at, [&] { run_with({0, 0, 0, 0, 0, all_scratch}, 0); });
  test.must_notice("numbers at an odd address" + at, [&] { run_with({0, 0, 0, 0, 0, 0}, 1); });
#endif
}

void self_test_tiles(SelfTest& test, Level level, DType dtype) {
  const std::string at = std::string(" at ") + cpu::level_name(level);
  Random random(1);
  ResidualProblem p = draw_residual_problem(random, dtype, dtype, 33, 17);
  const DType accumulator = accumulator_of(dtype);
  p.linear_bias = draw_matrix(random, accumulator, contiguous(1, 17), Place());
  p.wants_residual = p.wants_bias = p.wants_target = true;
  p.target_tile = {20, 2};
  const Blocks blocks(random, 0, p.rows);
  const auto good = [&] { return run(random, p, level, blocks); };
  check(p, good(), 0, p.rows);
  test.must_notice("a tile of the target's gradient one column too far" + at, [&] {
    const auto results = good();
    p.target_tile.first = 1;
    check(p, results, 0, p.rows);
  });
  test.must_notice("a write between the rows of a tile" + at, [&] {
    const auto results = good();
    results.grad_target.data()[(4 * 20 + 2 + 17) * bytes_of(dtype)] ^= 1;
    check(p, results, 0, p.rows);
  });
  test.must_notice("no bias" + at, [&] {
    Matrix bias;
    std::swap(bias, p.linear_bias);
    const auto results = good();
    std::swap(bias, p.linear_bias);
    check(p, results, 0, p.rows);
  });
  test.must_notice("a bias too short" + at, [&] {
    p.linear_bias.memory = p.linear_bias.memory.copy({0, Guard::PageAfter}, bytes_of(accumulator));
    good();
  });
}

void self_test_add_up(SelfTest& test, Level level, DType dtype) {
  const std::string at = std::string(" at ") + cpu::level_name(level);
  Random random(1);
  AddUpProblem p = draw_add_up_problem(random, dtype);
  p.blocks = 2;
  p.begin = 3;
  p.end = 3 + 37;
  p.stride = 41;
  p.scale = 1;
  for (double& sum : p.sums = std::vector<double>(static_cast<size_t>(p.blocks * p.stride))) {
    sum = random.uniform(1, 2);
  }
  struct More {
    int64_t blocks, stride, begin, end;
  };
  const auto kernel = cpu::find_kernels(dtype, dtype, level).add_up;
  const auto run_with = [&](const More& more) {
    const auto wrong =
        [&](const double* sums, int64_t blocks, int64_t stride, int64_t begin, int64_t end, double scale, void* to) {
          kernel(sums, blocks + more.blocks, stride + more.stride, begin + more.begin, end + more.end, scale, to);
        };
    for (int i = 0; i < 10; ++i) { // in every kind of place
      check_add_up(p, run_add_up(random, p, wrong));
    }
  };
  run_with({0, 0, 0, 0});
  test.must_notice("a block's sums left out" + at, [&] { run_with({-1, 0, 0, 0}); });
  test.must_notice("a block's sums too many" + at, [&] { run_with({1, 0, 0, 0}); });
  test.must_notice("the sums beside a block's" + at, [&] { run_with({0, -1, 0, 0}); });
  test.must_notice("a first sum left out" + at, [&] { run_with({0, 0, 1, 0}); });
  test.must_notice("a last sum left out" + at, [&] { run_with({0, 0, 0, -1}); });
  test.must_notice("a sum in front" + at, [&] { run_with({0, 0, -1, 0}); });
  test.must_notice("a sum behind" + at, [&] { run_with({0, 0, 0, 1}); });
}

void self_test_moments(SelfTest& test, Level level, DType dtype, int64_t features) {
  const std::string at =
      std::string(" at ") + cpu::level_name(level) + " with " + std::to_string(features) + " features";
  Random random(1);
  MomentsProblem p = draw_moments_problem(random, dtype, dtype, 150, features, 2);
  p.input = draw_matrix(random, dtype, contiguous(150, features), Place());
  p.target = draw_matrix(random, dtype, contiguous(150, 2), Place());
  p.weight = draw_matrix(random, DType::Float64, contiguous(150, 1), Place());
  const Blocks blocks(random, 0, p.rows);
  const auto good = [&] { return run(random, p, level, blocks); };
  check(p, good(), 0, p.rows);
  test.must_notice("a moment's row left out" + at, [&] {
    check(p, run(random, p, level, Blocks(random, 0, p.rows - 1)), 0, p.rows);
  });
  test.must_notice("moments about another place" + at, [&] {
    const auto results = good();
    p.shift.set(0, features - 1, p.shift.at(0, features - 1) + 1e-9);
    check(p, results, 0, p.rows);
  });
  test.must_notice("a weight left out" + at, [&] {
    const auto results = good();
    p.weight.set(7, 0, p.weight.at(7, 0) + 1e-9);
    check(p, results, 0, p.rows);
  });
  test.must_notice("a last moment that is wrong" + at, [&] {
    auto results = good();
    const cpu::RowMoments call = call_moments(p);
    const int64_t last = (moments_extra(call) + features - 1) * moments_stride(call) + features - 1;
    results.sums[static_cast<size_t>(moments_matrix(call) + last)] *= 1 + 1e-12;
    check(p, results, 0, p.rows);
  });
  test.must_notice("a moment's input too short" + at, [&] {
    p.input.memory = p.input.memory.copy({0, Guard::PageAfter}, bytes_of(dtype));
    good();
  });
  test.must_notice("a moment's target too short" + at, [&] {
    p.target.memory = p.target.memory.copy({0, Guard::PageAfter}, bytes_of(dtype));
    good();
  });
  test.must_notice("weights too short" + at, [&] {
    p.weight.memory = p.weight.memory.copy({0, Guard::PageAfter}, 8);
    good();
  });
#if defined(__SANITIZE_ADDRESS__)
  const auto run_with = [&](int64_t fewer_sums, int64_t fewer_scratch) {
    const cpu::RowMoments call = call_moments(p);
    const Buffer partial(p.sums() * 8 - fewer_sums, Buffer::kNan);
    const Buffer scratch(moments_scratch_bytes(call) - fewer_scratch, Buffer::kNan);
    const auto kernel = cpu::find_kernels(dtype, dtype, level).moments;
    kernel(call, 0, p.rows, reinterpret_cast<double*>(partial.data()), scratch.data());
  };
  test.must_notice("too few sums for the moments" + at, [&] { run_with(8, 0); });
  test.must_notice(
      "too little scratch for the moments" + at, [&] { run_with(0, moments_scratch_bytes(call_moments(p)) / 2); });
#endif
}

int self_test() {
  SelfTest test;
  for (const Level level : levels()) {
    for (const DType dtype : {DType::Float64, DType::Float32, DType::BFloat16, DType::Float16}) {
      Random random(1);
      FewOutputsProblem p = draw_few_outputs_problem(random, dtype, dtype, 33, 17, 3);
      p.input = draw_matrix(random, dtype, contiguous(33, 17), Place());
      p.target = draw_matrix(random, dtype, contiguous(33, 3), Place());
      p.weight = Matrix();
      p.wants_input = p.wants_weight = p.wants_target = true;
      self_test_values(test, level, p);
      self_test_memory(test, level, p);
      self_test_tiles(test, level, dtype);
      self_test_add_up(test, level, dtype);
      self_test_moments(test, level, dtype, 7);
      self_test_moments(test, level, dtype, 45);
    }
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
      std::fprintf(stderr, "fuzz: unknown argument %s\n", argument.c_str());
      return 2;
    }
  }
  std::string names;
  try {
    for (const Level level : levels()) {
      check_conversions(level);
      check_large(level);
      names += (names.empty() ? "" : ", ") + std::string(cpu::level_name(level));
    }
  } catch (const Failure& failure) {
    std::fprintf(stderr, "fuzz: %s\n", failure.what());
    return 1;
  }
  tell_what_ran();
  for (int64_t round = first; round < first + rounds; ++round) {
    try {
      fuzz_round(seed, round);
    } catch (const Failure& failure) {
      std::fprintf(stderr, "fuzz: %s\n%s", failure.what(), current);
      return 1;
    }
  }
  std::printf(
      "fuzz: %" PRId64 " rounds of seed %" PRIu64
      " at each of %s, every 16-bit number, rows beyond the 2^31st: no fault\n",
      rounds,
      seed,
      names.c_str());
  return 0;
}

} // namespace
} // namespace torchintro::fuzz

int main(int count, char** arguments) {
  return torchintro::fuzz::main(count, arguments);
}
