"""Files that hold plain values and tensors, and trained models in them: :func:`save_model` and :func:`load_model`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from ._version import __version__
from .nn import Standardize

__all__ = ["RegressionModel", "SavedModel", "load_model", "read_file", "save_model", "write_file"]

RegressionModel: TypeAlias = "nn.Linear | nn.Sequential"

_KIND = "model"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class SavedModel:
    """What a model file holds.

    Attributes:
        model: An ``nn.Linear``, or ``nn.Sequential(Standardize, nn.Linear)``, which takes features in their own units.
        feature_names: One name for each column of the model's input.
        target_names: One name for each column of the model's output.
        metadata: What the writer noted, such as lr, epochs and metrics, and the versions that wrote it.
    """

    model: RegressionModel
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def save_model(
    path: str | Path,
    model: RegressionModel,
    *,
    feature_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained model to one file, whole or not at all.

    The file is an ordinary ``torch.save`` file that ``torch.load(path, weights_only=True)`` reads.

    Args:
        path: The file; an existing one is replaced.
        model: ``nn.Linear`` or ``nn.Sequential(Standardize, nn.Linear)``.
        feature_names: Names of the features, by default ``0``, ``1``...
        target_names: Names of the targets, by default ``y0``, ``y1``...
        metadata: Plain values (numbers, strings, lists, mappings) to keep with the model.

    Returns:
        The path.

    Raises:
        TypeError: The model is of another kind, or ``metadata`` holds something else than plain values.
        ValueError: The number of names is not the model's number of features or targets.

    Example:
        >>> save_model("model.pt", nn.Linear(2, 1), feature_names=["area", "rooms"])  # doctest: +SKIP
    """
    linear = _linear_of(model)
    names = {}
    for key, given, count, default in (
        ("feature_names", feature_names, linear.in_features, "{}"),
        ("target_names", target_names, linear.out_features, "y{}"),
    ):
        names[key] = [default.format(i) for i in range(count)] if given is None else [str(name) for name in given]
        if len(names[key]) != count:
            raise ValueError(f"save_model: {key} must hold {count} names, as the model has, but got {len(names[key])}")
    content = {
        "standardize": isinstance(model, nn.Sequential),
        "state": {key: value.detach().cpu().clone() for key, value in model.state_dict().items()},
        **names,
        "metadata": {
            "versions": {"torchintro": __version__, "torch": str(torch.__version__)},
            **_plain("metadata", dict(metadata or {})),
        },
    }
    return write_file(path, _KIND, _VERSION, content)


def load_model(path: str | Path, *, map_location: torch.device | str = "cpu") -> SavedModel:
    """Read a file that :func:`save_model` wrote; no code of the file is run.

    Args:
        path: The file.
        map_location: Device of the model.

    Returns:
        The model with its names and metadata.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such a file.

    Example:
        >>> load_model("model.pt").model(torch.ones(1, 2))  # doctest: +SKIP
    """
    content = read_file("load_model", path, _KIND, _VERSION, map_location=map_location)
    try:
        return SavedModel(
            model=_rebuild(content["state"], content["standardize"]),
            feature_names=tuple(content["feature_names"]),
            target_names=tuple(content["target_names"]),
            metadata=content["metadata"],
        )
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"load_model: {path} is damaged: {error}") from error


def _linear_of(model: object) -> nn.Linear:
    if isinstance(model, nn.Linear):
        return model
    if isinstance(model, nn.Sequential) and [type(layer) for layer in model] == [Standardize, nn.Linear]:
        return cast(nn.Linear, model[1])
    shown = type(model).__name__
    if isinstance(model, nn.Sequential):
        shown += f"({', '.join(type(layer).__name__ for layer in model)})"
    raise TypeError(f"save_model: model must be nn.Linear or nn.Sequential(Standardize, nn.Linear), but got {shown}")


def _rebuild(state: dict[str, torch.Tensor], standardize: bool) -> RegressionModel:
    prefix = "1." if standardize else ""
    weight = state[f"{prefix}weight"]
    out_features, in_features = weight.shape
    # Without memory of its own: initialising it would cost time and draw from the global random state.
    linear = nn.Linear(in_features, out_features, bias=f"{prefix}bias" in state, device="meta")
    model = nn.Sequential(Standardize(state["0.mean"], state["0.scale"]), linear) if standardize else linear
    model.load_state_dict(state, assign=True)
    return model


def _plain(name: str, value: Any) -> Any:
    """Return ``value`` if it is made of what a ``weights_only`` load accepts."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    raise TypeError(f"save_model: {name} must be a plain value, but got {type(value).__name__}")


def write_file(path: str | Path, kind: str, version: int, content: dict[str, Any]) -> Path:
    """Write ``content`` to one file with ``torch.save``; an existing file is replaced, or kept if that fails.

    Args:
        path: The file.
        kind: What it is, such as ``"model"``: ``"torchintro model"`` is the file's ``"format"``.
        version: Of that format.
        content: Numbers, strings, tensors, lists and mappings.

    Returns:
        The path.
    """
    path = Path(path)
    # Written beside its place and moved there, so that a reader or a crash never meets half a file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": f"torchintro {kind}", "version": version, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_file(
    function: str, path: str | Path, kind: str, version: int, *, map_location: torch.device | str
) -> dict[str, Any]:
    """Return what :func:`write_file` wrote under that kind and version.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such a file; the sentence begins with ``function``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{function}: there is no file {path}")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the bytes decide where the reader stumbles, so it may be any error
        raise ValueError(f"{function}: {path} is not a {kind} file of torchintro, or it is damaged") from error
    if not isinstance(content, dict) or content.get("format") != f"torchintro {kind}":
        raise ValueError(f"{function}: {path} is a PyTorch file but not a {kind} file of torchintro")
    if content.get("version") != version:
        raise ValueError(
            f"{function}: {path} has version {content.get('version')!r} of the {kind} file, "
            f"but this torchintro reads version {version}"
        )
    return content
