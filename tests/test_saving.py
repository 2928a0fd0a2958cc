"""Model files: what comes back, that they are whole, and what is said of files that aren't."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchintro.nn import Standardize
from torchintro.saving import load_model, save_model


def pipeline(dtype=torch.float32, bias=True):
    standardize = Standardize.fit(torch.randn(20, 3, dtype=dtype) * 5 + 2)
    return nn.Sequential(standardize, nn.Linear(3, 2, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("standardized", [True, False])
def test_round_trip(tmp_path, dtype, bias, standardized):
    model = pipeline(dtype, bias) if standardized else nn.Linear(3, 2, bias=bias, dtype=dtype)
    metadata = {"lr": 0.1, "epochs": 3, "metrics": {"mse": math.inf}, "note": None, "list": (1, "two", [True])}
    path = tmp_path / "model.pt"
    returned = save_model(str(path), model, feature_names=["a", "b", "c"], target_names=("y", "z"), metadata=metadata)
    assert returned == path
    state = torch.get_rng_state()
    saved = load_model(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(saved.model) is type(model)
    assert saved.model.state_dict().keys() == model.state_dict().keys()
    X = torch.randn(5, 3, dtype=dtype)
    assert torch.equal(saved.model(X), model(X))
    assert all(parameter.requires_grad for parameter in saved.model.parameters())
    assert (saved.feature_names, saved.target_names) == (("a", "b", "c"), ("y", "z"))
    versions = saved.metadata.pop("versions")
    assert versions["torch"] == torch.__version__
    assert saved.metadata == metadata | {"list": [1, "two", [True]]}


def test_default_names_and_the_plain_reader(tmp_path):
    path = save_model(tmp_path / "model.pt", pipeline())
    saved = load_model(path)
    assert (saved.feature_names, saved.target_names) == (("0", "1", "2"), ("y0", "y1"))
    content = torch.load(path, weights_only=True)
    assert content["format"] == "torchintro model"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_model(tmp_path / "model.pt", pipeline())
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, pipeline())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 2), nn.ReLU()),
            {},
            TypeError,
            r"model must be .* but got Sequential\(Linear, ReLU\)",
        ),
        (nn.Bilinear(1, 1, 1), {}, TypeError, "model must be nn.Linear or nn.Sequential.*, but got Bilinear"),
        (
            nn.Linear(3, 2),
            {"feature_names": ["a"]},
            ValueError,
            "feature_names must hold 3 names, as the model has, .* 1",
        ),
        (
            nn.Linear(3, 2),
            {"target_names": "abc"},
            ValueError,
            "target_names must hold 2 names, as the model has, .* 3",
        ),
        (
            nn.Linear(3, 2),
            {"metadata": {"a": [torch.ones(1)]}},
            TypeError,
            r"metadata\['a'\]\[0\] must be a plain value",
        ),
        (
            nn.Linear(3, 2),
            {"metadata": {"a": object()}},
            TypeError,
            r"metadata\['a'\] must be a plain value, .* object",
        ),
    ],
)
def test_bad_saves(tmp_path, model, arguments, error, message):
    with pytest.raises(error, match=f"^save_model: {message}"):
        save_model(tmp_path / "model.pt", model, **arguments)
    assert list(tmp_path.iterdir()) == []


class Sneaky:
    def __reduce__(self):
        return print, ("code of the file was run",)


def content(path, **changes):
    saved = torch.load(save_model(path, pipeline()), weights_only=True)
    saved |= changes
    torch.save({key: value for key, value in saved.items() if value is not ...}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("not a model"), "is not a model file of torchintro, or it is damaged"),
        (lambda path: path.write_text("a,b\n1,2\n"), "is not a model file of torchintro, or it is damaged"),
        (lambda path: path.write_bytes(b""), "is not a model file of torchintro, or it is damaged"),
        (lambda path: torch.save(Sneaky(), path), "is not a model file of torchintro, or it is damaged"),
        (lambda path: torch.save(nn.Linear(1, 1).state_dict(), path), "is a PyTorch file but not a model file of"),
        (lambda path: torch.save(torch.ones(1), path), "is a PyTorch file but not a model file of torchintro"),
        (lambda path: content(path, version=2), "has version 2 of the model file, but this torchintro reads version 1"),
        (lambda path: content(path, state=...), "is damaged: 'state'"),
        (lambda path: content(path, state={}), "is damaged: '1.weight'"),
        (lambda path: content(path, state=[1]), "is damaged: "),
        (lambda path: content(path, standardize=False), "is damaged: 'weight'"),
    ],
)
def test_bad_files(tmp_path, capsys, write, message):
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(ValueError, match=f"^load_model: .*model.pt {message}"):
        load_model(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, keep):
    path = save_model(tmp_path / "model.pt", pipeline())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match="is not a model file of torchintro, or it is damaged"):
        load_model(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^load_model: there is no file .*model\.pt$"):
        load_model(tmp_path / "model.pt")
