"""`torchintro bench`: what is wrong is not timed, what cannot run says why. No figure is judged here."""

import json
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

import torchintro
from torchintro import reference
from torchintro.cli.bench import SHAPES

bench = sys.modules["torchintro.cli.bench"]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """Leave the compiler out, which takes seconds a shape."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


def test_every_shape_is_verified_and_timed(run, tmp_path):
    output = run("bench", "--quick", "--device", "cpu", "--json", "bench.json").stdout
    assert "100 x 1 -> 1 " in output
    assert "1024 x 128 -> 128, dX" in output
    assert "written to bench.json" in output
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["quick"] is True
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["torchintro"] == torchintro.__version__
    assert {"processor", "threads", "CUDA devices"} <= record["machine"].keys()
    assert len(record["results"]) == len(SHAPES)
    assert {(one["device"], one["wrong"], one["skipped"]) for one in record["results"]} == {("cpu", "", "")}
    for one in record["results"]:
        assert list(one["seconds"]) == ["eager", "compiled", "fused"]
        assert all(figures["median"] > 0 and figures["iqr"] >= 0 for figures in one["seconds"].values())
    assert [one["rows"] for one in record["results"]] == [100, 1024, 1024, 1024]
    assert record["results"][-1]["gradients"] == ["input", "linear_weight", "linear_bias"]


def planted(wrong):
    """Return an operator of which one result is off by a hundredth of a per cent."""

    def operator(**tensors):
        if wrong != "loss":
            tensors[wrong] = tensors[wrong].clone()
            tensors[wrong].register_hook(lambda gradient: gradient * 1.0001)
        loss = reference.linear_mse_loss(**tensors)
        return loss * 1.0001 if wrong == "loss" else loss

    return operator


@pytest.mark.parametrize("wrong", ["loss", "linear_weight", "linear_bias"])
def test_a_wrong_operator_is_not_timed_and_has_exit_code_1(wrong, run, monkeypatch, tmp_path):
    monkeypatch.setattr(torchintro.functional, "linear_mse_loss", planted(wrong))
    monkeypatch.setattr(bench, "SHAPES", SHAPES[1:2])
    result = run("bench", "--quick", "--device", "cpu", "--json", "bench.json", code=1)
    # The loss that is off takes its gradients along, and is named first.
    assert f"torchintro: bench: 1024 x 64 -> 1 on cpu: the fused {wrong} has an error of " in result.stderr
    assert result.stderr.count("\n") == 1
    (one,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert one["seconds"] == {}
    assert one["wrong"].startswith(f"the fused {wrong} has an error of 1.0")


def test_a_missing_gradient_and_no_number_are_wrong(run, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", SHAPES[:1])

    def detached(linear_weight, **others):
        return reference.linear_mse_loss(linear_weight=linear_weight.detach(), **others)

    monkeypatch.setattr(torchintro.functional, "linear_mse_loss", detached)
    assert "the fused operator leaves out a gradient" in run("bench", "--quick", "--device", "cpu", code=1).stderr
    nothing = lambda **tensors: reference.linear_mse_loss(**tensors) * torch.nan  # noqa: E731
    monkeypatch.setattr(torchintro.functional, "linear_mse_loss", nothing)
    assert "the fused loss has an error of nan" in run("bench", "--quick", "--device", "cpu", code=1).stderr


def test_without_a_compiler_the_reason_is_said_once(run, monkeypatch):
    def compile(function, **_):
        def broken(**_):
            raise RuntimeError("no working C++ compiler\nand more")

        return broken

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(bench, "SHAPES", SHAPES[:2])
    output = run("bench", "--quick", "--device", "cpu").stdout
    assert output.count("torch.compile cannot run here: no working C++ compiler") == 1
    assert "and more" not in output


def test_other_devices_are_refused(run, monkeypatch):
    assert "bench: --device must be cpu or cuda, but got 'tpu'" in run("bench", "--device", "tpu", code=2).stderr
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "bench: --device cuda needs a GPU" in run("bench", "--device", "cuda", code=2).stderr


@pytest.mark.cuda
def test_on_a_gpu(run, tmp_path):
    run("bench", "--quick", "--json", "bench.json")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {one["device"] for one in record["results"]} == {"cpu", "cuda"}
