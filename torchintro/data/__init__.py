"""Data for regression: in memory, in files, and streamed from tables larger than memory."""

from .datasets import Dataset, diabetes, split, synthetic
from .table import Table, open_table, read_table

__all__ = ["Dataset", "Table", "diabetes", "open_table", "read_table", "split", "synthetic"]
