// Races between a kernel's threads: two accesses to the same memory, at least one of them a write, by two threads that
// no barrier stands between. Not between blocks either, which nothing orders within a launch.
//
// A file compiled with -fsanitize=thread calls __tsan_read4 and the like at every access; ThreadSanitizer's own
// runtime knows no barriers, so races.cpp takes its place. It keeps, for every two bytes (no kernel here has smaller
// numbers), who wrote them last and who has read them since, which finds every race of the accesses that happened, in
// whatever order they did. What orders memory: __syncthreads in the block, __syncwarp in the warp (all of it, whatever
// the mask); no shuffle, no matrix instruction.
#pragma once

#include <cstddef>

namespace torchintro::emulation {

// Accesses by the thread that runs, for those the compiler does not see. `code`: where it is in the program.
void note_read(const void* address, size_t bytes, const void* code);
void note_write(const void* address, size_t bytes, const void* code);

// The destination of an asynchronous copy: nobody's, until it has arrived.
void note_copy_leaves(const void* address, size_t bytes, const void* code);
void note_copy_arrives(const void* address, size_t bytes, const void* code);

// Whether anything was compiled with -fsanitize=thread.
bool races_are_found();

// What is known is of no use any more: a launch ended, well or not.
void forget_accesses(bool failed);

} // namespace torchintro::emulation
