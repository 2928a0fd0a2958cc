// Which of the CPU's two regimes a problem belongs to: the one place that decides it.
#pragma once

#include "problem.h"

namespace torchintro::cpu {

enum class Regime { FewOutputs, ManyOutputs };

Regime choose_regime(const Problem& problem);

} // namespace torchintro::cpu
