"""The peers of an Optuna study of training runs."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchintro.nn import initial_linear

from .cases import Case
from .peers import fused, loops
from .peers import jax as jax_peers
from .peers import sklearn as sklearn_peers
from .timing import Call
from .work import Check, Outcome, Unavailable, Work, relative_error

__all__ = ["StudyWork", "exact_losses"]

# A study of so many times the epochs tells whether its time grows with them.
EPOCHS_FACTOR = 10


class StudyWork(Work):
    """An Optuna study over the learning rate, whose results are the losses of its trials."""

    LR = (1e-4, 1e-1)

    def __init__(self, case: Case, device: torch.device, compile: bool, jax: bool) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise Unavailable("Optuna is not installed: pip install optuna")
        super().__init__(case, device)
        self.X, self.y = self._data()
        self.study: Any = None
        self.trials = dict.fromkeys(case.peers, (case.measured or (case.trials, case.epochs))[0])
        self.epochs = dict.fromkeys(case.peers, (case.measured or (case.trials, case.epochs))[1])
        makers: dict[str, Callable[[], Call]] = {
            "eager": lambda: lambda: self._optimize(self._train_eagerly, self.trials["eager"]),
            "graph": lambda: self._graph(compile),
            "jax": lambda: self._jax(jax),
            "ridge": self._ridge,
            "fused": lambda: self._tune,
        }
        for peer in case.peers:
            self._add(peer, makers[peer])
        if case.measured:
            self._choose_what_is_run()

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.X, self.y

    def verify(self) -> dict[str, dict[str, Check]]:
        checks = super().verify()
        engines = {trial.user_attrs.get("engine") for trial in self.study.trials} - {None}
        self.notes.append(f'fused is tune(engine="auto"), which ran {", ".join(map(repr, sorted(engines)))}')
        return checks

    def floor(self) -> Call | None:
        return (lambda: self._optimize(lambda lr: lr, self.case.trials)) if self.case.limit == "empty" else None

    def _choose_what_is_run(self) -> None:
        """Run a part of a study that would take minutes, or all of it where the time does not grow with the epochs.

        Only what is repeated can be scaled up: one pass over the data that serves all epochs must count once.
        """
        case = self.case
        trials, epochs = case.measured or (case.trials, case.epochs)
        self.calls["fused"]()
        seconds = []
        for factor in (1, EPOCHS_FACTOR):
            self.epochs["fused"] = epochs * factor
            start = time.perf_counter()
            self.calls["fused"]()
            seconds.append(time.perf_counter() - start)
        whole = seconds[1] < EPOCHS_FACTOR / 2 * seconds[0]
        self.trials["fused"], self.epochs["fused"] = (case.trials, case.epochs) if whole else (trials, epochs)
        for peer in self.calls.keys() - self.unlike.keys():
            self.scales[peer] = case.trials * case.epochs / (self.trials[peer] * self.epochs[peer])
        parts: dict[tuple[int, int], list[str]] = {}
        for peer in self.case.peers:
            if self.scales.get(peer, 1.0) != 1:
                parts.setdefault((self.trials[peer], self.epochs[peer]), []).append(peer)
        for (trials, epochs), peers in parts.items():
            scale = case.trials * case.epochs / (trials * epochs)
            part = f"{trials} trials x {epochs} epochs, scaled up by {scale:.0f}"
            self.notes.append(f"{', '.join(peers)}: not run in full: times of {part}")

    def _initial(self) -> nn.Linear:
        case = self.case
        return initial_linear(case.in_features, case.out_features, seed=0, dtype=case.dtype).to(self.device)

    def _tune(self) -> None:
        trials, epochs = self.trials["fused"], self.epochs["fused"]
        self.study = fused.tuned(self.X, self.y, trials=trials, epochs=epochs, lr=self.LR)

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
        rate = torch.zeros((), dtype=self.case.dtype, device=self.device)
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

    def _jax(self, wanted: bool) -> Call:
        # One compiled call trains all trials, and two trials would take as long: only the epochs can be fewer.
        self.trials["jax"] = self.case.trials
        initial = list(self._initial().parameters())
        make = functools.partial(
            jax_peers.JaxStudy, self.X, self.y, initial, trials=self.case.trials, epochs=self.epochs["jax"]
        )
        train = jax_peers.made(wanted, self.device, make)

        def run() -> None:
            with self._study():
                trials = [self.study.ask() for _ in range(self.case.trials)]
                for trial, loss in zip(trials, train([self._suggest(trial) for trial in trials]), strict=True):
                    self.study.tell(trial, loss)

        self.notes.append("jax asks for all learning rates at once, so that its sampler never learns from a loss")
        return run

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
            if self.case.measured is None or len(lrs) * epochs <= math.prod(self.case.measured):
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
