#include "faults.h"

#include "cuda/kernels/device.cuh"

#include <cuda_fp16.h>

#include <algorithm>
#include <numeric>

namespace torchintro::fuzz {
namespace {

using cuda::launch;

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffff;

__device__ int thread_number() {
  return static_cast<int>(threadIdx.x);
}

// 0, 1, 2, ... in memory whose end AddressSanitizer watches.
std::vector<float> numbers(int count) {
  std::vector<float> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}

template <typename Expected>
bool is(const std::vector<float>& values, const Expected& expected) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] != static_cast<float>(expected(static_cast<int>(i)))) {
      return false;
    }
  }
  return true;
}

// --- barriers

__global__ void reverse(float* values, bool barrier) {
  auto* shared = cuda::dynamic_shared<float>();
  const int t = thread_number();
  shared[t] = values[t];
  if (barrier) {
    __syncthreads();
  }
  values[t] = shared[kThreads - 1 - t];
}

bool read_before_barrier(bool faulty) {
  auto values = numbers(kThreads);
  launch(reverse, 1, kThreads, kThreads * sizeof(float), nullptr, values.data(), !faulty);
  return is(values, [](int i) { return kThreads - 1 - i; });
}

// Whatever the order, the result is right.
__global__ void write_the_same(float* values, bool barrier) {
  __shared__ float shared[kThreads];
  const int t = thread_number();
  shared[t] = 1;
  __syncthreads();
  values[t] = shared[t] + shared[(t + 40) % kThreads];
  if (barrier) {
    __syncthreads();
  }
  shared[t] = 1;
}

bool write_before_barrier(bool faulty) {
  auto values = numbers(kThreads);
  launch(write_the_same, 1, kThreads, 0, nullptr, values.data(), !faulty);
  return is(values, [](int) { return 2; });
}

__global__ void leave_early(float* values, int stay) {
  const int t = thread_number();
  if (t < stay) {
    __syncthreads();
    values[t] = 1;
  }
}

bool thread_returns_before_barrier(bool faulty) {
  auto values = numbers(kThreads);
  launch(leave_early, 1, kThreads, 0, nullptr, values.data(), faulty ? kThreads - 1 : kThreads);
  return is(values, [](int) { return 1; });
}

__global__ void two_barriers(float* values, bool apart) {
  const int t = thread_number();
  if (apart && t % 2 == 1) {
    __syncthreads();
    values[t] = 0;
  } else {
    __syncthreads();
    values[t] = 1;
  }
}

bool two_barriers_at_once(bool faulty) {
  auto values = numbers(kThreads);
  launch(two_barriers, 1, kThreads, 0, nullptr, values.data(), faulty);
  return is(values, [](int) { return 1; });
}

// --- warps

__global__ void exchange_in_warp(float* values, bool barrier) {
  __shared__ float shared[kThreads];
  const int t = thread_number();
  shared[t] = values[t];
  const float other = __shfl_xor_sync(kAll, values[t], 1); // the lanes meet, but their memory is not ordered
  if (barrier) {
    __syncwarp();
  }
  values[t] = other + shared[t ^ 1];
}

bool shuffle_for_syncwarp(bool faulty) {
  auto values = numbers(kThreads);
  launch(exchange_in_warp, 1, kThreads, 0, nullptr, values.data(), !faulty);
  return is(values, [](int i) { return 2 * (i ^ 1); });
}

__global__ void exchange_between_warps(float* values, bool whole_block) {
  auto* shared = cuda::dynamic_shared<float>();
  const int t = thread_number();
  shared[t] = values[t];
  if (whole_block) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  values[t] = shared[t ^ 32];
}

bool syncwarp_for_syncthreads(bool faulty) {
  auto values = numbers(kThreads);
  launch(exchange_between_warps, 1, kThreads, kThreads * sizeof(float), nullptr, values.data(), !faulty);
  return is(values, [](int i) { return i ^ 32; });
}

__global__ void add_in_warp(double* values, int lanes) {
  const int t = thread_number();
  double value = values[t];
  if (t % 32 < lanes) {
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(kAll, value, offset);
    }
  }
  values[t] = value;
}

bool add_in_warps(int threads, int lanes) {
  std::vector<double> values(kThreads, 1.0);
  launch(add_in_warp, 1, threads, 0, nullptr, values.data(), lanes);
  return std::all_of(values.begin(), values.end(), [](double value) { return value == 32; });
}

bool lane_missing_at_shuffle(bool faulty) {
  return add_in_warps(kThreads, faulty ? 31 : 32);
}

bool half_a_warp_at_shuffle(bool faulty) {
  return add_in_warps(faulty ? kThreads - 16 : kThreads, 32);
}

// --- blocks

__global__ void add_to_others(float* values, int stride) {
  if (thread_number() == 0) {
    values[blockIdx.x * stride] = 7; // the same from each block
  }
}

bool blocks_write_the_same(bool faulty) {
  auto values = numbers(4);
  launch(add_to_others, 4, kThreads, 0, nullptr, values.data(), faulty ? 0 : 1);
  return faulty || is(values, [](int) { return 7; });
}

__global__ void read_neighbour(const float* from, float* to) {
  if (thread_number() == 0) {
    to[blockIdx.x] = from[(blockIdx.x + 1) % gridDim.x] * 0;
  }
}

bool block_reads_of_another(bool faulty) {
  const auto from = numbers(4);
  auto to = numbers(4);
  launch(read_neighbour, 4, kThreads, 0, nullptr, faulty ? to.data() : from.data(), to.data());
  return is(to, [](int) { return 0; });
}

// --- asynchronous copies

constexpr int kParts = 3;
constexpr int kCopied = kParts * kThreads * 4;

// Three groups of one copy a thread; waits until all but `newest` have arrived, then everyone reads the first two.
__global__ void copy(const float* from, float* to, int newest, bool barrier) {
  auto* shared = cuda::dynamic_shared<float>();
  const int t = thread_number();
  for (int part = 0; part < kParts; ++part) {
    const int first = (part * kThreads + t) * 4;
    cuda::copy_async<16>(shared + first, from + first, part == 0 || t > 0);
    cuda::copy_async_commit();
  }
  if (newest == 1) {
    cuda::copy_async_wait<1>();
  } else {
    cuda::copy_async_wait<2>();
  }
  if (barrier) {
    __syncthreads();
  }
  for (int i = t; i < 2 * kThreads * 4; i += kThreads) {
    to[i] = shared[i];
  }
}

bool run_copy(int newest, bool barrier) {
  const auto from = numbers(kCopied);
  auto to = numbers(2 * kThreads * 4);
  launch(copy, 1, kThreads, kCopied * sizeof(float), nullptr, from.data(), to.data(), newest, barrier);
  return is(to, [](int i) { return i >= kThreads * 4 && i < kThreads * 4 + 4 ? 0 : i; });
}

bool wait_for_too_few(bool faulty) {
  return run_copy(faulty ? 2 : 1, true);
}

bool wait_without_barrier(bool faulty) {
  return run_copy(1, !faulty);
}

// Shared memory that a copy still on its way will overwrite.
__global__ void use_again(const float* from, float* to, bool wait) {
  auto* shared = cuda::dynamic_shared<float>();
  const int t = thread_number();
  cuda::copy_async<4>(shared + t, from + t, true);
  cuda::copy_async_commit();
  if (wait) {
    cuda::copy_async_wait<0>();
  }
  __syncthreads();
  shared[(t + 1) % kThreads] = 5;
  __syncthreads();
  to[t] = shared[t];
}

bool write_where_a_copy_arrives(bool faulty) {
  const auto from = numbers(kThreads);
  auto to = numbers(kThreads);
  launch(use_again, 1, kThreads, kThreads * sizeof(float), nullptr, from.data(), to.data(), !faulty);
  return is(to, [](int) { return 5; });
}

// --- memory

__global__ void beyond(float* values, int static_index, int dynamic_index, int global_index) {
  __shared__ float fixed[kThreads];
  auto* dynamic = cuda::dynamic_shared<float>();
  if (thread_number() == 0) {
    fixed[static_index] = 1;
    dynamic[dynamic_index] = 2;
    values[global_index] = fixed[static_index] + dynamic[dynamic_index];
  }
}

bool run_beyond(int static_index, int dynamic_index, int global_index) {
  std::vector<float> values(kThreads);
  launch(
      beyond, 1, kThreads, kThreads * sizeof(float), nullptr, values.data(), static_index, dynamic_index, global_index);
  return values[kThreads - 1] == 3;
}

bool beyond_static_shared(bool faulty) {
  return run_beyond(kThreads - (faulty ? 0 : 1), kThreads - 1, kThreads - 1);
}
bool beyond_dynamic_shared(bool faulty) {
  return run_beyond(kThreads - 1, kThreads - (faulty ? 0 : 1), kThreads - 1);
}
bool beyond_global(bool faulty) {
  return run_beyond(kThreads - 1, kThreads - 1, kThreads - (faulty ? 0 : 1));
}

__global__ void trust_dynamic_shared(float* values, bool clear) {
  auto* shared = cuda::dynamic_shared<float>();
  const int t = thread_number();
  if (clear) {
    shared[t] = 0;
  }
  values[t] = shared[t] * 0;
}

__global__ void trust_static_shared(float* values, bool clear) {
  __shared__ float shared[kThreads];
  const int t = thread_number();
  if (clear) {
    shared[t] = 0;
  }
  values[t] = shared[t] * 0;
}

bool run_trust(void (*kernel)(float*, bool), bool clear) {
  auto values = numbers(kThreads);
  launch(kernel, 1, kThreads, kThreads * sizeof(float), nullptr, values.data(), clear);
  return is(values, [](int) { return 0; });
}

bool dynamic_shared_not_initialized(bool faulty) {
  return run_trust(trust_dynamic_shared, !faulty);
}
bool static_shared_not_initialized(bool faulty) {
  return run_trust(trust_static_shared, !faulty);
}

__global__ void load_at(float* values, int bytes) {
  auto* shared = cuda::dynamic_shared<char>();
  for (int i = thread_number() * 4; i < 1024; i += 32 * 4) {
    *reinterpret_cast<float*>(shared + i) = 0;
  }
  __syncthreads();
  uint32_t parts[4];
  cuda::load_matrices(parts, shared + thread_number() * 16 + bytes);
  values[thread_number()] = static_cast<float>(parts[0] + parts[1] + parts[2] + parts[3]);
}

bool matrix_row_not_aligned(bool faulty) {
  auto values = numbers(32);
  launch(load_at, 1, 32, 1024, nullptr, values.data(), faulty ? 8 : 16);
  return is(values, [](int) { return 0; });
}

// --- matrices

__global__ void multiply_kernel(const float* a, const float* b, float* c, From from) {
  alignas(16) __shared__ __nv_bfloat16 a_rows[16][16];
  alignas(16) __shared__ __nv_bfloat16 b_rows[16][8];
  alignas(16) __shared__ __nv_bfloat16 b_columns[8][16];
  const int lane = thread_number();
  for (int i = lane; i < 16 * 16; i += 32) {
    a_rows[i / 16][i % 16] = __float2bfloat16_rn(a[i]);
  }
  for (int i = lane; i < 16 * 8; i += 32) {
    b_rows[i / 8][i % 8] = b_columns[i % 8][i / 8] = __float2bfloat16_rn(b[i]);
  }
  __syncwarp();

  uint32_t a_parts[4];
  cuda::load_matrices(a_parts, &a_rows[lane % 16][lane / 16 * 8]);
  uint32_t b_parts[4]; // k 0 .. 7, k 8 .. 15, and both again
  if (from == From::Columns) {
    cuda::load_matrices(b_parts, &b_columns[lane % 8][lane / 8 % 2 * 8]);
  } else if (from == From::RowsByLoad) {
    cuda::load_matrices_transposed(b_parts, b_rows[lane % 16]);
  } else {
    cuda::load_matrices(b_parts, b_rows[lane % 16]);
    b_parts[0] = cuda::transpose_matrix(b_parts[0]);
    b_parts[1] = cuda::transpose_matrix(b_parts[1]);
  }
  float sums[4] = {1, 1, 1, 1};
  cuda::multiply_add(sums, a_parts, b_parts[0], b_parts[1]);
  for (int i = 0; i < 4; ++i) {
    c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i] - 1;
  }
}

template <typename Round>
std::vector<float> rounded(const std::vector<float>& values, const Round& round) {
  std::vector<float> result(values.size());
  std::transform(values.begin(), values.end(), result.begin(), round);
  return result;
}

} // namespace

Product multiply(const std::array<float, 16 * 16>& a, const std::array<float, 16 * 8>& b, From from) {
  Product c{};
  launch(multiply_kernel, 1, 32, 0, nullptr, a.data(), b.data(), c.data(), from);
  return c;
}

std::vector<float> round_to_bfloat16(const std::vector<float>& values) {
  return rounded(values, [](float value) { return __bfloat162float(__float2bfloat16_rn(value)); });
}
std::vector<float> round_to_float16(const std::vector<float>& values) {
  return rounded(values, [](float value) { return __half2float(__float2half_rn(value)); });
}

std::vector<Fault> faults() {
  return {
      {"a read before the barrier", Needs::Nothing, read_before_barrier},
      {"a write before the barrier, of the same value", Needs::Races, write_before_barrier},
      {"a thread that returns before a barrier", Needs::Nothing, thread_returns_before_barrier},
      {"two barriers at once", Needs::Nothing, two_barriers_at_once},
      {"a shuffle in place of __syncwarp", Needs::Races, shuffle_for_syncwarp},
      {"__syncwarp in place of __syncthreads", Needs::Nothing, syncwarp_for_syncthreads},
      {"a lane missing at a shuffle", Needs::Nothing, lane_missing_at_shuffle},
      {"half a warp at a shuffle", Needs::Nothing, half_a_warp_at_shuffle},
      {"blocks that write the same", Needs::Races, blocks_write_the_same},
      {"a block that reads what another writes", Needs::Races, block_reads_of_another},
      {"a wait for too few copies", Needs::Nothing, wait_for_too_few},
      {"a wait for copies without a barrier", Needs::Nothing, wait_without_barrier},
      {"a write to where a copy arrives", Needs::Races, write_where_a_copy_arrives},
      {"an access beyond static shared memory", Needs::AddressSanitizer, beyond_static_shared},
      {"an access beyond dynamic shared memory", Needs::AddressSanitizer, beyond_dynamic_shared},
      {"an access beyond global memory", Needs::AddressSanitizer, beyond_global},
      {"dynamic shared memory that is not initialized", Needs::Nothing, dynamic_shared_not_initialized},
      {"static shared memory that is not initialized", Needs::NoAddressSanitizer, static_shared_not_initialized},
      {"a matrix's row that is not aligned", Needs::Nothing, matrix_row_not_aligned},
  };
}

} // namespace torchintro::fuzz
