"""The peers of training runs and studies: each does the case's work, and one that does not is found out."""

import contextlib
import functools
import importlib.util
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_cases import CPU, LIMITS, case_named, measured

import torchintro
from benchmarks import measure, models, study
from benchmarks.cases import CASES, quick_case
from benchmarks.peers import fused, loops
from benchmarks.peers import sklearn as sklearn_peers
from benchmarks.report.text import case_lines
from benchmarks.study import StudyWork
from benchmarks.timing import QUICK, once
from benchmarks.work import Unavailable
from benchmarks.works import make_work
from torchintro.nn import initial_linear

TRAININGS = [case.id for case in CASES if case.kind in ("fit", "models", "study")]


def has_jax():
    return importlib.util.find_spec("jax") is not None


def has_sklearn():
    return importlib.util.find_spec("sklearn") is not None


def plain_compile(monkeypatch):
    """Leave the compiler out, which takes seconds; what is done around it stays."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


def plain_graph(monkeypatch):
    """Replay by running again, which is what a graph does but for the time."""

    def captured(call, device):
        for _ in range(4):  # the warm-up and the capture, which train as well
            call()
        return call

    monkeypatch.setattr(loops, "captured", captured)


@pytest.mark.parametrize("name", TRAININGS)
def test_every_peer_of_a_training_case_is_right(name, monkeypatch):
    plain_compile(monkeypatch)
    plain_graph(monkeypatch)
    case = quick_case(case_named(name))
    case = replace(case, rows=min(case.rows, 1024))
    result = measure.run_case(case, CPU, LIMITS, QUICK, judge=False)
    assert result.status == "ok", result.failures
    expected = set(case.peers)
    if not has_jax():
        expected -= {"jax"}
    if not has_sklearn():
        expected -= {"sklearn", "ridge"}
    assert set(result.measurements) == expected
    assert set(result.checks) == expected
    assert set(result.skipped) == set(case.peers) - expected


# One is compiled to the end; of the others what this package wrote must trace, which is where it can go wrong.
@pytest.mark.parametrize(("name", "backend"), [("P2", "aot_eager"), ("P8a", "inductor"), ("P8b", "aot_eager")])
def test_the_compiled_loop_compiles(name, backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    case = replace(quick_case(case_named(name)), peers=("eager", "compile"), batch_size=0, rows=20)
    if name != "P2":
        # Ten whole batches and a shorter one, which is compiled by itself.
        case = replace(case, peers=("eager slices", "compile"), batch_size=6, rows=64, shuffle=name == "P8b")
    work = make_work(case, CPU, jax=False)
    assert work.skipped == {}
    assert work.verify()["compile"]["parameters"].passed


def test_full_batch_steps_are_compiled_together_and_make_all_epochs(monkeypatch):
    plain_compile(monkeypatch)
    asked = []
    compiled = loops.compiled_steps
    monkeypatch.setattr(loops, "compiled_steps", lambda compile, steps: asked.append(steps) or compiled(compile, steps))
    for epochs in (5, 60, 100):
        case = replace(case_named("P2"), epochs=epochs, peers=("eager", "compile"))
        assert make_work(case, CPU).verify()["compile"]["parameters"].passed
    assert asked == [5, 5, 25]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [64, 70])
def test_jax_trains_by_batches(shuffle, rows):
    pytest.importorskip("jax", reason="JAX is not installed")
    case = replace(quick_case(case_named("P8b")), rows=rows, batch_size=16, epochs=2, shuffle=shuffle)
    baseline = "eager shuffled" if shuffle else "eager slices"
    if shuffle:  # of which every epoch has another, and the loop by hand only one
        case = replace(case, epochs=1)
    checks = make_work(replace(case, peers=(baseline, "jax")), CPU).verify()
    assert checks["jax"]["parameters"].passed
    several = replace(case, kind="models", trials=3, peers=(baseline, "jax"))
    assert make_work(several, CPU).verify()["jax"]["parameters"].passed


def test_a_peer_that_is_left_out_says_why(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    skipped = measured("P8a", peers=("eager slices", "compile", "sklearn")).skipped
    assert skipped == {
        "compile": "torch.compile is left out of this run",
        "sklearn": 'scikit-learn is not installed: pip install "torchintro[cli]"',
    }
    assert measured("P7", peers=("eager", "ridge")).skipped["ridge"].startswith("scikit-learn is not installed")
    assert measured("G3", peers=("eager", "graph")).skipped == {"graph": "a CUDA graph needs a GPU"}
    assert measured("G4", peers=("eager", "graph")).skipped == {"graph": "a CUDA graph needs a GPU"}


def test_a_loop_that_does_not_compile_is_left_out(monkeypatch):
    def compile(function, **_):
        def broken(*_):
            raise RuntimeError("no compiler\nand more")

        return broken

    monkeypatch.setattr(torch, "compile", compile)
    case = replace(quick_case(case_named("P2")), peers=("eager", "compile"))
    result = measure.run_case(case, CPU, LIMITS, QUICK)
    assert result.skipped == {"compile": "torch.compile failed here: no compiler"}
    assert result.status == "ok"


def test_what_computes_on_the_cpu_only_is_left_out_elsewhere():
    X = torch.empty(3, 2, device="meta")
    with pytest.raises(Unavailable, match="scikit-learn is compared on the CPU only"):
        sklearn_peers.RidgeSolve(X, X[:, :1])
    with pytest.raises(Unavailable, match="scikit-learn is compared on the CPU only"):
        sklearn_peers.DescentByRows(X, X[:, :1], shuffle=True)


# CUDA graphs


@pytest.mark.parametrize("name", ["G3", "G4"])
def test_a_graph_of_plain_steps_where_the_compiled_ones_cannot_be_had(name, monkeypatch):
    plain_graph(monkeypatch)
    result = measured(name)  # without torch.compile
    assert result.status == "ok", result.failures
    assert "graph" in result.measurements
    assert any("of the plain step" in note for note in result.notes)
    plain_compile(monkeypatch)
    case = replace(quick_case(case_named(name)), peers=("eager", "graph"))
    if case.kind == "fit":
        notes = make_work(case, CPU).notes
        assert "graph is one CUDA graph of all epochs of the compiled steps" in notes


def test_a_graph_is_captured_after_a_warm_up_on_a_side_stream(monkeypatch):
    done = []

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            done.append("wait")

    class Graph:
        def replay(self):
            done.append("replay")

    @contextlib.contextmanager
    def within(what):
        done.append(f"into {type(what).__name__}")
        yield
        done.append(f"out of {type(what).__name__}")

    for name, fake in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": within,
        "CUDAGraph": Graph,
        "graph": within,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = loops.captured(lambda: done.append("call"), torch.device("cuda"))
    warm_up = ["wait", "into Stream", "call", "call", "call", "out of Stream", "wait"]
    assert done == [*warm_up, "into Graph", "call", "out of Graph"]
    done.clear()
    replay()
    assert done == ["replay"]


def test_capturing_that_fails_is_a_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("no capture\nand more")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    with pytest.raises(Unavailable, match=r"^a CUDA graph failed here: no capture$"):
        loops.captured(lambda: None, torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["G3", "G4"])
def test_graphs_on_a_gpu(name):
    case = quick_case(case_named(name))
    result = measure.run_case(case, torch.device("cuda", 0), LIMITS, QUICK, compile=False, judge=False)
    assert result.status == "ok", result.failures
    assert "graph" in result.measurements


# The package's peers


def test_the_operator_trains_the_model_in_place():
    X, y = torch.randn(30, 3), torch.randn(30, 2)
    model, expected = initial_linear(3, 2, seed=0), initial_linear(3, 2, seed=0)
    peer = fused.OperatorFit(model, X, y, lr=0.1, epochs=4)
    model.load_state_dict(expected.state_dict())
    for _ in range(2):  # the second call goes on where the first ended
        peer()
        loops.train(expected, X, y, 0.1, 4)
        torch.testing.assert_close(list(model.parameters()), list(expected.parameters()))


def wrong_operator(X, weight, y, *, linear_bias, lr):
    weight.mul_(1.001)


def test_an_operator_that_trains_wrongly_is_found(monkeypatch):
    monkeypatch.setattr(fused.functional, "linear_full_batch_fit", wrong_operator)
    result = measured("P2")
    assert re.match(r"fused computes parameters with an error of \S+, where \S+ is allowed", result.failures[0])
    assert not result.measurements


def test_an_engine_that_ignores_the_order_is_found(monkeypatch):
    def fit(*arguments, shuffle=True, **options):
        options.pop("seed", None)
        return torchintro.fit(*arguments, seed=1, **options)

    monkeypatch.setattr(fused, "fit", fit)
    for name in ("P8a", "P8b"):
        failures = measured(name).failures
        assert [failure.split(" with ")[0] for failure in failures] == ["fused computes parameters"]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("scale", "status"), [(1.0, "ok"), (1.001, "failed")])
def test_many_models_are_verified_one_by_one(shuffle, scale, status, monkeypatch):
    class Models(fused.ModelsAtOnce):
        def __call__(self, lrs):
            trained = super().__call__(lrs)
            trained.weight[-1] *= scale
            return trained

    monkeypatch.setattr(fused, "ModelsAtOnce", Models)
    baseline = "eager shuffled" if shuffle else "eager slices"
    result = measured("P8c", shuffle=shuffle, peers=(baseline, "fused"), rows=300)
    assert result.status == status, result.failures
    if status == "ok":
        assert any(note.startswith("fused is train_models, which ran '") for note in result.notes)


def test_a_part_of_the_models_is_scaled_up():
    result = measured("P8c", rows=300, trials=16, measured=(1, 1), peers=("eager shuffled", "fused"))
    assert result.status == "ok", result.failures
    note = "eager shuffled: not run in full: the time of 1 training, scaled up by 16"
    assert note in result.notes
    assert result.scales == {"eager shuffled": 16.0}
    assert result.record()["scales"] == {"eager shuffled": 16.0}
    assert note in "\n".join(case_lines(result, set()))


def test_exact_parameters_are_those_of_training():
    X, y = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    initial = initial_linear(3, 2, seed=0)
    batches = functools.partial(loops.shuffled, 16)
    found = models.exact_parameters(X, y, initial, [0.01, 0.3], 2, batches)
    for lr, parameters in zip([0.01, 0.3], found, strict=True):
        model = initial_linear(3, 2, seed=0).double()
        loops.train(model, X, y, lr, 2, batches)
        expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-14)


# Studies


@pytest.mark.parametrize(
    ("seconds", "trials", "epochs", "scale"), [((1.0, 9.0), 2, 3, 2000 / 6), ((1.0, 1.2), 20, 100, 1.0)]
)
def test_a_study_whose_time_does_not_grow_with_the_epochs_is_run_in_full(monkeypatch, seconds, trials, epochs, scale):
    asked = []
    monkeypatch.setattr(StudyWork, "_tune", lambda self, *_: asked.append((self.trials["fused"], self.epochs["fused"])))
    clock = iter([0.0, seconds[0], 100.0, 100.0 + seconds[1]])
    monkeypatch.setattr(study, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    work = make_work(replace(case_named("P7"), rows=50), CPU, jax=False)
    assert asked[1:] == [(2, 3), (2, 30)]
    assert (work.trials["fused"], work.epochs["fused"]) == (trials, epochs)
    assert work.scales == {"eager": pytest.approx(2000 / 6), "fused": pytest.approx(scale)}
    assert "ridge" in work.calls  # which does no trials
    assert [note for note in work.notes if "fused" in note and "scaled up" in note] == (
        [f"eager, fused: not run in full: times of 2 trials x 3 epochs, scaled up by {scale:.0f}"] if scale > 1 else []
    )


def test_exact_losses_are_those_of_training():
    case = replace(case_named("P7"), rows=60, in_features=5, out_features=2, measured=(2, 3))
    work = make_work(case, CPU, jax=False)
    X, y, lrs = work.X.double(), work.y.double(), torch.tensor([1e-3, 1e-1], dtype=torch.float64)
    trained = [loops.train(work._initial().double(), X, y, lr, 7) for lr in lrs.tolist()]
    found = study.exact_losses(X, y, work._initial().double(), lrs, 7)
    torch.testing.assert_close(found, torch.stack(trained), rtol=1e-12, atol=0)


# DataLoader


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_loader_s_batches_are_known(shuffle):
    X, y = torch.arange(22.0).unsqueeze(1), torch.randn(22, 1)
    quick = functools.partial(loops.sampled, 5) if shuffle else functools.partial(loops.slices, 5)
    for (X_loaded, y_loaded), (X_quick, y_quick) in zip(loops.loaded(5, shuffle, X, y), quick(X, y), strict=True):
        assert torch.equal(X_loaded, X_quick)
        assert torch.equal(y_loaded, y_quick)
    orders = [torch.cat([X_batch for X_batch, _ in loops.loaded(5, shuffle, X, y)]) for _ in range(2)]
    assert torch.equal(*orders)
    assert torch.equal(orders[0], X) is not shuffle


def test_a_slow_peer_is_timed_once():
    result = measured("P8b", peers=("eager shuffled", "DataLoader"), rows=300)
    assert len(result.measurements["DataLoader"].samples) == 1
    assert len(result.measurements["eager shuffled"].samples) > 1
    assert "DataLoader is one over a TensorDataset, of which a single run is timed" in result.notes
    assert once(lambda: sum(range(100_000)), CPU).median > 0


# scikit-learn


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_descent_by_rows_must_end_near_the_least_loss(shuffle, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    peers = ("eager shuffled" if shuffle else "eager slices", "sklearn")
    good = measured("P8a", peers=peers, shuffle=shuffle)
    assert good.status == "ok", good.failures
    assert 0 < good.checks["sklearn"]["loss"].error < good.checks["sklearn"]["loss"].allowed
    assert sklearn_peers.DescentByRows.NOTE in good.notes
    monkeypatch.setattr(sklearn_peers, "TIME_CONSTANTS", 0.5)  # it stops on the way
    assert (
        measured("P8a", peers=peers, shuffle=shuffle).failures[0].startswith("sklearn computes loss with an error of")
    )


def test_the_closed_form_is_checked_against_its_own_solution(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    good = measured("P7", peers=("eager", "ridge"))
    assert good.status == "ok", good.failures
    assert sklearn_peers.RidgeSolve.NOTE in good.notes
    solve = sklearn_peers.least_squares
    monkeypatch.setattr(sklearn_peers, "least_squares", lambda X, y, ridge: solve(X, y, 100 * ridge))
    assert measured("P7", peers=("eager", "ridge")).failures[0].startswith("ridge computes parameters with an error of")


def test_least_squares_is_that_of_lstsq():
    X, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    weight, bias = sklearn_peers.least_squares(X, y)
    solution = torch.linalg.lstsq(torch.cat([X, torch.ones(40, 1, dtype=X.dtype)], dim=1), y).solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), solution)
