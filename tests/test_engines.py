"""Every engine against the plain PyTorch loop written out by hand: losses, validation losses and final parameters.

The yardstick is that loop in float64, on rows and initial parameters that float32 holds exactly. A distance from it is
the largest difference in a series (losses, validation losses, each parameter) over the series' largest number.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from plain_loop import plain_loop
from torch import Tensor, nn

from torchintro.engines import ENGINES, MemoryRows, Trained, choose, train_models
from torchintro.optimizers import parse_optimizer
from torchintro.training import DivergedError, fit, initial_linear

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}

# Name: class of torch.optim, its arguments.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "momentum and dampening": ("SGD", {"momentum": 0.8, "dampening": 0.3}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "weight decay": ("SGD", {"weight_decay": 0.2}),
    "adam": ("Adam", {}),
    "adam and weight decay": ("Adam", {"weight_decay": 0.2, "betas": (0.8, 0.95)}),
    "amsgrad": ("Adam", {"amsgrad": True, "betas": (0.7, 0.9), "eps": 1e-6}),
    "adamw": ("AdamW", {"weight_decay": 0.2}),
}
# Of 23 rows: two kinds of short last batches.
BATCHES: dict[str, dict[str, Any]] = {
    "full": {},
    "slices": {"batch_size": 8, "shuffle": False},
    "shuffled": {"batch_size": 6, "seed": 3},
    "one batch": {"batch_size": 100, "seed": 3},
}
# The engines with the kinds of batches that they take.
TAKEN = [
    (engine, batches)
    for engine, batches in itertools.product(ENGINES[1:], BATCHES)
    if engine != "statistics" or batches in ("full", "one batch")
]
PARAMETERS = ("all", "no bias", "frozen bias", "frozen weight")


@dataclass(frozen=True)
class Case:
    """A run of :func:`torchintro.fit` in all but engine and dtype; hashable, so that an oracle serves every engine."""

    optimizer: str = "sgd"
    batches: str = "full"
    parameters: str = "all"
    schedule: bool = False
    outputs: int = 1
    validation: bool = False
    rows: int = 23
    features: int = 5
    epochs: int = 4
    seed: int = 0

    @property
    def lr(self) -> float | list[float]:
        rate = 0.05 if OPTIMIZERS[self.optimizer][0] == "SGD" else 0.02
        return [rate * (1 - 0.2 * epoch / self.epochs) for epoch in range(self.epochs)] if self.schedule else rate

    def draw(self, dtype: torch.dtype) -> tuple[nn.Linear, list[Tensor]]:
        """Return the model, the rows and those held out, which are the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        true = torch.randn(self.outputs, self.features, generator=generator)
        data = []
        for rows in (self.rows, 9):
            X = torch.randn(rows, self.features, generator=generator)
            data += [X, X @ true.T + 0.5 + 0.1 * torch.randn(rows, self.outputs, generator=generator)]
        model = initial_linear(self.features, self.outputs, seed=self.seed + 1, dtype=torch.float32)
        if self.parameters == "no bias":
            model.bias = None
        if self.parameters == "frozen bias":
            model.bias.requires_grad_(False)
        if self.parameters == "frozen weight":
            model.weight.requires_grad_(False)
        return model.to(dtype), [part.to(dtype) for part in data]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run left: its losses and its parameters by name."""

    losses: Tensor
    validation_losses: Tensor
    parameters: dict[str, Tensor]

    def series(self) -> Iterator[tuple[str, Tensor]]:
        yield "losses", self.losses
        yield "validation losses", self.validation_losses
        yield from self.parameters.items()

    def distance(self, exact: Outcome) -> float:
        """How far it is from the exact one."""
        distances = [0.0]
        for (name, mine), (other, theirs) in zip(self.series(), exact.series(), strict=True):
            assert name == other
            assert mine.shape == theirs.shape, name
            if theirs.numel():
                distances.append(((mine.double() - theirs).abs().max() / theirs.abs().max()).item())
        return max(distances)

    def equals(self, other: Outcome) -> bool:
        """Say whether it is the same to the bit, with NaN where the other has it."""
        pairs = zip(self.series(), other.series(), strict=True)
        return all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for (_, a), (_, b) in pairs)


def parameters_of(model: nn.Linear) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def options_of(optimizer: str) -> dict[str, Any]:
    """The arguments of `fit` for one of OPTIMIZERS."""
    class_name, given = OPTIMIZERS[optimizer]
    named = {key: given[key] for key in ("momentum", "weight_decay") if key in given}
    return {
        "optimizer": class_name,
        **named,
        "optimizer_options": {key: value for key, value in given.items() if key not in named},
    }


@functools.cache
def run_by_hand(case: Case, dtype: torch.dtype) -> Outcome:
    model, (X, y, X_held_out, y_held_out) = case.draw(dtype)
    class_name, options = OPTIMIZERS[case.optimizer]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, class_name)(trained, lr=case.lr[0] if case.schedule else case.lr, **options)
    losses = plain_loop(
        model,
        X,
        y,
        optimizer,
        epochs=case.epochs,
        validation=(X_held_out, y_held_out) if case.validation else None,
        lr=case.lr if case.schedule else None,
        **BATCHES[case.batches],
    )
    return Outcome(*losses, parameters_of(model))


def run_engine(case: Case, dtype: torch.dtype, engine: str, **others: Any) -> Outcome:
    model, (X, y, X_held_out, y_held_out) = case.draw(dtype)
    result = fit(
        model,
        X,
        y,
        lr=case.lr,
        epochs=case.epochs,
        validation=(X_held_out, y_held_out) if case.validation else None,
        engine=engine,
        **options_of(case.optimizer),
        **BATCHES[case.batches],
        **others,
    )
    assert result.engine == engine or engine == "auto"
    for losses in (result.losses, result.validation_losses):
        assert losses is None or (losses.dtype, losses.shape) == (torch.float64, (case.epochs,))
    assert (result.validation_losses is None) == (not case.validation)
    held_out = torch.zeros(0, dtype=torch.float64) if result.validation_losses is None else result.validation_losses
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    return Outcome(result.losses, held_out, parameters_of(model))


def assert_as_the_plain_loop(case: Case, dtype: torch.dtype, engine: str) -> None:
    """Compare with float64.

    How far the plain loop in float32 is off, in roundings, says how much the problem magnifies them; eight at least,
    for what it happens to hit exactly. An engine may be four times as far off, in roundings of its own dtype.
    """
    exact, plain = run_by_hand(case, torch.float64), run_by_hand(case, torch.float32)
    roundings = max(plain.distance(exact) / EPS[torch.float32], 8.0)
    distance = run_engine(case, dtype, engine).distance(exact)
    assert distance <= 4 * roundings * EPS[dtype], f"{case}: {distance:.3e}, {roundings:.1f} roundings"


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_combination_follows_the_plain_loop(engine, dtype, optimizer, batches):
    """Each of these with and without a bias or with half of the parameters frozen, a schedule, outputs, validation."""
    cases = [
        Case(optimizer, batches, *rest) for rest in itertools.product(PARAMETERS, (False, True), (1, 3), (False, True))
    ]
    for case in cases:
        if engine == "statistics" and batches in ("slices", "shuffled"):
            size = BATCHES[batches]["batch_size"]
            sentence = f"^fit: engine 'statistics' cannot do this: it has no mini-batches, but batch_size is {size}"
            with pytest.raises(ValueError, match=sentence):
                run_engine(case, dtype, engine)
        else:
            assert_as_the_plain_loop(case, dtype, engine)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    case=st.builds(
        Case,
        st.sampled_from(sorted(OPTIMIZERS)),
        st.sampled_from(sorted(BATCHES)),
        st.sampled_from(PARAMETERS),
        st.booleans(),
        st.sampled_from([1, 2, 3, 8, 9]),
        st.booleans(),
        rows=st.integers(1, 300),
        features=st.sampled_from([1, 2, 3, 7, 16, 17, 33, 64]),
        epochs=st.integers(1, 4),
        seed=st.integers(0, 9),
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    engine=st.sampled_from(ENGINES),
)
def test_every_size_follows_the_plain_loop(case, dtype, engine):
    size = BATCHES[case.batches].get("batch_size")
    assert_as_the_plain_loop(case, dtype, "auto" if engine == "statistics" and size and size < case.rows else engine)


def test_the_cases_tell_optimizers_apart():
    """Were two of them the same run, an engine that mixed them up would not be found."""
    outcomes = {name: run_by_hand(Case(name), torch.float64) for name in OPTIMIZERS}
    for one, other in itertools.combinations(outcomes, 2):
        assert outcomes[one].distance(outcomes[other]) > 1e-4, (one, other)
    for change in ({"batches": "slices"}, {"batches": "shuffled"}, {"schedule": True}):
        assert run_by_hand(Case(**change), torch.float64).distance(outcomes["sgd"]) > 1e-4
    for frozen, name in (("frozen bias", "bias"), ("frozen weight", "weight")):
        kept = run_engine(Case(parameters=frozen), torch.float64, "fused").parameters[name]
        assert torch.equal(kept, parameters_of(Case().draw(torch.float64)[0])[name])


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_reference_is_the_plain_loop_to_the_bit(optimizer, batches):
    for parameters, schedule in itertools.product(PARAMETERS, (False, True)):
        case = Case(optimizer, batches, parameters, schedule, 3, True)
        assert run_engine(case, torch.float32, "reference").equals(run_by_hand(case, torch.float32))


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("kind", [tuple, torch.tensor, lambda rates: torch.tensor(rates, dtype=torch.float64)])
def test_any_sequence_of_learning_rates(engine, kind):
    X, y = torch.randn(20, 2), torch.randn(20, 1)
    rates = [0.25, 0.125, 0.5]  # exact in float32
    outcomes = []
    for lr in (rates, kind(rates)):
        model = initial_linear(2, 1, seed=0)
        losses = fit(model, X, y, lr=lr, epochs=3, engine=engine).losses
        outcomes.append(Outcome(losses, losses[:0], parameters_of(model)))
    assert outcomes[0].equals(outcomes[1])


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_one_rate_for_all_epochs_is_a_sequence_of_it(engine):
    X, y = torch.randn(20, 2), torch.randn(20, 1)
    results = [fit(initial_linear(2, 1, seed=0), X, y, lr=lr, epochs=4, engine=engine) for lr in (0.1, [0.1] * 4)]
    assert torch.equal(results[0].losses, results[1].losses)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_divergence_names_the_rate_of_its_epoch(engine):
    X, y = torch.randn(20, 2), torch.randn(20, 1)
    with pytest.raises(DivergedError) as caught:
        fit(initial_linear(2, 1, seed=0), X, y, lr=[0.1, 0.2, 1e25, 0.3, 0.4], epochs=5, engine=engine)
    # The update of the third epoch makes the loss of the fourth infinite.
    assert (caught.value.epoch, caught.value.lr, len(caught.value.losses)) == (4, 0.3, 3)


BAD_RATES = [
    ([0.1, 0.1], ValueError, "fit: lr must be one number or one for each of 3 epochs, but got 2$"),
    ([0.1] * 4, ValueError, "fit: lr must be one number or one for each of 3 epochs, but got 4$"),
    ([], ValueError, "fit: lr must be one number or one for each of 3 epochs, but got 0$"),
    (torch.ones(5), ValueError, "fit: lr must be one number or one for each of 3 epochs, but got 5$"),
    ([0.1, -0.2, 0.1], ValueError, r"fit: lr\[1\] must be a positive, finite number, but got -0.2$"),
    ([0.1, 0.2, 0], ValueError, r"fit: lr\[2\] must be a positive, finite number, but got 0$"),
    ([math.nan, 0.2, 0.1], ValueError, r"fit: lr\[0\] must be a positive, finite number, but got nan$"),
    ((0.1, math.inf, 0.1), ValueError, r"fit: lr\[1\] must be a positive, finite number, but got inf$"),
    ([0.1, "0.2", 0.1], TypeError, r"fit: lr\[1\] must be a positive, finite number, but got '0.2'$"),
    ([0.1, True, 0.1], TypeError, r"fit: lr\[1\] must be a positive, finite number, but got True$"),
    ([0.1, [0.2], 0.1], TypeError, r"fit: lr\[1\] must be a positive, finite number, but got \[0.2\]$"),
    (torch.ones(3, 1), TypeError, r"fit: lr\[0\] must be a positive, finite number, but got \[1.0\]$"),
    (None, TypeError, "fit: lr must be a positive, finite number, but got None$"),
    ({0.1, 0.2, 0.3}, TypeError, "fit: lr must be a positive, finite number, but got {"),
]


@pytest.mark.parametrize(("lr", "error", "message"), BAD_RATES)
@pytest.mark.parametrize("engine", ENGINES)
def test_bad_learning_rates_change_nothing(engine, lr, error, message):
    model = initial_linear(2, 1, seed=0)
    before = parameters_of(model)
    with pytest.raises(error, match=f"^{message}"):
        fit(model, torch.randn(5, 2), torch.randn(5, 1), lr=lr, epochs=3, engine=engine)
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(model).items())


@pytest.mark.parametrize("shuffle", [1, 0, "yes", 0.5, torch.tensor(True), []])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_bad_shuffle(shuffle, batch_size):
    model = initial_linear(2, 1, seed=0)
    with pytest.raises(TypeError, match=r"^fit: shuffle must be True or False, but got "):
        fit(model, torch.randn(5, 2), torch.randn(5, 1), lr=0.1, shuffle=shuffle, batch_size=batch_size)


@pytest.mark.parametrize("engine", ["fused", "autograd", "reference"])
def test_shuffle_draws_and_slices_do_not(engine):
    X, y = torch.randn(20, 2), torch.randn(20, 1)

    def losses(**arguments: Any) -> Tensor:
        return fit(
            initial_linear(2, 1, seed=0), X, y, lr=0.1, epochs=3, batch_size=6, engine=engine, **arguments
        ).losses

    state = torch.get_rng_state()
    slices = losses(shuffle=False)
    assert torch.equal(losses(shuffle=False, seed=7), slices)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(losses(seed=7), losses(shuffle=True, seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(losses(seed=7), slices)
    # Without a seed: from the global state, as the plain loop draws.
    torch.manual_seed(7)
    drawn = losses()
    model = initial_linear(2, 1, seed=0)
    torch.manual_seed(7)
    expected, _ = plain_loop(model, X, y, torch.optim.SGD(model.parameters(), lr=0.1), epochs=3, batch_size=6)
    assert (drawn - expected).abs().max() <= 32 * EPS[torch.float32] * expected.max()


# K models at once.

MANY = ["momentum", "sgd", "nesterov", "weight decay", "momentum and dampening"]
MANY_ADAM = ["adam", "amsgrad", "adam and weight decay"]


def rows_of(rows: int, features: int = 5, outputs: int = 1, dtype: torch.dtype = torch.float32) -> MemoryRows:
    _, (X, y, X_held_out, y_held_out) = Case(rows=rows, features=features, outputs=outputs).draw(dtype)
    return MemoryRows(X, y, (X_held_out, y_held_out))


def train(rows: MemoryRows, names: list[str], lr: list[Any], *, epochs: int = 6, **others: Any) -> Trained:
    optimizers = []
    for name in names:
        options = {"momentum": 0.0, "weight_decay": 0.0} | options_of(name)
        arguments = (options["optimizer"], options["momentum"], options["weight_decay"], options["optimizer_options"])
        optimizers.append(parse_optimizer("train", *arguments))
    others = {"batch_size": None, "seed": 3} | others
    initial = initial_linear(rows.in_features, rows.out_features, seed=1, dtype=rows.dtype)
    return train_models(rows, initial=initial, lr=lr, epochs=epochs, optimizers=optimizers, **others)


def outcome_of(trained: Trained, model: int) -> Outcome:
    assert trained.bias is not None
    parameters = {"weight": trained.weight[model], "bias": trained.bias[model]}
    held_out = trained.losses[:0] if trained.validation_losses is None else trained.validation_losses
    return Outcome(trained.losses[:, model], held_out[:, model], parameters)


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("names", [MANY, MANY_ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("engine", "batches"), TAKEN)
def test_each_of_several_models_is_its_own_run_to_the_bit(engine, batches, dtype, outputs, names, schedule):
    rows = rows_of(100, outputs=outputs, dtype=dtype)
    # More than a kernel takes at once; the loops take one after the other.
    many = [*names, *names, *names[:1]] if engine in ("fused", "statistics") else names[:3]
    lr: list[Any] = [0.02 + 0.004 * k for k in range(len(many))]
    if schedule:
        lr = [[rate * (1 - 0.1 * epoch) for epoch in range(6)] for rate in lr]
    others = {"engine": engine, **BATCHES[batches]}
    together = train(rows, many, lr, **others)
    assert together.engine == engine
    assert together.failures == [None] * len(many)
    for k, name in enumerate(many):
        assert outcome_of(together, k).equals(outcome_of(train(rows, [name], [lr[k]], **others), 0)), (k, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("outputs", "names"), [(1, MANY), (3, MANY_ADAM)])
@pytest.mark.parametrize("batch_size", [None, 1000])
def test_each_of_several_models_is_its_own_run_on_many_rows(batch_size, outputs, names, dtype):
    """How rows are cut into blocks, whose sums are rounded, depends on the work, and so on the number of models.

    A thousand terms in another order are some thirty roundings, which momentum magnifies: four times as many.
    """
    rows = rows_of(3001, 9, outputs, dtype)
    lr = [0.02 + 0.01 * k for k in range(len(names))]
    together = train(rows, names, lr, engine="fused", batch_size=batch_size)
    for k, name in enumerate(names):
        alone = train(rows, [name], [lr[k]], engine="fused", batch_size=batch_size)
        assert outcome_of(together, k).distance(outcome_of(alone, 0)) <= 128 * EPS[dtype]


# How a model of three diverges: the batch size, its learning rate in each epoch, its failure.
FAILURES: dict[str, tuple[int | None, list[float], tuple[int, str, int]]] = {
    "loss": (None, [0.02, 1e25, 0.02, 0.02, 0.02, 0.02], (3, "loss", 2)),
    "loss of a mini-batch": (8, [0.02, 0.02, 1e15, 0.02, 0.02, 0.02], (3, "loss", 2)),
    "first loss after an update": (8, [3e38] * 6, (1, "loss", 0)),
    "validation loss": (None, [0.02, 0.02, 1e12, 0.02, 0.02, 0.02], (3, "validation loss", 3)),
    "validation loss after mini-batches": (8, [0.02, 0.02, 1e2, 0.02, 0.02, 0.02], (3, "validation loss", 3)),
    "last update": (None, [0.02] * 5 + [3e38], (6, "loss", 6)),
}


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        (engine, kind)
        for engine, kind in itertools.product(ENGINES[1:], FAILURES)
        if engine != "statistics" or FAILURES[kind][0] is None
    ],
)
def test_a_model_that_diverges_does_not_disturb_the_others(engine, kind):
    batch_size, bad, expected = FAILURES[kind]
    rows = rows_of(50)
    assert rows.validation is not None
    X, y = rows.validation
    # Held-out rows so large that only their loss leaves float32; otherwise none, whose loss would be the first to.
    rows = MemoryRows(rows.X, 100 * rows.y, (1e8 * X, y) if "validation" in kind else None)
    names, lr = ["momentum", "sgd", "nesterov"], [[0.01] * 6, bad, [0.03] * 6]
    others = {"engine": engine, "batch_size": batch_size}
    together = train(rows, names, lr, **others)
    failure = together.failures[1]
    assert failure is not None
    assert (failure.epoch, failure.kind, failure.finite) == expected
    assert not math.isfinite(failure.loss)
    assert together.losses[:, 1].isfinite().tolist() == [epoch < failure.finite for epoch in range(6)]
    for k in range(3):
        alone = train(rows, [names[k]], [lr[k]], **others)
        assert (together.failures[k] is None) == (k != 1)
        assert (alone.failures[0] is None) == (k != 1)
        assert outcome_of(together, k).equals(outcome_of(alone, 0))


@pytest.mark.parametrize("batch_size", [None, 64, 4096])
@pytest.mark.parametrize("engine", ["fused", "statistics"])
@pytest.mark.parametrize("models", [1, 20])
def test_the_same_bits_for_any_number_of_threads(models, engine, batch_size):
    """Threads share the rows of large batches, the models of small ones."""
    if engine == "statistics":
        batch_size = None
    rows = rows_of(9001, 60)  # more work than one thread is given
    names = ["momentum"] * models
    lr = [0.01 + 0.001 * k for k in range(models)]
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            fresh = MemoryRows(rows.X, rows.y, rows.validation)
            outcomes.append(train(fresh, names, lr, epochs=2, engine=engine, batch_size=batch_size))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(outcome_of(outcomes[0], k).equals(outcome_of(other, k)) for k in range(models))


@pytest.mark.parametrize(("engine", "batches"), TAKEN)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_bits_in_any_number_of_calls(optimizer, engine, batches):
    """A progress callable hears of every epoch, so that every one is a call of its own."""
    for dtype, outputs in itertools.product((torch.float32, torch.float64), (1, 3)):
        case = Case(optimizer, batches, "all", True, outputs, True, epochs=7)
        heard: list[tuple[int, float]] = []
        whole = run_engine(case, dtype, engine)
        parts = run_engine(case, dtype, engine, progress=lambda *call, heard=heard: heard.append(call))
        assert parts.equals(whole)
        assert heard == list(enumerate(whole.losses.tolist(), start=1))


@pytest.mark.parametrize("ends", [[1, 3, 7], [3, 4, 7], [6, 7]])
@pytest.mark.parametrize("batches", ["full", "shuffled"])
def test_the_same_bits_for_calls_of_any_length(ends, batches):
    rows = rows_of(40)
    heard: list[int] = []
    lr = [0.01 * (k + 1) for k in range(len(MANY))]
    others = {"epochs": 7, "engine": "fused", **BATCHES[batches]}
    whole = train(rows, MANY, lr, **others)
    parts = train(
        rows,
        MANY,
        lr,
        wanted=lambda done: next(end for end in ends if end > done) - done,
        report=lambda epoch, losses: heard.append(epoch),
        **others,
    )
    assert heard == list(range(1, 8))
    assert all(outcome_of(parts, k).equals(outcome_of(whole, k)) for k in range(len(MANY)))


# Problems that are hard for second moments. Of each the precision that is kept is stated: none but the first loses any.


@dataclass(frozen=True, eq=False)
class Hard:
    """Rows in float32, and a run on them; `scale` multiplies the initial weights."""

    X: Tensor
    y: Tensor
    lr: float
    epochs: int = 100
    optimizer: str = "sgd"
    bias: bool = True
    scale: float = 1.0

    def run(self, engine: str, dtype: torch.dtype) -> Outcome:
        model = initial_linear(self.X.shape[1], self.y.shape[1], seed=1, dtype=torch.float32)
        with torch.no_grad():
            model.weight *= self.scale
        if not self.bias:
            model.bias = None
        model = model.to(dtype)
        X, y = self.X.to(dtype), self.y.to(dtype)
        if engine == "plain":
            class_name, options = OPTIMIZERS[self.optimizer]
            optimizer = getattr(torch.optim, class_name)(model.parameters(), lr=self.lr, **options)
            losses, _ = plain_loop(model, X, y, optimizer, epochs=self.epochs)
        else:
            arguments = {"lr": self.lr, "epochs": self.epochs, "engine": engine, **options_of(self.optimizer)}
            losses = fit(model, X, y, **arguments).losses
        return Outcome(losses, losses[:0], parameters_of(model))


def draw_rows(rows: int = 500, features: int = 4, noise: float = 0.1, bias: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    y = X @ torch.randn(features, 1, generator=generator, dtype=torch.float64) + bias
    return X, y + noise * y.std(correction=0).nan_to_num(1.0) * torch.randn(
        rows, 1, generator=generator, dtype=torch.float64
    )


def make_hard(X: Tensor, y: Tensor, lr: float, **others: Any) -> Hard:
    return Hard(X.float(), y.float(), lr, **others)


def collinear(difference: float) -> tuple[Tensor, Tensor]:
    X, y = draw_rows()
    X[:, 1] = X[:, 0] + difference * X[:, 1]
    return X, y


X4, y4 = draw_rows()
HARD: dict[str, Hard] = {
    "means": make_hard(X4 + 1e4, y4, 1e-9, epochs=200),
    "means of the targets too": make_hard(X4 + 1e4, y4 + 1e4, 1e-9, epochs=200),
    "means, adam": make_hard(X4 + 1e4, y4, 1e-3, epochs=200, optimizer="adam"),
    "collinear to 1e-2": make_hard(*collinear(1e-2), 0.3, epochs=300),
    "collinear to 1e-4": make_hard(*collinear(1e-4), 0.3, epochs=300),
    "collinear to 1e-4, momentum": make_hard(*collinear(1e-4), 0.05, epochs=300, optimizer="momentum"),
    "collinear to 1e-4, adam": make_hard(*collinear(1e-4), 0.01, epochs=300, optimizer="adam"),
    "small features": make_hard(X4 * 1e-10, y4, 1e19, bias=False, scale=1e10),
    "small features, small steps": make_hard(X4 * 1e-10, y4, 0.1),
    "large features": make_hard(X4 * 1e10, y4, 1e-21, scale=1e-10),
    "large features and targets": make_hard(X4 * 1e10, y4 * 1e10, 1e-21),
    "small targets": make_hard(X4, y4 * 1e-10, 0.1),
    "large targets": make_hard(X4, y4 * 1e10, 0.1),
    "fewer rows than features": make_hard(*draw_rows(5, 12), 0.05, epochs=300),
    "fewer rows than features, adam": make_hard(*draw_rows(5, 12), 0.05, optimizer="adam"),
    "one row": make_hard(*draw_rows(1, 3), 0.05, epochs=300),
    "one row and feature": make_hard(*draw_rows(1, 1), 0.05),
}


@functools.cache
def exact_run(name: str) -> Outcome:
    return HARD[name].run("plain", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HARD)
def test_second_moments_keep_all_digits_of_the_parameters(name, dtype):
    """The loop is in float64: what float32 rows lose is the rounding of the result, half a unit, and never more.

    In float64 second moments are rounded once where the plain loop rounds residuals: a thousand roundings of the
    largest parameter are allowed, for what the updates magnify (a hundred are met with nearly collinear columns).
    """
    exact, outcome = exact_run(name), HARD[name].run("statistics", dtype)
    allowed = EPS[dtype] / 2 + 1000 * EPS[torch.float64]
    for key, parameter in outcome.parameters.items():
        theirs = exact.parameters[key]
        assert ((parameter.double() - theirs).abs().max() / theirs.abs().max()).item() <= allowed, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HARD)
def test_second_moments_keep_the_digits_of_every_loss(name, dtype):
    """Each loss to 16 roundings, in float64, of what cancels in it: the targets' mean square and the first loss."""
    exact, losses = exact_run(name).losses, HARD[name].run("statistics", dtype).losses
    size = max(exact[0].item(), HARD[name].y.double().square().mean().item())
    assert (losses - exact).abs().max() <= 16 * EPS[torch.float64] * size


@pytest.mark.parametrize("engine", ["fused", "statistics"])
@pytest.mark.parametrize("name", HARD)
def test_hard_problems_are_no_harder_than_for_the_plain_loop(name, engine):
    """In float32, at most four times as far from float64 as the plain loop is, or eight roundings."""
    exact, plain = exact_run(name), HARD[name].run("plain", torch.float32)
    allowed = 4 * max(plain.distance(exact), 8 * EPS[torch.float32])
    assert HARD[name].run(engine, torch.float32).distance(exact) <= allowed


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("share", [1e-8, 1e-10, 1e-12])
def test_second_moments_of_near_perfect_fits(share, optimizer):
    """Residuals of 1e-8, 1e-10, 1e-12 of the targets' variance: eight, six, four digits of the loss are documented.

    Met are a digit less, 1e-16 being the rounding of each of some sums. That is still more than the float32 loop has,
    whose residuals are differences of rounded numbers, and the parameters keep all their digits.
    """
    lr = {"sgd": 0.3, "momentum": 0.03}[optimizer]
    X, y = draw_rows(noise=math.sqrt(share))
    hard = make_hard(X, y, lr, epochs=300, optimizer=optimizer)
    exact = hard.run("plain", torch.float64)
    variance = hard.y.double().var(correction=0)
    assert 0.5 * share <= exact.losses[-1] / variance <= 2 * share

    def error(outcome: Outcome) -> float:
        return ((outcome.losses - exact.losses).abs() / exact.losses).max().item()

    ours, plain = hard.run("statistics", torch.float32), hard.run("plain", torch.float32)
    assert error(ours) <= 16 * EPS[torch.float64] / share
    assert error(ours) < error(plain)
    for name, parameter in ours.parameters.items():
        theirs = exact.parameters[name]
        assert (parameter.double() - theirs).abs().max() <= (EPS[torch.float32] / 2 + 1e-13) * theirs.abs().max()
    assert (ours.losses >= 0).all()


@pytest.mark.parametrize("name", ["fewer rows than features", "one row", "one row and feature"])
def test_second_moments_of_a_perfect_fit_are_never_negative(name):
    losses = HARD[name].run("statistics", torch.float32).losses
    assert (losses >= 0).all()
    assert losses[-1] <= 16 * EPS[torch.float64] * losses[0]


# What `auto` takes.

AUTO: dict[str, tuple[tuple[int, int, int], torch.dtype, dict[str, Any], str, str]] = {
    "many rows": (
        (20000, 4, 1),
        torch.float32,
        {},
        "statistics",
        "full batch: one pass over the rows serves all epochs",
    ),
    "many rows, a batch of all": (
        (20000, 4, 1),
        torch.float32,
        {"batch_size": 20000},
        "statistics",
        "full batch: one pass over the rows serves all epochs",
    ),
    "many rows, adamw": ((20000, 4, 3), torch.float32, {"optimizer": "adamw"}, "statistics", "full batch: one pass"),
    "many rows, one epoch": ((20000, 40, 1), torch.float32, {"epochs": 1}, "fused", "so few rows that second moments"),
    "mini-batches": ((20000, 4, 1), torch.float32, {"batch_size": 256}, "fused", "mini-batches"),
    "mini-batches in float64": ((200, 4, 1), torch.float64, {"batch_size": 8}, "fused", "mini-batches"),
    "float64": ((20000, 4, 1), torch.float64, {}, "fused", "full batch in float64, of which second moments would lose"),
    "few rows, few features": ((10, 4, 1), torch.float32, {}, "statistics", "full batch: one pass over the rows"),
    "fewer rows than few features": ((3, 4, 1), torch.float32, {}, "statistics", "full batch: one pass over the rows"),
    "fewer rows than features": (
        (10, 200, 1),
        torch.float32,
        {},
        "fused",
        "so few rows that second moments are not worth it",
    ),
    "more features than second moments are for": ((10, 4097, 1), torch.float32, {"epochs": 2}, "fused", "so few rows"),
    "rmsprop": ((200, 4, 1), torch.float32, {"optimizer": "rmsprop"}, "autograd", "the optimizer RMSprop with these"),
    "maximize": (
        (200, 4, 1),
        torch.float32,
        {"lr": 1e-5, "optimizer_options": {"maximize": True}},
        "autograd",
        "the optimizer SGD with these options, none of plain sgd, adam and adamw",
    ),
    "options that are the default": (
        (20000, 4, 1),
        torch.float32,
        {"optimizer_options": {"maximize": False, "foreach": True}},
        "statistics",
        "full batch",
    ),
    "bfloat16": ((200, 4, 1), torch.bfloat16, {}, "autograd", "bfloat16 parameters, whose rounding in each step only"),
    "float16": ((200, 4, 1), torch.float16, {"batch_size": 8}, "autograd", "float16 parameters, whose rounding"),
    "64 targets": ((200, 4, 64), torch.float32, {"batch_size": 8}, "fused", "mini-batches"),
    "65 targets": ((200, 4, 65), torch.float32, {"batch_size": 8}, "autograd", "products of matrices, with so many"),
    "65 targets in float64": ((200, 4, 65), torch.float64, {}, "autograd", "products of matrices, with so many"),
    "65 targets, many rows": ((20000, 4, 65), torch.float32, {"epochs": 50}, "statistics", "full batch: one pass"),
    "65 targets, few rows": ((10, 200, 65), torch.float32, {"epochs": 3}, "autograd", "products of matrices"),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_takes(name):
    (rows, features, outputs), dtype, given, engine, reason = AUTO[name]
    X, y = torch.randn(rows, features).to(dtype), torch.randn(rows, outputs).to(dtype)
    model = initial_linear(features, outputs, seed=0, dtype=dtype)
    arguments = {"lr": 1e-3, "epochs": 20, "seed": 0, **given}
    result = fit(model, X, y, **arguments)
    assert result.engine == engine
    assert result.reason.startswith(reason)
    if engine != "autograd" or dtype in (torch.float32, torch.float64):
        same = initial_linear(features, outputs, seed=0, dtype=dtype)
        asked = fit(same, X, y, engine=engine, **arguments)
        assert (asked.engine, asked.reason) == (engine, "asked for")
        assert torch.equal(asked.losses, result.losses)
        assert torch.equal(same.weight, model.weight)


@pytest.mark.parametrize(
    ("models", "outputs", "engine"), [(1, 65, "autograd"), (2, 65, "fused"), (1, 1, "fused"), (40, 1, "fused")]
)
def test_auto_takes_the_number_of_models_into_account(models, outputs, engine):
    optimizer = parse_optimizer("train", "sgd", 0.0, 0.0, None)
    choice = choose(
        rows_of(100, outputs=outputs), engine="auto", optimizers=[optimizer] * models, batch_size=8, epochs=3
    )
    assert choice.engine == engine


@pytest.mark.parametrize("engine", ["fused", "statistics"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": "rmsprop"}, "the optimizer RMSprop with these options, none of plain sgd, adam and adamw"),
        ({"optimizer_options": {"maximize": True}}, "the optimizer SGD with these options, none of plain sgd, .*"),
        ({"dtype": torch.bfloat16}, "bfloat16 parameters, whose rounding in each step only the loop itself has"),
        ({"dtype": torch.float16}, "float16 parameters, whose rounding in each step only the loop itself has"),
    ],
)
def test_what_an_engine_cannot_do_it_says(engine, change, reason):
    dtype = change.get("dtype", torch.float32)
    arguments = {key: value for key, value in change.items() if key != "dtype"}
    model = initial_linear(2, 1, seed=0, dtype=dtype)
    before = parameters_of(model)
    X, y = torch.randn(5, 2).to(dtype), torch.randn(5, 1).to(dtype)
    sentence = f"^fit: engine '{engine}' cannot do this: {reason}; auto finds one that can$"
    with pytest.raises(ValueError, match=sentence):
        fit(model, X, y, lr=0.1, epochs=2, engine=engine, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(model).items())
    assert fit(model, X, y, lr=1e-3, epochs=2, **arguments).engine == "autograd"
