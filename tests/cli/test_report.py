"""The words and tables that the commands print."""

from __future__ import annotations

import pytest
from command_line import printed

from torchintro.cli.report import against_plain, duration, metrics_table, of_passes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5e-6, "2.5 us"), (0.0123, "12.3 ms"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h")],
)
def test_a_duration_has_its_unit(seconds, text):
    assert duration(seconds) == text


def test_what_plain_pytorch_would_have_taken():
    sentence = against_plain(0.5, 0.01, 1, 100)
    assert sentence == "plain PyTorch would have taken 1 s (measured on 1 epoch of plain PyTorch, not run in full): 2x"
    assert against_plain(1e-3, 0.01, 7, 100).endswith("(measured on 7 epochs of plain PyTorch, not run in full): 1000x")


def test_what_reading_in_each_epoch_would_have_taken():
    sentence = of_passes(2.0, 100, "this run")
    assert "in each of 100 epochs of this run: at least 3.33 min (measured on this one pass of 2 s, " in sentence


def test_a_metric_that_is_missing_is_a_dash():
    text = printed(metrics_table({"held out": {"mse": 4.0, "rmse": 2.0, "r2": 0.5}}))
    assert text.splitlines()[1].split() == ["held", "out", "4", "2", "-", "0.5"]
