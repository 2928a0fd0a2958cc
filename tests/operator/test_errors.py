"""One table of wrong calls, and every way to make a call: the same sentence everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable

import problems
import pytest
import torch

import torchintro


def sparse(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, layout=torch.sparse_coo, device=like.device)


# name: (error, sentence, changes to the good call below)
Make = Callable[..., torch.Tensor]
BAD_CALLS: dict[str, tuple[type[Exception], str, Callable[[Make], dict]]] = {
    "input without dimensions": (
        ValueError,
        "input must have shape (*, in_features), but got ()",
        lambda make: {"input": make()},
    ),
    "linear_weight of one dimension": (
        ValueError,
        "linear_weight must have shape (out_features, in_features), but got (3,)",
        lambda make: {"linear_weight": make(3)},
    ),
    "linear_weight of three dimensions": (
        ValueError,
        "linear_weight must have shape (out_features, in_features), but got (1, 2, 3)",
        lambda make: {"linear_weight": make(1, 2, 3)},
    ),
    "features differ": (
        ValueError,
        "linear_weight must have shape (out_features, 3) to match input (8, 3), but got (2, 4)",
        lambda make: {"linear_weight": make(2, 4)},
    ),
    "target of one dimension, one output": (
        ValueError,
        "target must have shape (8, 1), the prediction's, but got (8,)",
        lambda make: {"linear_weight": make(1, 3), "linear_bias": make(1), "target": make(8)},
    ),
    "target of other rows": (
        ValueError,
        "target must have shape (8, 2), the prediction's, but got (7, 2)",
        lambda make: {"target": make(7, 2)},
    ),
    "target that would broadcast over outputs": (
        ValueError,
        "target must have shape (8, 2), the prediction's, but got (8, 1)",
        lambda make: {"target": make(8, 1)},
    ),
    "target that would broadcast over rows": (
        ValueError,
        "target must have shape (8, 2), the prediction's, but got (1, 2)",
        lambda make: {"target": make(1, 2)},
    ),
    "target without dimensions": (
        ValueError,
        "target must have shape (8, 2), the prediction's, but got ()",
        lambda make: {"target": make()},
    ),
    "bias of other length": (
        ValueError,
        "linear_bias must have shape (2,), one per output, but got (1,)",
        lambda make: {"linear_bias": make(1)},
    ),
    "bias of two dimensions": (
        ValueError,
        "linear_bias must have shape (2,), one per output, but got (1, 2)",
        lambda make: {"linear_bias": make(1, 2)},
    ),
    "weight per output": (
        ValueError,
        "weight must have shape (8, 2) (per element) or (8,) (per row), but got (2,)",
        lambda make: {"weight": make(2)},
    ),
    "weight that would broadcast": (
        ValueError,
        "weight must have shape (8, 2) (per element) or (8,) (per row), but got (8, 1)",
        lambda make: {"weight": make(8, 1)},
    ),
    "weight that requires a gradient": (
        ValueError,
        "weight must not require a gradient (it has none), but got one with requires_grad=True; pass weight.detach()",
        lambda make: {"weight": make(8).requires_grad_()},
    ),
    "unknown reduction": (
        ValueError,
        "reduction must be 'mean', 'sum' or 'none', but got 'average'",
        lambda make: {"reduction": "average"},
    ),
    "integer input": (
        TypeError,
        "input must have dtype float64, float32, bfloat16 or float16, but got int64",
        lambda make: {"input": make(8, 3).to(torch.int64)},
    ),
    "complex input": (
        TypeError,
        "input must have dtype float64, float32, bfloat16 or float16, but got complex64",
        lambda make: {"input": make(8, 3).to(torch.complex64)},
    ),
    "linear_weight of another dtype": (
        TypeError,
        "linear_weight must have input's dtype, float32, but got float64",
        lambda make: {"linear_weight": make(2, 3).double()},
    ),
    "bias of another dtype": (
        TypeError,
        "linear_bias must have input's dtype, float32, but got bfloat16",
        lambda make: {"linear_bias": make(2).bfloat16()},
    ),
    "target of another dtype": (
        TypeError,
        "target must have input's dtype, float32, but got float64",
        lambda make: {"target": make(8, 2).double()},
    ),
    "target of another 16-bit dtype": (
        TypeError,
        "target must have input's dtype, bfloat16, or float32, but got float16",
        lambda make: {
            "input": make(8, 3).bfloat16(),
            "linear_weight": make(2, 3).bfloat16(),
            "linear_bias": None,
            "target": make(8, 2).half(),
        },
    ),
    "weight of another dtype": (
        TypeError,
        "weight must have target's dtype, float32, but got float64",
        lambda make: {"weight": make(8).double()},
    ),
    "sparse input": (
        TypeError,
        "input must be a dense (strided) tensor, but got layout Sparse",
        lambda make: {"input": sparse(make(8, 3))},
    ),
    "sparse target": (
        TypeError,
        "target must be a dense (strided) tensor, but got layout Sparse",
        lambda make: {"target": sparse(make(8, 2))},
    ),
}

DEVICES = ["meta", *problems.DEVICES]


def good_call(device: str) -> dict:
    return {
        "input": torch.ones(8, 3, device=device),
        "linear_weight": torch.ones(2, 3, device=device),
        "target": torch.ones(8, 2, device=device),
        "linear_bias": torch.ones(2, device=device),
        "weight": None,
        "reduction": "mean",
    }


def split(call: dict) -> tuple[list, dict]:
    positional = [call[name] for name in ("input", "linear_weight", "target")]
    return positional, {name: call[name] for name in ("linear_bias", "weight", "reduction")}


def function(call: dict) -> None:
    positional, keywords = split(call)
    torchintro.linear_mse_loss(*positional, **keywords)


def function_with_gradients(call: dict) -> None:
    call = dict(call)
    if call["linear_weight"].is_floating_point():
        call["linear_weight"] = call["linear_weight"].requires_grad_()
    function(call)


def operator(call: dict) -> None:
    positional, keywords = split(call)
    torch.ops.torchintro.linear_mse_loss(*positional, **keywords)


def decomposition(call: dict) -> None:
    positional, keywords = split(call)
    torch.ops.torchintro._linear_mse_loss_decomposed(*positional, **keywords)


def gradients(call: dict) -> None:
    positional, keywords = split(call)
    torch.ops.torchintro._linear_mse_loss_grads(*positional, *keywords.values(), [True, True, True, False])


def under_vmap(call: dict) -> None:
    positional, keywords = split(call)
    first = positional[0].unsqueeze(0)
    torch.func.vmap(lambda x: torchintro.linear_mse_loss(x, *positional[1:], **keywords))(first)


ENTRIES = [function, function_with_gradients, operator, decomposition, gradients, under_vmap]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case: str, entry: Callable[[dict], None], device: str) -> None:
    error, sentence, changes = BAD_CALLS[case]
    if "sparse input" in case and entry is under_vmap:
        pytest.skip("vmap takes no sparse tensors")
    call = good_call(device) | changes(lambda *shape: torch.ones(shape, device=device))
    with pytest.raises(error, match=f"^linear_mse_loss: {re.escape(sentence)}"):
        entry(call)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_in_inference_mode(case: str, device: str) -> None:
    error, sentence, changes = BAD_CALLS[case]
    if "requires a gradient" in case:
        pytest.skip("nothing requires a gradient in inference mode")
    with torch.inference_mode():
        call = good_call(device) | changes(lambda *shape: torch.ones(shape, device=device))
        with pytest.raises(error, match=f"^linear_mse_loss: {re.escape(sentence)}"):
            function(call)


@pytest.mark.parametrize("argument", ["linear_weight", "target", "linear_bias", "weight"])
@pytest.mark.parametrize("other", DEVICES)
@pytest.mark.parametrize("device", problems.DEVICES)
def test_mixed_devices(device: str, argument: str, other: str) -> None:
    if device == other:
        pytest.skip("the same device")
    call = good_call(device) | {"weight": torch.ones(8, device=device)}
    call[argument] = call[argument].to(other)
    pattern = rf"^linear_mse_loss: {argument} must be on input's device, {device}(:\d+)?, but got {other}"
    with pytest.raises(ValueError, match=pattern):
        function(call)


def test_a_weight_that_requires_a_gradient_is_fine_where_none_is_computed(device: str) -> None:
    call = good_call(device) | {"weight": torch.ones(8, device=device, requires_grad=True)}
    with torch.no_grad():
        function(call)


def test_gradients_operator_has_none_for_none(device: str) -> None:
    with pytest.raises(ValueError, match=r"^_linear_mse_loss_grads: reduction must be 'mean' or 'sum', but got 'none'"):
        gradients(good_call(device) | {"reduction": "none"})


def test_gradients_operator_has_no_bias_gradient_without_a_bias(device: str) -> None:
    positional, _ = split(good_call(device))
    with pytest.raises(
        ValueError, match=r"^_linear_mse_loss_grads: output_mask\[3\] must be False without a linear_bias"
    ):
        torch.ops.torchintro._linear_mse_loss_grads(*positional, None, None, "mean", [False, False, False, True])


def test_a_wrong_call_leaves_gradients_as_they_were(device: str) -> None:
    criterion = torchintro.LinearMSELoss(3, 1, device=device)
    x, y = torch.ones(8, 3, device=device), torch.ones(8, 1, device=device)
    criterion(x, y).backward()
    before = criterion.linear.weight.grad.clone()
    with pytest.raises(ValueError, match="target must have shape"):
        criterion(x, y.squeeze(1))
    assert torch.equal(criterion.linear.weight.grad, before)


def test_torchscript_passes_the_sentence_on(device: str) -> None:
    scripted = torch.jit.script(torchintro.LinearMSELoss(3, 1, device=device))
    with pytest.raises(RuntimeError, match=r"linear_mse_loss: target must have shape \(8, 1\)"):
        scripted(torch.ones(8, 3, device=device), torch.ones(8, device=device))


def test_compiled_code_passes_the_sentence_on(device: str) -> None:
    compiled = torch.compile(torchintro.linear_mse_loss, backend="eager")
    with pytest.raises(Exception, match=r"linear_mse_loss: target must have shape \(8, 1\)"):
        compiled(*(torch.ones(shape, device=device) for shape in ((8, 3), (1, 3), (8,))))
