"""The planted faults can still be planted: each one's text stands once in the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import FAULTS, Fault, find_tests, place

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_applies(fault: Fault) -> None:
    path, planted = place(fault, ROOT)
    assert planted != path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        compile(planted, str(path), "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_tests_are_there(fault: Fault) -> None:
    assert list(find_tests(fault, ROOT / "tests"))


def test_names_are_told_apart() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_a_text_that_stands_nowhere_or_twice_is_said(tmp_path) -> None:
    (tmp_path / "one.py").write_text("a\n")
    fault = Fault("some", "layer", "It is broken.", "a\n", "b\n", ("test_some.py",), ("*.py",))
    assert place(fault, tmp_path) == (tmp_path / "one.py", "b\n")
    (tmp_path / "two.py").write_text("a\n")
    with pytest.raises(LookupError, match=r"must stand once in \*\.py, but stands in: one\.py \(1\), two"):
        place(fault, tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("c\n")
    with pytest.raises(LookupError, match="stands in: no file"):
        place(fault, tmp_path)
