"""A record's figures as the README's Markdown tables: steps, training and studies, and where a GPU wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..crossover import WAYS, wins_text

__all__ = ["CPU_ROWS", "markdown"]

MILLION = 1_000_000

# The rows of the table for the CPU, in its order; studies and training runs have a table of their own.
CPU_ROWS = ("P1", "P4a", "P4b", "P4d", "P4c-8", "P4c-16", "X1-2", "P5-4", "P5-16", "X3-2", "X3-4", "P6a", "P6b", "P6c")
CPU_PEERS = {"eager": "eager", "compile": "torch.compile", "jax": "JAX", "fused": "fused"}
GPU_PEERS = {
    "eager": "eager",
    "compile": "torch.compile",
    "max-autotune": "max-autotune",
    "chunked": "chunked",
    "fused": "fused",
}

STEPS, TRAININGS = ("step", "memory"), ("fit", "models", "study")
# Columns of the tables of training, each with the peers that it may show: a row has one of them at most.
TRAINING_PEERS = {
    "eager": ("eager", "eager slices", "eager shuffled"),
    "torch.compile": ("compile",),
    "CUDA graph": ("graph",),
    "DataLoader": ("DataLoader",),
    "JAX": ("jax",),
    "scikit-learn": ("sklearn", "ridge"),
    "fit": ("fit",),
    "fused": ("fused",),
}
# In older records "fused" is something else in such rows.
TRAINING_SCHEMA = 2

Record = Mapping[str, Any]


def markdown(record: Record) -> list[str]:
    """Return the lines of the tables that a record has figures for.

    Args:
        record: What ``bench --json`` wrote.

    Raises:
        ValueError: The record has no row with figures.
    """
    measured = [row for row in record["rows"] if "fused" in row["peers"]]
    rows = [row for row in measured if row["kind"] in STEPS]
    trainings = [row for row in measured if row["kind"] in TRAININGS and record["schema"] >= TRAINING_SCHEMA]
    on_cpu = {row["id"]: row for row in rows if row["device"] == "cpu"}
    tables = [
        _table([on_cpu[name] for name in CPU_ROWS if name in on_cpu], CPU_PEERS, "against eager", _against_eager),
        _table(
            [row for row in rows if row["device"] == row["target_device"] == "cuda"],
            GPU_PEERS,
            "against the best peer",
            _against_the_best,
        ),
        *(
            _training([row for row in trainings if row["device"] == row["target_device"] == device])
            for device in ("cpu", "cuda")
        ),
        _crossover(record.get("crossover", [])),
    ]
    lines: list[str] = []
    for table in filter(None, tables):
        lines += [*([""] if lines else []), *table]
    if not lines:
        raise ValueError("bench: there is nothing to make a table of: the record holds no row with figures")
    return lines


def _table(
    rows: Sequence[Record], peers: Mapping[str, str], comparison: str, compare: Callable[[Record], str]
) -> list[str]:
    if not rows:
        return []
    lines = [_line("work", *peers.values(), comparison, "of limit"), "|" + "---|" * (len(peers) + 3)]
    before: Record | None = None
    for row in rows:
        text = _time if row["unit"] == "seconds" else _memory
        medians = [text(row["peers"][peer]["median"]) if peer in row["peers"] else "-" for peer in peers]
        lines.append(_line(_work(row, before), *medians, compare(row), _of_limit(row)))
        before = row
    return lines


def _training(rows: Sequence[Record]) -> list[str]:
    """Return a table of training runs and studies, with the columns that one of them has a figure for."""
    shown = {heading: names for heading, names in TRAINING_PEERS.items() if any(_one_of(names, row) for row in rows)}
    if not rows:
        return []
    comparisons = {"against eager": TRAINING_PEERS["eager"]}
    if "JAX" in shown:
        comparisons["against JAX"] = TRAINING_PEERS["JAX"]
    limited = any(row["limit"] for row in rows)
    headings = ["work", *shown, *comparisons, *(["of limit"] if limited else [])]
    lines = [_line(*headings), "|" + "---|" * len(headings)]
    for row in rows:
        cells = [_training_time(row, _one_of(names, row)) for names in shown.values()]
        cells += [_against(row, _one_of(names, row)) for names in comparisons.values()]
        lines.append(_line(_training_work(row), *cells, *([_of_limit(row)] if limited else [])))
    if any(row["scales"] for row in rows):
        lines += ["", "*: a part was run, and its time scaled up."]
    return lines


def _one_of(names: Sequence[str], row: Record) -> str:
    """Return the peer of a column that a row has a figure for, or an empty string."""
    return next((name for name in names if name in row["peers"]), "")


def _training_time(row: Record, peer: str) -> str:
    if not peer:
        return "-"
    return _time(row["peers"][peer]["median"]) + ("*" if peer in row["scales"] else "")


def _training_work(row: Record) -> str:
    epochs = f"{row['epochs']} epoch{'s' if row['epochs'] > 1 else ''}"
    shape = f"{_number(row['rows'])} x {row['in_features']} -> {row['out_features']}"
    order = "shuffled" if row["shuffle"] else "in order"
    batches = f", batches of {row['batch_size']} {order}" if row["batch_size"] else ""
    what = {
        "fit": f"fit, {epochs}",
        "models": f"{row['trials']} learning rates, {epochs}",
        "study": f"study, {row['trials']} trials x {epochs}",
    }[row["kind"]]
    return f"{what}, {shape}{batches}"


def _crossover(series: Sequence[Record]) -> list[str]:
    if not series:
        return []
    lines = [_line("step, float32", "the GPU wins", "with the transfer"), "|" + "---|" * 3]
    for one in series:
        wins = [wins_text(one["wins_from"][way], max(one["rows"], default=0)) for way in WAYS[1:]]
        lines.append(_line(f"N x {one['in_features']} -> {one['out_features']}", *wins))
    return lines


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells).rstrip() + " |"


def _work(row: Record, before: Record | None) -> str:
    """Say what a row measures, in the words of the README."""
    same = ("kind", "rows", "in_features", "out_features", "gradients", "device")
    if before is not None and before["dtype"] == "float32" and all(row[key] == before[key] for key in same):
        return f"the same in {row['dtype']}"
    words = f"{_number(row['rows'])} x {row['in_features']} -> {row['out_features']}"
    kind = "extra peak memory" if row["kind"] == "memory" else "step"
    dtype = f", {row['dtype']}" if row["dtype"] != "float32" else ""
    gradient = ", with the input's gradient" if "input" in row["gradients"] and row["kind"] == "step" else ""
    return f"{kind}, {words}{dtype}{gradient}"


def _number(rows: int) -> str:
    if rows % MILLION == 0:
        return f"{rows // MILLION}M"
    power = rows.bit_length() - 1
    return f"2^{power}" if power >= 20 and rows == 1 << power else str(rows)


def _against_eager(row: Record) -> str:
    return _against(row, "eager")


def _against_the_best(row: Record) -> str:
    others = {peer: measured["median"] for peer, measured in row["peers"].items() if peer != "fused"}
    if not others:
        return "-"
    best = min(others, key=lambda peer: others[peer])
    return _against(row, best) if row["unit"] == "bytes" else f"{_against(row, best)} ({best})"


def _against(row: Record, peer: str) -> str:
    if peer not in row["peers"]:
        return "-"
    fused, other = row["peers"]["fused"]["median"], row["peers"][peer]["median"]
    if row["unit"] == "bytes":
        return f"{fused / other:.2f} of {peer}'s" if other > 0 else "-"
    return f"{_digits(other / fused, 2)}x"


def _of_limit(row: Record) -> str:
    if row["limit"] is None:
        return ""
    return f"{row['limit']['seconds'] / row['peers']['fused']['median']:.0%}".replace("%", " %")


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{_digits(seconds, 3)} s"
    milliseconds = seconds * 1e3
    return f"{_digits(milliseconds, 2 if milliseconds < 1 else 3)} ms"


def _memory(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def _digits(value: float, digits: int) -> str:
    """Return a number with so many significant digits, or more where they are before the point."""
    _, exponent = f"{value:.{digits - 1}e}".split("e")  # of the rounded number
    return f"{value:.{max(0, digits - 1 - int(exponent))}f}"
