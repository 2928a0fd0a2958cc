"""Data for regression: in memory, in files, and streamed from tables larger than memory."""

from .datasets import Dataset, diabetes, split, synthetic
from .open import open_table, read_table
from .table import Table

__all__ = ["Dataset", "Table", "diabetes", "open_table", "read_table", "split", "synthetic"]
