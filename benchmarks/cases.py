"""What the benchmark measures: its cases, their targets, and the bytes and operations that each needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

__all__ = ["CASES", "Case", "Count", "Target", "count", "quick_case", "select"]

MILLION = 1_000_000


@dataclass(frozen=True)
class Target:
    """A claim about the fused peer of a case; exactly one of the bounds is given.

    Attributes:
        of: The peer that it is compared with, or ``"limit"``.
        at_most: The fused figure is at most so many times the other.
        at_least: The other figure is at least so many times the fused one: a speed-up.
        cpu: The claim is only made for processors whose model name holds this word.
    """

    of: str
    at_most: float | None = None
    at_least: float | None = None
    cpu: str = ""

    def ratio(self, fused: float, other: float) -> float:
        """Return the ratio that the bound is about."""
        return fused / other if self.at_most is not None else other / fused

    def met(self, fused: float, other: float) -> bool:
        """Say whether the two figures keep the bound."""
        return self.met_by(self.ratio(fused, other))

    def met_by(self, ratio: float) -> bool:
        """Say whether a ratio keeps the bound."""
        if self.at_most is not None:
            return ratio <= self.at_most
        return self.at_least is not None and ratio >= self.at_least

    def __str__(self) -> str:
        bound = f"<= {self.at_most:g}x" if self.at_most is not None else f">= {self.at_least:g}x"
        return f"{bound} {self.of}" if self.at_most is not None else f"{bound} faster than {self.of}"


@dataclass(frozen=True)
class Case:
    """One thing that the benchmark measures; everything that is run for it follows from this record.

    Attributes:
        id: Its name; cases of related work share its beginning.
        kind: ``"step"`` (loss and gradients), ``"fit"`` (a training run), ``"models"`` (training runs with several
            learning rates), ``"study"`` (an Optuna study of training runs) or ``"memory"`` (the extra peak memory of a
            step).
        rows: N, the rows of the input.
        in_features: D.
        out_features: O.
        dtype: Of input, parameters and target.
        gradients: The tensors that require a gradient.
        peers: What is measured side by side; the first is the baseline of ratios and of rounding errors.
        limit: What bounds the case on any implementation: ``"read"``, ``"copy"`` (memory traffic), ``"matrix"``
            (operations, at the rate of large square matrices), ``"products"`` (the step's own products, one after the
            other), ``"call"`` (``W.sum().backward()``), ``"empty"`` (a study with an empty objective), or ``""``.
        targets: What the fused peer is to reach on ``device``.
        device: ``"cpu"`` for a case whose targets are meant for the CPU and that runs anywhere, ``"cuda"`` for one that
            only runs there.
        epochs: Passes over the rows of a training run.
        trials: Training runs of a study, or of several models.
        batch_size: Rows of a mini-batch; 0 for the full batch.
        shuffle: Whether the mini-batches are cut from a permutation, and not from the rows as they are.
        measured: ``(trials, epochs)`` that are really run, by peers whose time grows with both; their time is then
            scaled up in proportion.
        note: Printed below its figures.
    """

    id: str
    kind: str
    rows: int
    in_features: int
    out_features: int = 1
    dtype: torch.dtype = torch.float32
    gradients: tuple[str, ...] = ("linear_weight", "linear_bias")
    peers: tuple[str, ...] = ("eager", "compile", "jax", "fused")
    limit: str = "read"
    targets: tuple[Target, ...] = ()
    device: str = "cpu"
    epochs: int = 1
    trials: int = 1
    batch_size: int = 0
    shuffle: bool = True
    measured: tuple[int, int] | None = None
    note: str = ""

    @property
    def work(self) -> str:
        """What is measured, in a few words."""
        shape = f"{self.rows}x{self.in_features} -> {self.out_features}"
        if self.kind == "study":
            return f"study {self.trials}x{self.epochs}, {shape}"
        if self.kind in ("fit", "models"):
            order = "shuffled" if self.shuffle else "in order"
            batch = f", {self.batch_size} {order}" if self.batch_size else ""
            what = "fit" if self.kind == "fit" else f"{self.trials} fits"
            return f"{what} {self.epochs} epoch{'s' if self.epochs > 1 else ''}, {shape}{batch}"
        short = {"input": "dX", "linear_weight": "dW", "linear_bias": "db", "target": "dT"}
        wanted = " ".join(short[name] for name in self.gradients)
        kind = "memory" if self.kind == "memory" else "step"
        return f"{kind} {shape} {_DTYPE_NAMES[self.dtype]} {wanted}"


_DTYPE_NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Count:
    """What one pass over the data must do at least.

    Attributes:
        bytes_read: Input, target and parameters, each once.
        bytes_written: Loss and the gradients asked for, each once.
        operations: Multiplications and additions of the matrix products.
    """

    bytes_read: int
    bytes_written: int
    operations: int

    @property
    def bytes(self) -> int:
        """All memory traffic."""
        return self.bytes_read + self.bytes_written


def count(case: Case) -> Count:
    """Count what a case needs at least.

    A step reads ``N D + N O + O D + O`` elements and writes the gradients asked for and the loss. Its operations are
    ``2 N D O`` for the prediction, and as many again for the gradient of the weight and for that of the input. An epoch
    counts as a step, whatever its mini-batches; a study as that many training runs.
    """
    n, d, o = case.rows, case.in_features, case.out_features
    sizes = {"input": n * d, "linear_weight": o * d, "linear_bias": o, "target": n * o}
    products = 1 + ("linear_weight" in case.gradients) + ("input" in case.gradients)
    steps = case.epochs * case.trials
    return Count(
        bytes_read=steps * case.dtype.itemsize * sum(sizes.values()),
        bytes_written=steps * case.dtype.itemsize * (1 + sum(sizes[name] for name in case.gradients)),
        operations=steps * 2 * n * d * o * products,
    )


_WITH_INPUT = ("input", "linear_weight", "linear_bias")

_STEP_PEERS_CUDA = ("eager", "compile", "max-autotune", "chunked", "fused")
_PRODUCT_PEERS_CUDA = ("eager", "compile", "max-autotune", "triton", "chunked", "fused")


def _streamed(
    id: str,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    gradients: tuple[str, ...] = ("linear_weight", "linear_bias"),
) -> Case:
    """Make a case of few outputs for a GPU, whose 4 GiB of input no cache holds: memory is its limit."""
    return Case(
        id,
        "step",
        rows,
        in_features,
        out_features,
        dtype=dtype,
        gradients=gradients,
        peers=_STEP_PEERS_CUDA,
        device="cuda",
        limit="copy",
        targets=(Target("limit", at_most=1 / 0.85),),
    )


def _multiplied(id: str, rows: int, in_features: int, out_features: int) -> Case:
    """Make a case of many outputs for a GPU: matrix products are its limit."""
    return Case(
        id,
        "step",
        rows,
        in_features,
        out_features,
        dtype=torch.bfloat16,
        gradients=_WITH_INPUT,
        peers=_PRODUCT_PEERS_CUDA,
        device="cuda",
        limit="products",
        targets=tuple(Target(peer, at_least=1.1) for peer in _PRODUCT_PEERS_CUDA[:-1]),
    )


CASES: tuple[Case, ...] = (
    Case("P1", "step", 100, 1, limit="call", targets=(Target("eager", at_most=0.52),)),
    Case(
        "P2",
        "fit",
        100,
        1,
        epochs=100,
        peers=("eager", "compile", "jax", "fit", "fused"),
        limit="",
        targets=(Target("eager", at_least=1000), Target("jax", at_least=10)),
    ),
    Case(
        "P3",
        "study",
        100,
        1,
        epochs=100,
        trials=20,
        peers=("eager", "jax", "fused"),
        limit="empty",
        targets=(Target("limit", at_most=1.3),),
    ),
    Case("P4a", "step", MILLION, 64, targets=(Target("limit", at_most=1.25),)),
    Case("P4b", "step", 65536, 1024, targets=(Target("limit", at_most=1.15),)),
    Case("P4c-8", "step", MILLION, 8, targets=(Target("eager", at_least=3),)),
    Case("P4c-16", "step", MILLION, 16, targets=(Target("eager", at_least=3),)),
    Case("P4d", "step", 65536, 1024, gradients=_WITH_INPUT, limit="copy", targets=(Target("eager", at_least=4),)),
    Case("P5-4", "step", 65536, 1024, 4, targets=(Target("eager", at_least=4),)),
    Case("P5-16", "step", 65536, 1024, 16, targets=(Target("eager", at_least=4),)),
    Case(
        "P6a",
        "step",
        4096,
        1024,
        1024,
        gradients=_WITH_INPUT,
        limit="matrix",
        targets=(Target("eager", at_least=1.7, cpu="AMD"), Target("eager", at_most=1)),
    ),
    Case(
        "P6b",
        "step",
        4096,
        1024,
        1024,
        dtype=torch.bfloat16,
        gradients=_WITH_INPUT,
        limit="matrix",
        targets=(Target("eager", at_least=1.15),),
    ),
    Case(
        "P6c",
        "memory",
        2048,
        512,
        32768,
        gradients=_WITH_INPUT,
        limit="",
        targets=(Target("eager", at_most=0.35),),
    ),
    Case(
        "P7",
        "study",
        MILLION,
        64,
        epochs=100,
        trials=20,
        peers=("eager", "jax", "ridge", "fused"),
        limit="",
        targets=(Target("eager", at_least=900),),
        measured=(2, 3),
        note="full batch, so every epoch is the same work",
    ),
    Case(
        "P8a",
        "fit",
        MILLION,
        64,
        batch_size=1024,
        shuffle=False,
        peers=("eager slices", "DataLoader", "compile", "jax", "sklearn", "fused"),
        targets=(Target("eager slices", at_least=8),),
    ),
    Case(
        "P8b",
        "fit",
        MILLION,
        64,
        batch_size=1024,
        peers=("eager shuffled", "DataLoader", "compile", "jax", "sklearn", "fused"),
        targets=(Target("eager shuffled", at_least=8),),
    ),
    Case(
        "P8c",
        "models",
        MILLION,
        64,
        trials=16,
        batch_size=1024,
        peers=("eager shuffled", "jax", "fused"),
        limit="",
        measured=(1, 1),
        note="eager trains one model after the other, the others all at once",
    ),
    Case("X1-1", "step", 1000, 1, 16, limit="call", note="X: chosen because little is to be gained, or lost, there"),
    Case("X1-2", "step", MILLION, 1),
    Case("X1-3", "step", MILLION, 4, gradients=_WITH_INPUT, limit="copy"),
    Case("X2-1", "step", 65536, 32, 17, gradients=_WITH_INPUT, limit="copy", note="sizes that fill no vector"),
    Case("X2-2", "step", 4096, 256, 64, limit="matrix"),
    Case("X2-3", "step", 256, 256, 256, gradients=_WITH_INPUT, limit="matrix"),
    Case("X3-1", "step", 262144, 64, dtype=torch.float16),
    Case("X3-2", "step", 262144, 64, dtype=torch.bfloat16),
    Case("X3-3", "step", 65536, 64, 16, dtype=torch.bfloat16),
    Case("X3-4", "step", 262144, 64, dtype=torch.float64),
    *(
        _streamed(f"G1{part}-{outputs}", rows, features, outputs, dtype)
        for part, rows, features, dtype in (
            ("a", 1 << 24, 64, torch.float32),
            ("b", 1 << 20, 1024, torch.float32),
            ("c", 1 << 25, 64, torch.bfloat16),
            ("d", 1 << 21, 1024, torch.bfloat16),
        )
        for outputs in (1, 2, 4, 8)
    ),
    _streamed("G1e", 1 << 20, 1024, 1, torch.float32, gradients=_WITH_INPUT),
    *(
        _multiplied(f"G2{part}", rows, features, outputs)
        for part, rows, features, outputs in (
            ("a", 65536, 256, 8192),
            ("b", 65536, 1024, 1024),
            ("c", 65536, 1024, 4096),
            ("d", 16384, 4096, 4096),
            ("e", 16384, 4096, 8192),
        )
    ),
    *(
        Case(
            f"G2m-{number}",
            "memory",
            rows,
            features,
            outputs,
            dtype=torch.bfloat16,
            gradients=_WITH_INPUT,
            peers=("eager", "compile", "chunked", "fused"),
            device="cuda",
            limit="",
            targets=(Target("eager", at_most=0.35),),
        )
        for number, rows, features, outputs in ((1, 65536, 1024, 8192), (2, 16384, 1024, 32768))
    ),
    Case(
        "G3",
        "fit",
        100,
        1,
        epochs=100,
        peers=("eager", "compile", "graph", "fit", "fused"),
        device="cuda",
        limit="",
        targets=(Target("eager", at_least=100),),
    ),
    Case(
        "G4",
        "study",
        10 * MILLION,
        64,
        epochs=100,
        trials=20,
        peers=("eager", "graph", "fused"),
        device="cuda",
        limit="",
        targets=(Target("eager", at_least=500),),
        measured=(2, 3),
        note="full batch, so every epoch is the same work",
    ),
)


def select(names: Sequence[str] | None, cases: Sequence[Case] = CASES) -> list[Case]:
    """Return the cases of the given names, in the order of the table.

    Args:
        names: Names of cases, or what the names of several begin with (``"P4"`` for ``P4a`` to ``P4d``), in any case;
            None for all.
        cases: The cases to choose from.

    Raises:
        ValueError: There is no case of a name.
    """
    if names is None:
        return list(cases)

    def named(case: Case, name: str) -> bool:
        rest = case.id[len(name) :]
        # A number is a name's end: P1 does not mean a P10.
        return bool(name) and case.id.lower().startswith(name.lower()) and not rest[:1].isdigit()

    for name in names:
        if not any(named(case, name) for case in cases):
            raise ValueError(f"bench: row must be one of {', '.join(case.id for case in cases)}, but got {name!r}")
    return [case for case in cases if any(named(case, name) for name in names)]


def quick_case(case: Case) -> Case:
    """Return the case scaled down to some milliseconds, which tries everything and measures nothing of interest."""
    in_features, out_features = min(case.in_features, 128), min(case.out_features, 1024)
    if case.kind == "memory":  # must be seen beside a process's other memory
        return replace(case, rows=min(case.rows, 1024), in_features=64, out_features=min(case.out_features, 8192))
    return replace(
        case,
        rows=min(case.rows, max(128, (1 << 18) // (in_features * out_features))),
        in_features=in_features,
        out_features=out_features,
        epochs=min(case.epochs, 5),
        trials=min(case.trials, 3),
        batch_size=min(case.batch_size, 128),
        measured=None,
    )
