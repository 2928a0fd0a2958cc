#include "machine.h"

#include "cuda_runtime.h"
#include "fiber.h"
#include "races.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

#if defined(__x86_64__)
asm(R"(
.text
.globl torchintro_emulation_switch
.type torchintro_emulation_switch, @function
torchintro_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size torchintro_emulation_switch, .-torchintro_emulation_switch
)");
#endif

// The program's own memory, and in it the section of all __shared__ variables.
extern "C" {
extern unsigned char __executable_start[] __attribute__((weak));
extern unsigned char _end[] __attribute__((weak));
extern unsigned char __start_cuda_shared[] __attribute__((weak));
extern unsigned char __stop_cuda_shared[] __attribute__((weak));
}

namespace torchintro::emulation {

Now now{};

namespace {

cudaError_t last_error = cudaSuccess;

struct Copy { // one that is on its way
  void* shared;
  const void* global;
  size_t bytes;
  bool present;
  uint64_t group;
  const void* code;
};

struct Thread {
  const char* waits_at = nullptr; // a barrier or a collective; null where it can run or has returned
  Place place{};
  bool returned = false;
  std::vector<Copy> copies; // in order
  uint64_t groups = 0; // committed
};

struct Collective { // the one that lanes of a mask wait at
  const char* name = nullptr;
  uint32_t mask = 0;
  Place place{};
  uint32_t arrived = 0;
  void* lanes[kWarp] = {};
};

bool same_place(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

class Machine {
 public:
  static Machine& machine();

  Machine()
      : stacks_(kMaxThreads) {
    for (size_t i = 0; i < kMaxThreads; ++i) {
      fibers_.push_back(stacks_.fiber(i));
      fibers_.back().start_at(run_thread);
    }
  }

  bool run_grid(int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*), const void* context) {
    if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMaxThreads || shared_bytes > kMaxShared) {
      last_error = cudaErrorInvalidConfiguration;
      return false;
    }
    body_ = body;
    context_ = context;
    threads_ = static_cast<uint32_t>(threads);
    blockDim = dim3(threads_);
    gridDim = dim3(static_cast<unsigned>(blocks));
    shared_bytes_ = shared_bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes) != 0) { // exactly as many, for AddressSanitizer
      throw std::bad_alloc();
    }
    shared_.reset(static_cast<unsigned char*>(memory));

    std::vector<uint32_t> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size() - 1; i > 0; --i) {
      std::swap(order[i], order[below(i + 1)]);
    }
    now.first_block = now.block + 1;
    for (const uint32_t block : order) {
      run_block(block);
    }
    shared_.reset();
    forget_accesses(false);
    return true;
  }

  void* dynamic_shared() const {
    return shared_.get();
  }
  bool is_shared(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return static_cast<size_t>(byte - shared_.get()) < shared_bytes_ || (byte >= __executable_start && byte < _end);
  }
  bool is_stack(const void* address) const {
    return stacks_.holds(address);
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ = "block " + std::to_string(blockIdx.x) + " of " + std::to_string(gridDim.x) + ": " + what;
    failed_ = true;
    change_to_host();
    std::abort(); // nobody comes back
  }

  void block_barrier(Place place) {
    Thread& thread = thread_now();
    if (waiting_ > 0 && !same_place(place, barrier_place_)) {
      fail(
          "a barrier divides the block: thread " + std::to_string(now.thread) + " is at " + place_text(place) +
          ", others wait at " + place_text(barrier_place_));
    }
    barrier_place_ = place;
    if (++waiting_ < threads_) {
      thread.waits_at = "__syncthreads";
      thread.place = place;
      give_way();
      return;
    }
    waiting_ = 0;
    ++now.barriers;
    for (uint32_t i = 0; i < threads_; ++i) {
      threads_now_[i].waits_at = nullptr;
      ready_.push_back(i);
    }
    give_way();
  }

  void collective(const char* name, uint32_t mask, void* mine, Perform perform, Place place) {
    const uint32_t lane = now.thread % kWarp;
    if ((mask >> lane & 1) == 0) {
      fail(
          "lane " + std::to_string(lane) + " calls " + name + " of " + place_text(place) +
          " with a mask that leaves it out");
    }
    Collective& waiting = collectives_[now.thread / kWarp][__builtin_ctz(mask)];
    if (waiting.arrived == 0) {
      waiting = {name, mask, place, 0, {}};
    } else if (waiting.mask != mask || !same_place(waiting.place, place) || waiting.name != name) {
      fail(
          "a warp is divided: lane " + std::to_string(lane) + " calls " + name + " of " + place_text(place) +
          ", others wait at " + waiting.name + " of " + place_text(waiting.place));
    }
    waiting.lanes[lane] = mine;
    waiting.arrived |= 1u << lane;
    if (waiting.arrived != mask) {
      Thread& thread = thread_now();
      thread.waits_at = name;
      thread.place = place;
      give_way();
      return;
    }
    perform(waiting.lanes);
    waiting.arrived = 0;
    const uint32_t first = now.thread - lane;
    for (uint32_t other = 0; other < kWarp; ++other) {
      if ((mask >> other & 1) != 0 && other != lane) {
        threads_now_[first + other].waits_at = nullptr;
        ready_.push_back(first + other);
      }
    }
  }

  // What a wrong kernel reads before the copy has arrived is NaN, and what it writes there is lost when it arrives.
  void copy_async(void* shared, const void* global, size_t bytes, bool present, Place place, const void* code) {
    if (!is_shared(shared) || (present && is_shared(global))) {
      fail("copy_async of " + place_text(place) + " does not copy from global to shared memory");
    }
    if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 ||
        (present && reinterpret_cast<uintptr_t>(global) % bytes != 0)) {
      fail("copy_async of " + place_text(place) + ": an address is not a multiple of " + std::to_string(bytes));
    }
    std::memset(shared, 0xff, bytes);
    note_copy_leaves(shared, bytes, code);
    Thread& thread = thread_now();
    thread.copies.push_back({shared, global, bytes, present, thread.groups, code});
  }
  void copy_async_commit() {
    ++thread_now().groups;
  }
  // Groups below `end` arrive.
  void bring_copies(uint64_t end) {
    auto& copies = thread_now().copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < end; ++done) {
      const Copy& copy = copies[done];
      if (copy.present) {
        std::memcpy(copy.shared, copy.global, copy.bytes);
        note_read(copy.global, copy.bytes, copy.code);
      } else {
        std::memset(copy.shared, 0, copy.bytes);
      }
      note_copy_arrives(copy.shared, copy.bytes, copy.code);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
  }
  void copy_async_wait(uint64_t newest) {
    const uint64_t groups = thread_now().groups;
    bring_copies(groups > newest ? groups - newest : 0);
  }

  void seed(uint64_t seed) {
    random_ = seed * 2 + 1;
  }

 private:
  uint64_t next_random() { // splitmix64
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t end) {
    return static_cast<size_t>((next_random() >> 32) * end >> 32);
  }

  Thread& thread_now() {
    return threads_now_[now.thread];
  }

  static void run_thread() {
    Fiber::entered();
    Machine& machine = Machine::machine();
    for (;;) { // once for each block
      machine.body_(machine.context_);
      machine.bring_copies(UINT64_MAX); // on a GPU they arrive, too
      machine.thread_now().returned = true;
      machine.give_way();
    }
  }

  void run_block(uint32_t block) {
    blockIdx = {block, 0, 0};
    ++now.block;
    now.barriers = 0;
    std::fill(std::begin(now.warp_barriers), std::end(now.warp_barriers), 0);
    std::memset(shared_.get(), 0xff, shared_bytes_);
    if (__start_cuda_shared != nullptr) {
      std::memset(__start_cuda_shared, 0xff, static_cast<size_t>(__stop_cuda_shared - __start_cuda_shared));
    }
    waiting_ = 0;
    newest_first_ = next_random() % 4 == 0;
    ready_.clear();
    for (uint32_t i = 0; i < threads_; ++i) {
      threads_now_[i].waits_at = nullptr;
      threads_now_[i].returned = false;
      threads_now_[i].copies.clear();
      threads_now_[i].groups = 0;
      ready_.push_back(i);
    }
    for (auto& warp : collectives_) {
      for (Collective& waiting : warp) {
        waiting.arrived = 0;
      }
    }
    now.in_kernel = true;
    fiber_now_ = &host_;
    give_way();
    now.in_kernel = false;
    if (!failed_ && !std::all_of(threads_now_, threads_now_ + threads_, [](const Thread& t) { return t.returned; })) {
      failed_ = true;
      error_ = "block " + std::to_string(block) + " of " + std::to_string(gridDim.x) + " is stuck: " + who_waits();
    }
    if (failed_) {
      failed_ = false;
      for (Fiber& fiber : fibers_) { // what they were about to do is over
        fiber.start_at(run_thread);
      }
      forget_accesses(true);
      throw Error(error_);
    }
  }

  // Every place where threads wait, with one of them.
  std::string who_waits() const {
    std::string text;
    uint32_t returned = 0;
    std::vector<std::pair<const Thread*, uint32_t>> groups;
    for (uint32_t i = 0; i < threads_; ++i) {
      const Thread& thread = threads_now_[i];
      returned += thread.returned ? 1 : 0;
      if (thread.waits_at == nullptr) {
        continue;
      }
      const auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
        return group.first->waits_at == thread.waits_at && same_place(group.first->place, thread.place);
      });
      if (group == groups.end()) {
        groups.emplace_back(&thread, 1);
      } else {
        ++group->second;
      }
    }
    for (const auto& [thread, count] : groups) {
      text += std::to_string(count) + " threads (one is " + std::to_string(thread - threads_now_) + ") wait at " +
          thread->waits_at + " of " + place_text(thread->place) + ", ";
    }
    return text + std::to_string(returned) + " have returned";
  }

  // The thread that runs gives way to a random one of those that can run, or to the host if there is none.
  void give_way() {
    if (ready_.empty()) {
      change_to_host();
      return;
    }
    const size_t chosen = newest_first_ ? ready_.size() - 1 : below(ready_.size());
    const uint32_t next = ready_[chosen];
    ready_[chosen] = ready_.back();
    ready_.pop_back();
    now.thread = next;
    threadIdx.x = next;
    Fiber& from = *fiber_now_;
    fiber_now_ = &fibers_[next];
    if (fiber_now_ != &from) {
      from.change_to(*fiber_now_);
    }
  }
  void change_to_host() {
    Fiber& from = *fiber_now_;
    fiber_now_ = &host_;
    from.change_to(host_);
  }

  struct Free {
    void operator()(unsigned char* memory) const {
      std::free(memory);
    }
  };

  Stacks stacks_;
  std::vector<Fiber> fibers_;
  Fiber host_;
  Fiber* fiber_now_ = &host_;
  uint64_t random_ = 1;

  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  uint32_t threads_ = 0;
  size_t shared_bytes_ = 0;
  std::unique_ptr<unsigned char, Free> shared_;

  // Of the block that runs.
  Thread threads_now_[kMaxThreads];
  Collective collectives_[kMaxThreads / kWarp][kWarp]; // by the lowest lane of the mask
  std::vector<uint32_t> ready_;
  bool newest_first_ = false; // a warp then runs as far ahead of the others as it can
  uint32_t waiting_ = 0; // at the block's barrier
  Place barrier_place_{};
  bool failed_ = false;
  std::string error_;
};

Machine& Machine::machine() {
  static Machine one;
  return one;
}

} // namespace

void seed(uint64_t seed) {
  Machine::machine().seed(seed);
}

bool run_grid(int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*), const void* context) {
  return Machine::machine().run_grid(blocks, threads, shared_bytes, body, context);
}

void fail(const std::string& what) {
  Machine::machine().fail(what);
}

void* dynamic_shared() {
  return Machine::machine().dynamic_shared();
}
bool is_shared(const void* address) {
  return Machine::machine().is_shared(address);
}
bool is_stack(const void* address) {
  return Machine::machine().is_stack(address);
}

void block_barrier(Place place) {
  Machine::machine().block_barrier(place);
}

void warp_barrier(uint32_t mask, Place place) {
  const auto pass = [](void* const*) { ++now.warp_barriers[now.thread / kWarp]; };
  Machine::machine().collective("__syncwarp", mask, nullptr, pass, place);
}

void collective(const char* name, uint32_t mask, void* mine, Perform perform, Place place) {
  Machine::machine().collective(name, mask, mine, perform, place);
}

void copy_async(void* shared, const void* global, size_t bytes, bool present, Place place) {
  Machine::machine().copy_async(shared, global, bytes, present, place, __builtin_return_address(0));
}
void copy_async_commit() {
  Machine::machine().copy_async_commit();
}
void copy_async_wait(uint64_t newest) {
  Machine::machine().copy_async_wait(newest);
}

std::string place_text(Place place) {
  return std::string(place.file) + ":" + std::to_string(place.line);
}

} // namespace torchintro::emulation

cudaError_t cudaGetLastError() {
  return std::exchange(torchintro::emulation::last_error, cudaSuccess);
}
