"""Files that hold plain values and tensors: written whole or not at all, read without running code of theirs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["read", "write"]


def write(path: str | Path, kind: str, version: int, content: dict[str, Any]) -> Path:
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


def read(
    function: str, path: str | Path, kind: str, version: int, *, map_location: torch.device | str
) -> dict[str, Any]:
    """Return what :func:`write` wrote under that kind and version.

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
