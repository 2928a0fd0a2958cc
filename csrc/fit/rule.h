// One update of one model's parameters, as torch.optim's single-tensor implementations compute it. Knows nothing of torch.
//
// Bytes per parameter: p, its copy and the optimizer's memory, each read and written once.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TORCHINTRO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TORCHINTRO_HOST_DEVICE inline
#endif

namespace torchintro::fit {

enum class UpdateRule { Sgd, Momentum, Nesterov, Adam, AdamAmsgrad };

// The numbers of one update, the same for all of a model's parameters. Computed in float64 as Python does, then rounded to T,
// as ATen rounds a scalar.
template <typename T>
struct Update {
  UpdateRule kind;
  bool first; // of all updates: the momentum buffer begins as the gradient itself
  T decay; // g += decay p
  T shrink; // p *= shrink, AdamW's decoupled decay
  T step; // p -= step * direction
  T momentum, damped; // damped: 1 - dampening
  T beta1_rest, beta2, beta2_rest, epsilon; // rest: 1 - beta
  T second_root; // sqrt(1 - beta2^t)
};

// A model's hyper-parameters as the columns of `options` (see fit.h) name them. `beta1_power` and `beta2_power` are beta^t, t
// the number of this update from 1 on.
template <typename T>
TORCHINTRO_HOST_DEVICE Update<T> make_update(
    bool adam, bool decoupled, const double* options, double lr, bool first, double beta1_power, double beta2_power) {
  Update<T> u{};
  u.first = first;
  u.shrink = T(1);
  if (!adam) {
    u.kind = options[0] == 0 ? UpdateRule::Sgd : options[3] != 0 ? UpdateRule::Nesterov : UpdateRule::Momentum;
    u.momentum = static_cast<T>(options[0]);
    u.damped = static_cast<T>(1 - options[1]);
    u.decay = static_cast<T>(options[2]);
    u.step = static_cast<T>(lr);
    return u;
  }
  u.kind = options[4] != 0 ? UpdateRule::AdamAmsgrad : UpdateRule::Adam;
  u.decay = decoupled ? T(0) : static_cast<T>(options[2]);
  u.shrink = decoupled ? static_cast<T>(1 - lr * options[2]) : T(1);
  u.beta1_rest = static_cast<T>(1 - options[0]);
  u.beta2 = static_cast<T>(options[1]);
  u.beta2_rest = static_cast<T>(1 - options[1]);
  u.epsilon = static_cast<T>(options[3]);
  u.step = static_cast<T>(lr / (1 - beta1_power));
  u.second_root = static_cast<T>(sqrt(1 - beta2_power));
  return u;
}

// p with gradient g; `memory[i * stride]` are the optimizer's rows of this parameter (fit.h: momentum buffer, or the moments).
template <UpdateRule Kind, typename T>
TORCHINTRO_HOST_DEVICE T updated(const Update<T>& u, T p, T g, T* memory, int64_t stride) {
  g += u.decay * p;
  if constexpr (Kind == UpdateRule::Sgd) {
    return p - u.step * g;
  } else if constexpr (Kind == UpdateRule::Momentum || Kind == UpdateRule::Nesterov) {
    const T buffer = u.first ? g : u.momentum * memory[0] + u.damped * g;
    memory[0] = buffer;
    return p - u.step * (Kind == UpdateRule::Nesterov ? g + u.momentum * buffer : buffer);
  } else {
    const T first = memory[0] + u.beta1_rest * (g - memory[0]);
    const T second = u.beta2 * memory[stride] + u.beta2_rest * g * g;
    memory[0] = first;
    memory[stride] = second;
    T root = second;
    if constexpr (Kind == UpdateRule::AdamAmsgrad) {
      // As torch.maximum: NaN wins.
      root = memory[2 * stride] >= second ? memory[2 * stride] : second;
      memory[2 * stride] = root;
    }
    return u.shrink * p - u.step * first / (sqrt(root) / u.second_root + u.epsilon);
  }
}

} // namespace torchintro::fit
