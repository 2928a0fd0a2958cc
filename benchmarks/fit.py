"""The peers of a training run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchintro.nn import initial_linear

from .cases import Case
from .peers import fused, loops
from .peers import jax as jax_peers
from .peers import sklearn as sklearn_peers
from .peers.loops import Batches
from .timing import Call
from .work import Check, Outcome, Unavailable, Work, relative_error

__all__ = ["FitWork"]


class FitWork(Work):
    """A training run, whose results are the parameters that it ends with."""

    def __init__(self, case: Case, device: torch.device, compile: bool, jax: bool) -> None:
        super().__init__(case, device)
        self.lr = 0.01
        self.X, self.y = self._data()
        self.initial = initial_linear(case.in_features, case.out_features, seed=0, dtype=case.dtype).to(device)
        self.model = initial_linear(case.in_features, case.out_features, dtype=case.dtype).to(device)
        size = case.batch_size
        by_hand: dict[str, Batches] = {
            "eager": loops.all_rows,
            "eager slices": functools.partial(loops.slices, size),
            "eager shuffled": functools.partial(loops.shuffled, size),
        }
        # The batches that the case is about, and those of the peers that have others.
        self.own = by_hand["eager" if not size else "eager shuffled" if case.shuffle else "eager slices"]
        self.batches = dict(by_hand)
        self.engine = ""
        makers: dict[str, Callable[[], Call]] = {
            **{peer: functools.partial(self._by_hand, batches) for peer, batches in by_hand.items()},
            "DataLoader": self._loaded,
            "compile": lambda: self._compiled(compile),
            "jax": lambda: self._jax(jax),
            "graph": lambda: self._graph(compile),
            "sklearn": self._sklearn,
            "fit": self._fitted,
            "fused": self._operator if "fit" in case.peers else self._fitted,
        }
        for peer in case.peers:
            self._add(peer, makers[peer])

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.X, self.y

    def verify(self) -> dict[str, dict[str, Check]]:
        checks = super().verify()
        if self.engine:
            peer = "fit" if "fit" in self.calls else "fused"
            self.notes.append(f'{peer} is fit(engine="auto"), which ran {self.engine!r}')
        return checks

    def _jax(self, wanted: bool) -> Call:
        case = self.case
        make = functools.partial(
            jax_peers.JaxFit,
            self.X,
            self.y,
            list(self.initial.parameters()),
            lr=self.lr,
            epochs=case.epochs,
            batch_size=case.batch_size,
            shuffle=case.shuffle,
        )
        run = jax_peers.made(wanted, self.device, make)
        if case.batch_size and case.shuffle:
            (order,) = torch.as_tensor(run.orders())
            self.batches["jax"] = functools.partial(loops.ordered, order, case.batch_size)
        return run

    def _by_hand(self, batches: Batches) -> Call:
        return lambda: loops.train(self.model, self.X, self.y, self.lr, self.case.epochs, batches)

    def _loaded(self) -> Call:
        if self.device.type != "cpu":  # it takes one row after the other out of the data
            raise Unavailable("a DataLoader is compared on the CPU only")
        size, shuffle = self.case.batch_size, self.case.shuffle
        self.once.add("DataLoader")
        self.notes.append("DataLoader is one over a TensorDataset, of which a single run is timed")
        if shuffle:
            self.batches["DataLoader"] = functools.partial(loops.sampled, size)
        return self._by_hand(functools.partial(loops.loaded, size, shuffle))

    def _parameters(self) -> tuple[Tensor, Tensor]:
        return self.model.weight.detach(), self.model.bias.detach()

    def _steps_a_call(self) -> int:
        """Return how many steps are compiled as one, which must make the epochs."""
        return 1 if self.case.batch_size else math.gcd(self.case.epochs, loops.STEPS_A_CALL)

    def _run_steps(self, steps: loops.Steps, steps_a_call: int) -> Call:
        parameters, epochs = self._parameters(), self.case.epochs // steps_a_call

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
        peer = sklearn_peers.DescentByRows(self.X, self.y, shuffle=self.case.shuffle)
        self.unlike["sklearn"] = peer.check
        self.notes.append(peer.NOTE)
        return peer

    def _operator(self) -> Call:
        peer = fused.OperatorFit(self.model, self.X, self.y, lr=self.lr, epochs=self.case.epochs)
        self.notes.append(peer.NOTE)
        return peer

    def _fitted(self) -> Call:
        case = self.case
        options: dict[str, Any] = {"batch_size": case.batch_size, "shuffle": case.shuffle} if case.batch_size else {}

        def run() -> None:
            self.engine = fused.fitted(self.model, self.X, self.y, lr=self.lr, epochs=case.epochs, **options)

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
            model = nn.Linear(self.case.in_features, self.case.out_features).to(self.device, torch.float64)
            model.load_state_dict(self.initial.state_dict())
            loops.train(model, X, y, self.lr, self.case.epochs, batches)
            return self._flat(model)

        return {
            peer: {"parameters": relative_error(found["parameters"], exact(self.batches.get(peer, self.own)))}
            for peer, found in outcomes.items()
        }

    @staticmethod
    def _flat(model: nn.Linear) -> Tensor:
        # One vector, because a bias that is trained towards zero has no relative error of its own.
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
