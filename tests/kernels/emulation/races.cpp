#include "races.h"

#include "machine.h"

#include <link.h>
#include <unistd.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <unordered_map>

namespace torchintro::emulation {
namespace {

constexpr uintptr_t kGranule = 2; // bytes
constexpr uintptr_t kPageBytes = 1024;
constexpr size_t kMostPages = 4096; // 200 MB of what is known

struct Access {
  uint32_t block = 0; // 0: none
  uint32_t barriers = 0;
  uint32_t warp_barriers = 0;
  uint32_t thread = 0;
  uint32_t code = 0; // counted from where the program lies

  bool operator==(const Access& other) const {
    return block == other.block && barriers == other.barriers && warp_barriers == other.warp_barriers &&
        thread == other.thread;
  }
};

// Reads since the last write. Two of the newest barrier interval are enough: if threads of several warps read, whoever
// writes in the same interval races with one of them; if one warp's, with the newest read that is not the writer's
// own.
struct Granule {
  Access write;
  Access reads[2]; // the newest first, by two threads
  bool several_warps = false; // in the interval of reads[0]
  uint32_t other_block = 0; // that reads, besides the one of reads[0]
  bool awaited = false; // an asynchronous copy is on its way here
};

struct Page {
  Granule granules[kPageBytes / kGranule];
};

bool compiled = false;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t page_number = 0;
Page* page = nullptr; // the last one

Granule& granule_of(uintptr_t address) {
  if (page == nullptr || address / kPageBytes != page_number) {
    page_number = address / kPageBytes;
    auto& found = pages[page_number];
    if (!found) {
      found = std::make_unique<Page>();
    }
    page = found.get();
  }
  return page->granules[address % kPageBytes / kGranule];
}

bool this_launch(const Access& access) {
  return access.block >= now.first_block;
}

bool ordered(const Access& before, const Access& access, bool shared) {
  if (!this_launch(before)) {
    return true;
  }
  if (before.block != access.block) {
    return shared; // another block's shared memory is another
  }
  return before.thread == access.thread || before.barriers < access.barriers ||
      (before.thread / kWarp == access.thread / kWarp && before.warp_barriers < access.warp_barriers);
}

uintptr_t program_begin() {
  uintptr_t begin = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) { // the program comes first
        *static_cast<uintptr_t*>(data) = info->dlpi_addr;
        return 1;
      },
      &begin);
  return begin;
}

// File and line, from the outermost function to the inlined ones.
std::string source_text(uint32_t code) {
  char program[500];
  const auto length = readlink("/proc/self/exe", program, sizeof program - 1);
  program[length < 0 ? 0 : length] = 0;
  char command[600];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x 2>/dev/null", program, code - 1);
  std::string text;
  if (FILE* output = popen(command, "r")) {
    char line[500];
    while (std::fgets(line, sizeof line, output) != nullptr) {
      std::string place = line;
      place = place.substr(place.rfind('/') + 1);
      place = place.substr(0, place.find_first_of(" \n"));
      text = place + (text.empty() ? "" : " > ") + text;
    }
    pclose(output);
  }
  return " at " + (text.empty() ? "code " + std::to_string(code) : text);
}

std::string who(const Access& access) {
  return "thread " + std::to_string(access.thread) + (access.block == now.block ? "" : " of an earlier block") +
      source_text(access.code);
}

[[noreturn]] void report(const char* what, uintptr_t address, const Access& access, const Access& before, bool shared) {
  const auto offset = address - reinterpret_cast<uintptr_t>(dynamic_shared());
  fail(
      "a race, without a barrier between: " + who(access) + what + who(before) + ", in " +
      (!shared                   ? std::string("global memory")
           : offset < kMaxShared ? "byte " + std::to_string(offset) + " of dynamic shared memory"
                                 : std::string("static shared memory")));
}

void note(const void* start, size_t bytes, bool writes, const void* code) {
  if (!compiled || !now.in_kernel || bytes == 0 || is_stack(start)) {
    return;
  }
  const bool shared = is_shared(start);
  static const uintptr_t begin = program_begin();
  const Access access{
      now.block,
      now.barriers,
      now.warp_barriers[now.thread / kWarp],
      now.thread,
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - begin)};
  const auto first = reinterpret_cast<uintptr_t>(start) / kGranule * kGranule;
  const auto end = reinterpret_cast<uintptr_t>(start) + bytes;
  for (uintptr_t address = first; address < end; address += kGranule) {
    Granule& granule = granule_of(address);
    if (granule.awaited) {
      report(
          writes ? " writes where a copy has not arrived, of " : " reads a copy that has not arrived, of ",
          address,
          access,
          granule.write,
          shared);
    }
    if (!ordered(granule.write, access, shared)) {
      report(
          writes ? " writes what was written by " : " reads what was written by ",
          address,
          access,
          granule.write,
          shared);
    }
    Access& newest = granule.reads[0];
    if (writes) {
      for (const Access& read : granule.reads) {
        if (!ordered(read, access, shared)) {
          report(" writes what was read by ", address, access, read, shared);
        }
      }
      const bool same_interval = newest.block == access.block && newest.barriers == access.barriers;
      if ((granule.several_warps && same_interval) ||
          (!shared && granule.other_block >= now.first_block && this_launch(newest))) {
        report(" writes what several read, among them ", address, access, newest, shared);
      }
      granule.write = access;
      newest = granule.reads[1] = Access();
      granule.several_warps = false;
      granule.other_block = 0;
    } else if (!(newest == access)) {
      if (newest.block != access.block) {
        if (this_launch(newest)) {
          granule.other_block = newest.block;
        }
        granule.reads[1] = Access();
        granule.several_warps = false;
      } else if (newest.barriers != access.barriers) {
        granule.reads[1] = Access();
        granule.several_warps = false;
      } else {
        granule.several_warps |= newest.thread / kWarp != access.thread / kWarp;
        if (newest.thread != access.thread) {
          granule.reads[1] = newest;
        }
      }
      newest = access;
    }
  }
}

} // namespace

void note_read(const void* address, size_t bytes, const void* code) {
  note(address, bytes, false, code);
}
void note_write(const void* address, size_t bytes, const void* code) {
  note(address, bytes, true, code);
}

namespace {

void set_awaited(const void* start, size_t bytes, bool awaited) {
  if (compiled) {
    const auto first = reinterpret_cast<uintptr_t>(start);
    for (uintptr_t address = first; address < first + bytes; address += kGranule) {
      granule_of(address).awaited = awaited;
    }
  }
}

} // namespace

void note_copy_leaves(const void* address, size_t bytes, const void* code) {
  note(address, bytes, true, code);
  set_awaited(address, bytes, true);
}
void note_copy_arrives(const void* address, size_t bytes, const void* code) {
  set_awaited(address, bytes, false);
  note(address, bytes, true, code);
}

bool races_are_found() {
  return compiled;
}

void forget_accesses(bool failed) {
  if (failed || pages.size() > kMostPages) {
    pages.clear();
    page = nullptr;
  }
}

} // namespace torchintro::emulation

// What a compiler's -fsanitize=thread calls.
extern "C" {

void __tsan_init() {
  torchintro::emulation::compiled = true;
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __tsan_read_range(void* address, size_t bytes) {
  torchintro::emulation::note_read(address, bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  torchintro::emulation::note_write(address, bytes, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define TORCHINTRO_ACCESS(name, bytes)                                              \
  void __tsan_read##name(void* address) {                                           \
    torchintro::emulation::note_read(address, bytes, __builtin_return_address(0));  \
  }                                                                                 \
  void __tsan_write##name(void* address) {                                          \
    torchintro::emulation::note_write(address, bytes, __builtin_return_address(0)); \
  }                                                                                 \
  void __tsan_volatile_read##name(void* address) {                                  \
    torchintro::emulation::note_read(address, bytes, __builtin_return_address(0));  \
  }                                                                                 \
  void __tsan_volatile_write##name(void* address) {                                 \
    torchintro::emulation::note_write(address, bytes, __builtin_return_address(0)); \
  }
TORCHINTRO_ACCESS(1, 1)
TORCHINTRO_ACCESS(2, 2)
TORCHINTRO_ACCESS(4, 4)
TORCHINTRO_ACCESS(8, 8)
TORCHINTRO_ACCESS(16, 16)
#undef TORCHINTRO_ACCESS
#define TORCHINTRO_ACCESS(name, bytes)                                              \
  void __tsan_unaligned_read##name(void* address) {                                 \
    torchintro::emulation::note_read(address, bytes, __builtin_return_address(0));  \
  }                                                                                 \
  void __tsan_unaligned_write##name(void* address) {                                \
    torchintro::emulation::note_write(address, bytes, __builtin_return_address(0)); \
  }
TORCHINTRO_ACCESS(2, 2)
TORCHINTRO_ACCESS(4, 4)
TORCHINTRO_ACCESS(8, 8)
TORCHINTRO_ACCESS(16, 16)
#undef TORCHINTRO_ACCESS

} // extern "C"
