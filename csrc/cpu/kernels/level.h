// The instruction sets the CPU kernels are compiled for, and the one in use.
#pragma once

namespace torchintro::cpu {

enum class Level { Baseline = 0, Avx2 = 1, Avx512 = 2 };

// The best level that this processor has.
Level best_level();

// That one, or the one that TORCHINTRO_CPU_LEVEL (baseline, avx2, avx512) names if it is lower. Read once.
Level active_level();

const char* level_name(Level level);

} // namespace torchintro::cpu
