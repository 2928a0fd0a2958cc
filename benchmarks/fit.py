"""The peers of training runs and of Optuna studies."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchintro.nn import initial_linear
from torchintro.training.fit import fit

from .cases import Row
from .peers import fused, loops
from .peers import jax as jax_peers
from .peers import sklearn as sklearn_peers
from .peers.loops import Batches
from .step import Check, Outcome, Unavailable, Work, relative_error
from .timing import Call

__all__ = ["FitWork", "StudyWork", "exact_losses"]

# A study of so many times the epochs tells whether its time grows with them.
EPOCHS_FACTOR = 10


class FitWork(Work):
    """A training run, whose results are the parameters that it ends with."""

    def __init__(self, row: Row, device: torch.device, compile: bool, jax: bool) -> None:
        super().__init__(row, device)
        self.lr = 0.01
        self.X, self.y = self._data()
        self.initial = initial_linear(row.in_features, row.out_features, seed=0, dtype=row.dtype).to(device)
        self.model = initial_linear(row.in_features, row.out_features, dtype=row.dtype).to(device)
        size = row.batch_size
        by_hand: dict[str, Batches] = {
            "eager": loops.all_rows,
            "eager slices": functools.partial(loops.slices, size),
            "eager shuffled": functools.partial(loops.shuffled, size),
        }
        # The batches that the row is about, and those of the peers that have others.
        self.own = by_hand["eager" if not size else "eager shuffled" if row.shuffle else "eager slices"]
        self.batches = dict(by_hand)
        self.engine = ""
        makers: dict[str, Callable[[], Call]] = {
            **{peer: functools.partial(self._by_hand, batches) for peer, batches in by_hand.items()},
            "DataLoader": self._loaded,
            "compile": lambda: self._compiled(compile),
            "graph": lambda: self._graph(compile),
            "sklearn": self._sklearn,
            "fit": self._fitted,
            "fused": self._operator if "fit" in row.peers else self._fitted,
        }
        for peer in row.peers:
            if peer == "jax":
                self._add_jax(jax)
            else:
                self._add(peer, makers[peer])

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.X, self.y

    def verify(self) -> dict[str, dict[str, Check]]:
        checks = super().verify()
        if self.engine:
            peer = "fit" if "fit" in self.calls else "fused"
            self.notes.append(f'{peer} is fit(engine="auto"), which ran {self.engine!r}')
        return checks

    def _add_jax(self, wanted: bool) -> None:
        row, initial = self.row, list(self.initial.parameters())
        options: dict[str, Any] = {
            "lr": self.lr,
            "epochs": row.epochs,
            "batch_size": row.batch_size,
            "shuffle": row.shuffle,
        }
        run = self._make_jax(wanted, lambda: jax_peers.JaxFit(self.X, self.y, initial, **options))
        if run is None:
            return
        self.calls["jax"] = run
        if row.batch_size and row.shuffle:
            (order,) = torch.as_tensor(run.orders())
            self.batches["jax"] = functools.partial(loops.ordered, order, row.batch_size)

    def _by_hand(self, batches: Batches) -> Call:
        return lambda: loops.train(self.model, self.X, self.y, self.lr, self.row.epochs, batches)

    def _loaded(self) -> Call:
        if self.device.type != "cpu":  # it takes one row after the other out of the data
            raise Unavailable("a DataLoader is compared on the CPU only")
        size, shuffle = self.row.batch_size, self.row.shuffle
        self.once.add("DataLoader")
        self.notes.append("DataLoader is one over a TensorDataset, of which a single run is timed")
        if shuffle:
            self.batches["DataLoader"] = functools.partial(loops.sampled, size)
        return self._by_hand(functools.partial(loops.loaded, size, shuffle))

    def _parameters(self) -> tuple[Tensor, Tensor]:
        return self.model.weight.detach(), self.model.bias.detach()

    def _steps_a_call(self) -> int:
        """Return how many steps are compiled as one, which must make the epochs."""
        return 1 if self.row.batch_size else math.gcd(self.row.epochs, loops.STEPS_A_CALL)

    def _run_steps(self, steps: loops.Steps, steps_a_call: int) -> Call:
        parameters, epochs = self._parameters(), self.row.epochs // steps_a_call

        def run() -> None:
            for _ in range(epochs):
                for X_batch, y_batch in self.own(self.X, self.y):
                    steps(*parameters, X_batch, y_batch, self.lr)

        return run

    def _compiled(self, compile: bool) -> Call:
        steps = self._steps_a_call()
        run = loops.tried(self._run_steps(loops.compiled_steps(compile, steps), steps), "torch.compile")
        what = f"{steps} steps at a time" if steps > 1 else "the step"
        self.notes.append(f"compile is the training loop through torch.compile, {what}")
        return run

    def _graph(self, compile: bool) -> Call:
        """Return the replay of one graph of all epochs: of compiled steps, of plain ones if those cannot be had."""
        for compiled in (True, False):
            steps = self._steps_a_call() if compiled else 1
            try:
                function = loops.compiled_steps(compile, steps) if compiled else functools.partial(loops.plain_steps, 1)
                replay = loops.captured(self._run_steps(function, steps), self.device)
            except Unavailable:
                if not compiled:
                    raise
            else:
                break
        self.notes.append(f"graph is one CUDA graph of all epochs of the {'compiled' if compiled else 'plain'} steps")
        return replay

    def _sklearn(self) -> Call:
        peer = sklearn_peers.DescentByRows(self.X, self.y, shuffle=self.row.shuffle)
        self.unlike["sklearn"] = peer.check
        self.notes.append(peer.NOTE)
        return peer

    def _operator(self) -> Call:
        peer = fused.OperatorFit(self.model, self.X, self.y, lr=self.lr, epochs=self.row.epochs)
        self.notes.append(peer.NOTE)
        return peer

    def _fitted(self) -> Call:
        row = self.row
        options: dict[str, Any] = {"batch_size": row.batch_size, "shuffle": row.shuffle} if row.batch_size else {}

        def run() -> None:
            result = fit(self.model, self.X, self.y, lr=self.lr, epochs=row.epochs, seed=0, **options)
            self.engine = result.engine

        return run

    def _outcome(self, peer: str) -> Outcome:
        run = self.calls[peer]
        if isinstance(run, jax_peers.JaxFit):
            return {"parameters": run.outcome()}
        self.model.load_state_dict(self.initial.state_dict())
        run()
        return {"parameters": self._flat(self.model)}

    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        X, y = self.X.double(), self.y.double()

        @functools.cache
        def exact(batches: Batches) -> Tensor:
            model = nn.Linear(self.row.in_features, self.row.out_features).to(self.device, torch.float64)
            model.load_state_dict(self.initial.state_dict())
            loops.train(model, X, y, self.lr, self.row.epochs, batches)
            return self._flat(model)

        return {
            peer: {"parameters": relative_error(found["parameters"], exact(self.batches.get(peer, self.own)))}
            for peer, found in outcomes.items()
        }

    @staticmethod
    def _flat(model: nn.Linear) -> Tensor:
        # One vector, because a bias that is trained towards zero has no relative error of its own.
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class StudyWork(Work):
    """An Optuna study over the learning rate, whose results are the losses of its trials."""

    LR = (1e-4, 1e-1)

    def __init__(self, row: Row, device: torch.device, compile: bool, jax: bool) -> None:
        super().__init__(row, device)
        self.X, self.y = self._data()
        self.study: Any = None
        self.trials = dict.fromkeys(row.peers, (row.measured or (row.trials, row.epochs))[0])
        self.epochs = dict.fromkeys(row.peers, (row.measured or (row.trials, row.epochs))[1])
        makers: dict[str, Callable[[], Call]] = {
            "eager": lambda: lambda: self._optimize(self._train_eagerly, self.trials["eager"]),
            "graph": lambda: self._graph(compile),
            "ridge": self._ridge,
            "fused": lambda: self._tune,
        }
        for peer in row.peers:
            if peer == "jax":
                self._add_jax(jax)
            else:
                self._add(peer, makers[peer])
        if row.measured:
            self._choose_what_is_run()

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.X, self.y

    def verify(self) -> dict[str, dict[str, Check]]:
        checks = super().verify()
        engines = {trial.user_attrs.get("engine") for trial in self.study.trials} - {None}
        self.notes.append(f'fused is tune(engine="auto"), which ran {", ".join(map(repr, sorted(engines)))}')
        return checks

    def floor(self) -> Call | None:
        return (lambda: self._optimize(lambda lr: lr, self.row.trials)) if self.row.limit == "empty" else None

    def _choose_what_is_run(self) -> None:
        """Run a part of a study that would take minutes, or all of it where the time does not grow with the epochs.

        Only what is repeated can be scaled up: one pass over the data that serves all epochs must count once.
        """
        row = self.row
        trials, epochs = row.measured or (row.trials, row.epochs)
        self.calls["fused"]()
        seconds = []
        for factor in (1, EPOCHS_FACTOR):
            self.epochs["fused"] = epochs * factor
            start = time.perf_counter()
            self.calls["fused"]()
            seconds.append(time.perf_counter() - start)
        whole = seconds[1] < EPOCHS_FACTOR / 2 * seconds[0]
        self.trials["fused"], self.epochs["fused"] = (row.trials, row.epochs) if whole else (trials, epochs)
        for peer in self.calls.keys() - self.unlike.keys():
            self.scales[peer] = row.trials * row.epochs / (self.trials[peer] * self.epochs[peer])
        parts: dict[tuple[int, int], list[str]] = {}
        for peer in self.row.peers:
            if self.scales.get(peer, 1.0) != 1:
                parts.setdefault((self.trials[peer], self.epochs[peer]), []).append(peer)
        for (trials, epochs), peers in parts.items():
            scale = row.trials * row.epochs / (trials * epochs)
            part = f"{trials} trials x {epochs} epochs, scaled up by {scale:.0f}"
            self.notes.append(f"{', '.join(peers)}: not run in full: times of {part}")

    def _initial(self) -> nn.Linear:
        row = self.row
        return initial_linear(row.in_features, row.out_features, seed=0, dtype=row.dtype).to(self.device)

    def _tune(self) -> None:
        from torchintro.tuning.tune import tune  # brings Optuna, which takes a second to import

        trials, epochs = self.trials["fused"], self.epochs["fused"]
        self.study = tune(self.X, self.y, n_trials=trials, epochs=epochs, lr=self.LR, seed=0)

    def _train_eagerly(self, lr: float) -> float:
        return loops.train(self._initial(), self.X, self.y, lr, self.epochs["eager"]).item()

    def _ridge(self) -> Call:
        peer = sklearn_peers.RidgeSolve(self.X, self.y)
        self.unlike["ridge"] = peer.check
        self.notes.append(peer.NOTE)
        return peer

    def _graph(self, compile: bool) -> Call:
        """Return the study by hand, each epoch of which is the replay of one CUDA graph, captured beforehand."""
        weight, bias = (parameter.detach().clone() for parameter in self._initial().parameters())
        start = weight.clone(), bias.clone()
        rate = torch.zeros((), dtype=self.row.dtype, device=self.device)
        loss = torch.zeros_like(rate)
        for compiled in (True, False):
            try:
                steps = loops.compiled_steps(compile, 1) if compiled else functools.partial(loops.plain_steps, 1)
                epoch = functools.partial(_keep_loss, loss, steps, weight, bias, self.X, self.y, rate)
                replay = loops.captured(epoch, self.device)
            except Unavailable:
                if not compiled:
                    raise
            else:
                break
        self.notes.append(f"graph replays a CUDA graph of the {'compiled' if compiled else 'plain'} step every epoch")

        def train(lr: float) -> float:
            weight.copy_(start[0])
            bias.copy_(start[1])
            rate.fill_(lr)
            for _ in range(self.epochs["graph"]):
                replay()
            return loss.item()

        return lambda: self._optimize(train, self.trials["graph"])

    def _optimize(self, value: Callable[[float], float], trials: int) -> None:
        """Run the study that a user would write without this package."""
        with self._study():
            self.study.optimize(lambda trial: value(self._suggest(trial)), n_trials=trials)

    def _add_jax(self, wanted: bool) -> None:
        # One compiled call trains all trials, and two trials would take as long: only the epochs can be fewer.
        self.trials["jax"] = self.row.trials
        initial = list(self._initial().parameters())
        train = self._make_jax(
            wanted,
            lambda: jax_peers.JaxStudy(self.X, self.y, initial, trials=self.row.trials, epochs=self.epochs["jax"]),
        )
        if train is None:
            return

        def run() -> None:
            with self._study():
                trials = [self.study.ask() for _ in range(self.row.trials)]
                for trial, loss in zip(trials, train([self._suggest(trial) for trial in trials]), strict=True):
                    self.study.tell(trial, loss)

        self.calls["jax"] = run
        self.notes.append("jax asks for all learning rates at once, so that its sampler never learns from a loss")

    @contextlib.contextmanager
    def _study(self) -> Iterator[None]:
        import optuna

        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)

    def _suggest(self, trial: Any) -> float:
        low, high = self.LR
        lr: float = trial.suggest_float("lr", low, high, log=True)
        return lr

    def _outcome(self, peer: str) -> Outcome:
        self.calls[peer]()
        trials = [(trial.params["lr"], trial.value) for trial in self.study.trials]
        lrs, losses = torch.tensor(trials, dtype=torch.float64).unbind(1)
        return {"lr": lrs, "loss": losses}

    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        X, y = self.X.double(), self.y.double()

        @functools.cache
        def exact(lr: float, epochs: int) -> float:
            return loops.train(self._initial().double(), X, y, lr, epochs).item()

        # Each peer is judged at its own learning rates: a rounding error can make the sampler go another way.
        errors = {}
        for peer, outcome in outcomes.items():
            lrs, epochs = outcome["lr"], self.epochs[peer]
            if self.row.measured is None or len(lrs) * epochs <= math.prod(self.row.measured):
                losses = torch.tensor([exact(lr, epochs) for lr in lrs.tolist()], dtype=torch.float64)
            else:
                losses = exact_losses(X, y, self._initial().double(), lrs, epochs)
            errors[peer] = {"loss": relative_error(outcome["loss"], losses)}
        return errors


def _keep_loss(loss: Tensor, steps: loops.Steps, *arguments: Any) -> None:
    loss.copy_(steps(*arguments))


def exact_losses(X: Tensor, y: Tensor, initial: nn.Linear, lrs: Tensor, epochs: int) -> Tensor:
    """Return the losses of the last epoch of gradient descent on all rows, one for each learning rate, in float64.

    As training in float64 gives them, but from one pass over the data: the loss is a quadratic function of the
    parameters, with the second moments of the inputs and the targets as coefficients.
    """
    rows, outputs = y.shape
    Xc = torch.cat([X, X.new_ones(rows, 1)], dim=1)
    XX, XY, yy = Xc.T @ Xc / rows, Xc.T @ y / rows, y.square().mean()
    W = torch.cat([initial.weight.detach(), initial.bias.detach()[:, None]], dim=1).T.expand(len(lrs), -1, -1)
    losses = yy.expand(len(lrs))
    for _ in range(epochs):
        losses = yy + ((W * (XX @ W - 2 * XY)).sum((1, 2))) / outputs
        W = W - lrs.to(W)[:, None, None] * (2 / outputs) * (XX @ W - XY)
    return losses.cpu()
