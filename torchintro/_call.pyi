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
def linear_full_batch_fit(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    lr: Tensor,
    /,
) -> Tensor | None: ...
