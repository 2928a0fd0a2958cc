"""What programs that tests start in processes of their own must find."""

from __future__ import annotations

import os
from pathlib import Path


def python_path(*folders: Path) -> str:
    """Return a PYTHONPATH with this folder, those given and what is there already."""
    there = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(__file__).parent), *map(str, folders), *([there] if there else [])])
