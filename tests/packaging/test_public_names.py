"""What the package shows to its users: every public name at one place, and pages whose links lead somewhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchintro

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md"))
# What a page of the documentation speaks of as the package's own.
NAMED = re.compile(r"\btorchintro\.([A-Za-z_]\w*)")
ROOMS = {module.name for module in pkgutil.iter_modules(torchintro.__path__)}


@pytest.mark.parametrize("name", torchintro.__all__)
def test_a_public_name_can_be_imported_from_the_package(name):
    if name in ("best_lr", "tune"):
        pytest.importorskip("optuna")
    value = getattr(torchintro, name)
    home = getattr(value, "__module__", "")
    if home.startswith("torchintro.") and hasattr(value, "__name__"):
        assert getattr(importlib.import_module(home), value.__name__) is value


def test_the_listing_is_sorted_and_whole():
    assert sorted(torchintro.__all__) == torchintro.__all__
    assert set(torchintro.__all__) <= set(dir(torchintro))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"^module 'torchintro' has no attribute 'learn'$"):
        torchintro.learn  # noqa: B018


def test_importing_the_package_brings_none_of_the_slow_packages():
    """Optuna, Polars and scikit-learn take longer to import than all the rest; only who uses them pays for them."""
    program = "import sys, torchintro; print([name for name in ('optuna', 'polars', 'sklearn') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_names_to_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [target for target in targets if ":" not in target and not (page.parent / target).exists()]
    assert missing == []
    if page.name == "CHANGELOG.md":  # it also speaks of what was there once
        return
    unknown = {name for name in NAMED.findall(text) if name not in ROOMS and name not in torchintro.__all__}
    assert unknown <= {"git", "__version__"}
