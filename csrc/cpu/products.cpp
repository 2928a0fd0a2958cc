#include "cpu/products.h"

#include "cpu/kernels/matrix_route.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace torchintro::cpu {
namespace {

using LinearPointwise = at::Tensor(
    const at::Tensor&,
    const at::Tensor&,
    const std::optional<at::Tensor>&,
    std::string_view,
    c10::List<std::optional<at::Scalar>>,
    std::optional<std::string_view>);

// oneDNN's x w' + b, an operator that Inductor's graphs call; a torch without it, or with another signature, has BLAS.
const std::optional<c10::TypedOperatorHandle<LinearPointwise>>& onednn_linear() {
  static const auto handle = []() -> std::optional<c10::TypedOperatorHandle<LinearPointwise>> {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!schema || !schema->hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
      return std::nullopt;
    }
    try {
      return schema->typed<LinearPointwise>();
    } catch (const c10::Error&) {
      return std::nullopt;
    }
  }();
  return handle;
}

// oneDNN's result is in new memory and its first operand is made contiguous: 16 bytes or so moved for each element of a
// gradient beside 2 `inner` operations, which at half of oneDNN's rate cost about 0.01 ns more each (Zen 4, two cores).
constexpr int64_t kLeastOneDnnSize = 128;

bool uses_onednn(const at::Tensor& a, int64_t columns) {
  return active_matrix_route() == MatrixRoute::OneDnn && a.scalar_type() == at::kFloat &&
      std::min({a.size(0), a.size(1), columns}) >= kLeastOneDnnSize && onednn_linear();
}

at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b_transposed, const at::Tensor& linear_bias) {
  static const c10::List<std::optional<at::Scalar>> no_scalars;
  const auto bias = linear_bias.defined() ? std::optional<at::Tensor>(linear_bias) : std::nullopt;
  return onednn_linear()->call(a, b_transposed, bias, "none", no_scalars, "");
}

} // namespace

at::Tensor product_with_transposed(
    const at::Tensor& buffer, const at::Tensor& x, const at::Tensor& w, const at::Tensor& linear_bias) {
  if (uses_onednn(x, w.size(0))) {
    return onednn_product(x, w, linear_bias).contiguous();
  }
  at::Tensor out = buffer;
  if (linear_bias.defined()) {
    at::addmm_out(out, linear_bias, x, w.t());
  } else {
    at::mm_out(out, x, w.t());
  }
  return out;
}

void product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double factor, bool add, bool whole) {
  if (factor == 1.0 && uses_onednn(a, b.size(1))) {
    const auto result = onednn_product(a, b.t(), {});
    if (add) {
      out.add_(result);
    } else if (whole) {
      out = result;
    } else {
      out.copy_(result);
    }
  } else if (out.numel() == 1 && !add && factor == 1.0) {
    // MKL takes 26 us for 1 x 4096 times 4096 x 1, and 3 us for the transposed product.
    auto transposed = out.t();
    at::mm_out(transposed, b.t(), a.t());
  } else if (add || factor != 1.0) {
    at::addmm_out(out, out, a, b, /*beta=*/add ? 1.0 : 0.0, /*alpha=*/factor);
  } else {
    at::mm_out(out, a, b);
  }
}

} // namespace torchintro::cpu
