"""Any call whatever: shapes, strides, dtypes and options drawn by hypothesis."""

from __future__ import annotations

import pytest
from problems import DEVICES, DTYPES, assert_as_exact_as_eager, every_second, make_problem, padded_rows

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@pytest.mark.parametrize("device", DEVICES)  # not the fixture, which hypothesis asks to be made for every example
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_call(device: str, data: st.DataObject) -> None:
    leading = data.draw(st.lists(st.integers(0, 9), max_size=3), label="leading")
    dtype, target_dtype = data.draw(st.sampled_from(DTYPES), label="dtypes")
    problem = make_problem(
        leading,
        data.draw(st.integers(0, 40), label="in_features"),
        data.draw(st.integers(0, 24), label="out_features"),
        bias=data.draw(st.booleans(), label="bias"),
        weight=data.draw(st.sampled_from([None, "element", "row"]), label="weight"),
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
        requires_grad=data.draw(st.tuples(*[st.booleans()] * 4), label="requires_grad"),
        dtype=dtype,
        target_dtype=target_dtype,
        device=device,
    )
    strides = {"kept": lambda tensor: tensor, "every second": every_second, "padded": padded_rows}
    stride = strides[data.draw(st.sampled_from(sorted(strides)), label="strides")]
    problem = problem.map(lambda tensor: stride(tensor) if tensor.dim() > 0 else tensor)
    assert_as_exact_as_eager(problem)
