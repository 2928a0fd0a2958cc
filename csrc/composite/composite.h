// Both operators as compositions of ATen operators, with their arguments checked.
#pragma once

#include "linear_mse_loss.h"

namespace torchintro {

at::Tensor linear_mse_loss_composite(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction);

LossAndGradients linear_mse_loss_grads_composite(
    const at::Tensor& input,
    const at::Tensor& linear_weight,
    const at::Tensor& target,
    const OptionalTensor& linear_bias,
    const OptionalTensor& weight,
    std::string_view reduction,
    GradientMask output_mask);

} // namespace torchintro
