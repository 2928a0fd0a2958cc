#include "cpu/kernels/level.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace torchintro::cpu {

Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Level::Avx512 : avx2 ? Level::Avx2 : Level::Baseline;
#else
  return Level::Baseline;
#endif
}

namespace {

Level choose_level() {
  const Level best = best_level();
  const char* wanted = std::getenv("TORCHINTRO_CPU_LEVEL");
  if (wanted != nullptr) {
    for (const Level level : {Level::Baseline, Level::Avx2, Level::Avx512}) {
      if (std::strcmp(wanted, level_name(level)) == 0 && level < best) {
        return level;
      }
    }
  }
  return best;
}

} // namespace

Level active_level() {
  static const Level level = choose_level();
  return level;
}

const char* level_name(Level level) {
  return level == Level::Avx512 ? "avx512" : level == Level::Avx2 ? "avx2" : "baseline";
}

} // namespace torchintro::cpu
