"""Every engine against the plain PyTorch loop written out by hand: losses, validation losses and final parameters.

The yardstick is that loop in float64, on rows and initial parameters that float32 holds exactly. A distance from it is
the largest difference in a series (losses, validation losses, each parameter) over the series' largest number.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from engine_runs import (
    BATCHES,
    EPS,
    OPTIMIZERS,
    PARAMETERS,
    TAKEN,
    Case,
    Outcome,
    assert_as_the_plain_loop,
    options_of,
    parameters_of,
    rows_of,
    run_by_hand,
    run_engine,
)
from plain_loop import plain_loop
from torch import Tensor

from torchintro.nn import initial_linear
from torchintro.training.fit import DivergedError, fit
from torchintro.training.listener import Listener
from torchintro.training.optimizers import parse_optimizer
from torchintro.training.options import ENGINES, TrainingOptions
from torchintro.training.row_kinds import MemoryRows
from torchintro.training.train import Trained, train_models

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


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


def train(
    rows: MemoryRows, names: list[str], lr: list[Any], *, epochs: int = 6, listener: Any = None, **others: Any
) -> Trained:
    optimizers = []
    for name in names:
        options = {"momentum": 0.0, "weight_decay": 0.0} | options_of(name)
        arguments = (options["optimizer"], options["momentum"], options["weight_decay"], options["optimizer_options"])
        optimizers.append(parse_optimizer("train", *arguments))
    options = TrainingOptions(epochs, **{"seed": 3} | others)
    initial = initial_linear(rows.in_features, rows.out_features, seed=1, dtype=rows.dtype)
    return train_models(rows, options, initial, lr=lr, optimizers=optimizers, listener=listener)


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

    class Impatient(Listener):
        def begin(self, choice):
            assert choice.engine == "fused"

        def epoch(self, epoch, losses):
            heard.append(epoch)

        def patience(self, done):
            return next(end for end in ends if end > done) - done

    lr = [0.01 * (k + 1) for k in range(len(MANY))]
    others = {"epochs": 7, "engine": "fused", **BATCHES[batches]}
    whole = train(rows, MANY, lr, **others)
    parts = train(rows, MANY, lr, listener=Impatient(), **others)
    assert heard == list(range(1, 8))
    assert all(outcome_of(parts, k).equals(outcome_of(whole, k)) for k in range(len(MANY)))
