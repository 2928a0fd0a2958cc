"""Small calls of every kernel, which also run under compute-sanitizer: `benchmarks/gpu_check.py --only sanitizer`.

Under it a kernel takes many times as long, so that rows are few. The tool finds what is out of bounds or a race; the
values are checked all the same.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import DTYPES, NAMES, Problem, assert_as_exact_as_eager, make_problem, padded_rows, transposed

from torchintro import _C, linear_mse_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.sanitize,
    pytest.mark.skipif(_C.build_info()["cuda"] == "", reason="built without CUDA"),
]

OUT_FEATURES = (1, 2, 3, 5, 8, 9, 16, 40)  # few outputs up to the largest number of theirs, and products beyond
IN_FEATURES = (1, 7, 64, 130, 1024, 5000)  # less than a pack, no multiple of one, and more than a pass of a block
ROWS = {None: 3, "element": 37, "row": 70}
# Every number of outputs with each kind of weight; dtypes and numbers of input features come by turns.
CASES = [
    (rows, IN_FEATURES[(i + 2 * j + i // 6) % 6], outputs, DTYPES[(i + j) % 6], weight)
    for i, outputs in enumerate(OUT_FEATURES)
    for j, (weight, rows) in enumerate(ROWS.items())
]


def problem_of(
    rows: int,
    in_features: int,
    out_features: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    weight: str | None,
    device: str,
) -> Problem:
    dtype, target_dtype = dtypes
    return make_problem(
        rows,
        in_features,
        out_features,
        weight=weight,
        reduction="sum" if rows == 3 else "mean",
        dtype=dtype,
        target_dtype=target_dtype,
        device=device,
    )


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=[f"{n}x{d}-{o}-{str(x)[6:]}-{str(t)[6:]}-{w}" for n, d, o, (x, t), w in CASES],
)
def test_loss_and_all_gradients(case):
    assert_as_exact_as_eager(problem_of(*case, device="cuda"))


@pytest.mark.parametrize("layout", [padded_rows, transposed], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("out_features", [3, 40])
def test_other_strides(layout, out_features):
    problem = problem_of(20, 33, out_features, DTYPES[1], None, device="cuda")
    assert_as_exact_as_eager(replace(problem, input=layout(problem.input), target=layout(problem.target)))


@pytest.mark.parametrize("out_features", [2, 40])
@pytest.mark.parametrize("wanted", [(), ("input",), ("target",)], ids="".join)
def test_only_what_is_asked_for(wanted, out_features):
    problem = problem_of(40, 65, out_features, DTYPES[2], None, device="cuda")
    assert_as_exact_as_eager(replace(problem, requires_grad=tuple(name in wanted for name in NAMES)))


@pytest.mark.parametrize("out_features", [1, 40])
def test_no_rows(out_features):
    problem = problem_of(0, 7, out_features, DTYPES[1], None, device="cuda")
    results = replace(problem, reduction="sum").results(linear_mse_loss)
    assert all(result.abs().sum() == 0 for result in results.values())
