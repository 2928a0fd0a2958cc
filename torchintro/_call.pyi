from torch import Tensor

def linear_mse_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    /,
) -> Tensor | None: ...
