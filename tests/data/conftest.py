"""Fixtures of the tests of tables."""

from __future__ import annotations

import pytest


@pytest.fixture
def _small(monkeypatch):
    """Read so little at once that a few rows are many blocks."""
    from torchintro.data import csv_files, numpy_files, sources, table

    monkeypatch.setattr(numpy_files, "READ_BYTES", 256)
    monkeypatch.setattr(sources, "MAPPED_ROWS", 11)
    monkeypatch.setattr(csv_files, "SAMPLE", 5)
    monkeypatch.setattr(csv_files, "LINES", 16)
    monkeypatch.setattr(table, "READ_ROWS", 7)
    monkeypatch.setattr(table, "HASHED", 5)
