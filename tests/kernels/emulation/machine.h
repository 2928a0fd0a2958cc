// A machine that runs CUDA kernels, compiled as C++, on the processor: what the headers beside this one are made of.
//
// Blocks run one after another in random order. A block's threads are fibers, which take turns in random order and
// only where they synchronise, so what a kernel does depends on the seed alone. A fault of the kernel ends the launch
// with an Error that says what it was:
//
//   barriers     a thread that is missing at a barrier or at a warp's collective, or that waits at another one
//   memory       AddressSanitizer sees accesses outside; shared memory is filled with NaN before each block
//   copies       copy_async leaves NaN behind and brings the values at the wait that asks for them, and not earlier
//   races        where compiled with -fsanitize=thread: see races.h
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace torchintro::emulation {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kMaxShared = 227 * 1024; // dynamic shared memory of a block on the largest GPU
inline constexpr uint32_t kAllLanes = 0xffffffff;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order of blocks and threads from here on.
void seed(uint64_t seed);

// Where in the source a thread waits.
struct Place {
  const char* file;
  int line;
};

// --- called by the host

// Runs body(context) on every thread of every block; returns false for sizes that CUDA does not launch.
bool run_grid(int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*), const void* context);

// --- called by a kernel's thread

// Ends the launch with an Error.
[[noreturn]] void fail(const std::string& what);

void* dynamic_shared();
bool is_shared(const void* address); // the block's
bool is_stack(const void* address); // a thread's own

void block_barrier(Place place);
void warp_barrier(uint32_t mask, Place place);

// Waits for all lanes of `mask`; the last one calls perform(lanes), where lanes[l] is lane l's `mine`, or null beside
// `mask`.
using Perform = void (*)(void* const* lanes);
void collective(const char* name, uint32_t mask, void* mine, Perform perform, Place place);

void copy_async(void* shared, const void* global, size_t bytes, bool present, Place place);
void copy_async_commit();
void copy_async_wait(uint64_t newest);

// __shfl_*_sync of up to 8 bytes: the lane's value in, lane `source`'s out.
uint64_t shuffle(const char* name, uint32_t mask, uint64_t value, int source, Place place);

// The instructions of a warp on matrices: see csrc/cuda/kernels/device.cuh.
void load_matrices(uint32_t (&parts)[4], const void* row, bool transposed, Place place);
uint32_t transpose_matrix(uint32_t part, Place place);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place);

// --- for races.cpp

// Who runs, and how many barriers it has passed.
struct Now {
  bool in_kernel;
  uint32_t first_block; // of this launch; blocks are counted from the program's start
  uint32_t block;
  uint32_t barriers; // of the block
  uint32_t warp_barriers[kMaxThreads / kWarp];
  uint32_t thread;
};
extern Now now;
std::string place_text(Place place);

} // namespace torchintro::emulation
