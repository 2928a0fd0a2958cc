#include "loss_per_element.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

namespace torchintro {

at::Tensor without_gaps(const at::Tensor& input) {
  return input.is_cpu() && input.element_size() == 2 ? input.contiguous() : input;
}

at::Tensor loss_per_element(const Problem& p, const at::Tensor& target) {
  const auto weight_transposed = p.linear_weight.t();
  const auto input = without_gaps(p.input);
  auto loss =
      p.linear_bias.defined() ? at::addmm(p.linear_bias, input, weight_transposed) : at::mm(input, weight_transposed);
  if (loss.scalar_type() == at::kBFloat16 || loss.scalar_type() == at::kHalf) {
    loss = loss.to(at::kFloat);
  }
  loss.sub_(p.target).square_();
  if (p.weight.defined()) {
    loss.mul_(p.weight);
  }
  return loss.to(target.scalar_type()).view(target.sizes());
}

} // namespace torchintro
