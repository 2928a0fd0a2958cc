"""The peers of trainings with several learning rates over the same mini-batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchintro.nn import initial_linear

from .cases import Case
from .peers import fused, loops
from .peers import jax as jax_peers
from .peers.loops import Batches
from .timing import Call
from .work import Check, Outcome, Work, relative_error

__all__ = ["ModelsWork", "exact_parameters"]


class ModelsWork(Work):
    """Trainings from the same start, one for each learning rate, whose results are the parameters at their ends."""

    LR = (1e-4, 1e-1)

    def __init__(self, case: Case, device: torch.device, jax: bool) -> None:
        super().__init__(case, device)
        self.X, self.y = self._data()
        self.initial = initial_linear(case.in_features, case.out_features, seed=0, dtype=case.dtype).to(device)
        self.lrs = loops.learning_rates(*self.LR, case.trials)
        by_hand: dict[str, Batches] = {
            "eager slices": functools.partial(loops.slices, case.batch_size),
            "eager shuffled": functools.partial(loops.shuffled, case.batch_size),
        }
        self.own = by_hand["eager shuffled" if case.shuffle else "eager slices"]
        self.batches = dict(by_hand)
        # By hand a part of the models is as good as all: they are trained one after the other.
        self.trials = dict.fromkeys(case.peers, case.trials)
        self.results: dict[str, Callable[[], Tensor]] = {}
        self.engine = ""
        for peer in case.peers:
            if peer == "jax":
                self._add(peer, functools.partial(self._jax, jax))
            elif peer == "fused":
                self._add(peer, self._fused)
            else:
                self.trials[peer] = (case.measured or (case.trials, case.epochs))[0]
                self._add_by_hand(peer, by_hand[peer])

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.X, self.y

    def verify(self) -> dict[str, dict[str, Check]]:
        checks = super().verify()
        if "fused" in self.calls:
            self.notes.append(f"fused is train_models, which ran {self.engine!r}")
        return checks

    def _add_by_hand(self, peer: str, batches: Batches) -> None:
        trials = self.trials[peer]
        models: list[nn.Linear] = []

        def run() -> None:
            models.clear()
            for lr in self.lrs[:trials]:
                model = copy.deepcopy(self.initial)
                loops.train(model, self.X, self.y, lr, self.case.epochs, batches)
                models.append(model)

        self.calls[peer] = run
        self.results[peer] = lambda: torch.stack([_flat(model.weight, model.bias) for model in models])
        self.scales[peer] = self.case.trials / trials
        if trials != self.case.trials:
            part = f"the time of {trials} training{'s' if trials > 1 else ''}, scaled up by {self.scales[peer]:g}"
            self.notes.append(f"{peer}: not run in full: {part}")

    def _jax(self, wanted: bool) -> Call:
        case = self.case
        make = functools.partial(
            jax_peers.JaxFit,
            self.X,
            self.y,
            list(self.initial.parameters()),
            lr=self.lrs,
            epochs=case.epochs,
            batch_size=case.batch_size,
            shuffle=case.shuffle,
        )
        run = jax_peers.made(wanted, self.device, make)
        self.results["jax"] = run.outcome
        if case.shuffle:
            (order,) = torch.as_tensor(run.orders())
            self.batches["jax"] = functools.partial(loops.ordered, order, case.batch_size)
        return run

    def _fused(self) -> Call:
        case = self.case
        peer = fused.ModelsAtOnce(
            self.X, self.y, self.initial, epochs=case.epochs, batch_size=case.batch_size, shuffle=case.shuffle
        )

        def result() -> Tensor:
            trained = peer.trained
            assert trained is not None and trained.bias is not None  # noqa: PT018 - it ran, and `initial` has a bias
            self.engine = trained.engine
            return _flat(trained.weight, trained.bias)

        self.results["fused"] = result
        return lambda: peer(self.lrs)

    def _outcome(self, peer: str) -> Outcome:
        self.calls[peer]()
        return {"parameters": self.results[peer]()}

    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        X, y, initial = self.X.double(), self.y.double(), self.initial

        @functools.cache
        def exact(batches: Batches) -> Tensor:
            return exact_parameters(X, y, initial, self.lrs, self.case.epochs, batches)

        return {
            peer: {
                "parameters": relative_error(
                    found["parameters"], exact(self.batches.get(peer, self.own))[: self.trials[peer]]
                )
            }
            for peer, found in outcomes.items()
        }


def _flat(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight.detach().flatten(-2), bias.detach()], dim=-1)


def exact_parameters(
    X: Tensor, y: Tensor, initial: nn.Linear, lrs: Sequence[float], epochs: int, batches: Batches
) -> Tensor:
    """Return the parameters that trainings in float64 end with, a row for each learning rate, weight before bias.

    All at once, by the gradient written out: as many trainings by autograd would take minutes.
    """
    rates = torch.tensor(lrs, dtype=torch.float64, device=X.device)
    weight = initial.weight.detach().double().expand(len(lrs), -1, -1)
    bias = initial.bias.detach().double().expand(len(lrs), -1)
    for _ in range(epochs):
        for X_batch, y_batch in batches(X, y):
            residual = torch.einsum("nd,kod->nko", X_batch, weight) + bias - y_batch[:, None]
            scale = 2 / y_batch.numel() * rates
            weight = weight - scale[:, None, None] * torch.einsum("nko,nd->kod", residual, X_batch)
            bias = bias - scale[:, None] * residual.sum(0)
    return _flat(weight, bias)
