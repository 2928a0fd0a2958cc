"""The peers of a step: loss and gradients of one batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchintro import reference
from torchintro.nn import initial_linear

from .cases import Case
from .peers import chunked
from .peers import jax as jax_peers
from .timing import Call
from .work import Operator, Outcome, Unavailable, Work, chunks, first_line, relative_error

__all__ = ["COMPILED", "StepWork"]

# Peers that are torch.compile, and how it is asked for.
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {},
    # Without CUDA graphs: a replay overwrites the results of the one before, and the kernels are what is compared.
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    # Every product by Inductor's own Triton templates, with their epilogues, none by the vendor's library.
    "triton": {"options": {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}},
}


class StepWork(Work):
    """Loss and gradients of one batch, by the operator."""

    def __init__(self, case: Case, device: torch.device, compile: bool, jax: bool, fused: Operator) -> None:
        super().__init__(case, device)
        self.cold = case.limit != "call"
        X, y = self._data()
        model = initial_linear(case.in_features, case.out_features, seed=0).to(device, case.dtype)
        self.tensors = {
            "input": X,
            "linear_weight": model.weight.detach(),
            "linear_bias": model.bias.detach(),
            "target": y,
        }
        self.leaves = {name: self.tensors[name].requires_grad_() for name in case.gradients}
        makers: dict[str, Callable[[], Call]] = {
            "eager": lambda: self._step(reference.linear_mse_loss),
            "chunked": lambda: self._step(chunked.linear_mse_loss),
            "fused": lambda: self._step(fused),
            "jax": lambda: jax_peers.made(jax, device, lambda: jax_peers.JaxStep(self.tensors, case.gradients)),
            **{peer: functools.partial(self._compiled, peer, compile) for peer in COMPILED},
        }
        if compile and not COMPILED.keys().isdisjoint(case.peers):
            # Once a case, as it undoes what was compiled before: else the shapes of earlier cases count towards the
            # limit after which torch.compile gives up silently.
            torch.compiler.reset()
        for peer in case.peers:
            self._add(peer, makers[peer])

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.tensors["input"].detach(), self.tensors["target"].detach()

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def floor(self) -> Call | None:
        if self.case.limit != "call":
            return None
        weight = self.leaves["linear_weight"]

        def least() -> None:
            weight.grad = None
            weight.sum().backward()  # type: ignore[no-untyped-call]

        return least

    def _step(self, operator: Operator) -> Callable[[], Tensor]:
        X, weight, bias, y = self.tensors.values()
        leaves = tuple(self.leaves.values())

        def step() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            loss = operator(X, weight, y, linear_bias=bias)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return step

    def _compiled(self, peer: str, compile: bool) -> Call:
        if not compile:
            raise Unavailable("torch.compile is left out of this run")
        try:
            step = self._step(torch.compile(reference.linear_mse_loss, dynamic=False, **COMPILED[peer]))
            step()
        except Exception as error:  # whatever the compiler behind torch.compile raises
            way = "" if peer == "compile" else f" ({peer})"
            raise Unavailable(f"torch.compile{way} failed here: {first_line(error)}") from None
        return step

    def _outcome(self, peer: str) -> Outcome:
        step = self.calls[peer]
        if isinstance(step, jax_peers.JaxStep):
            return step.outcome()
        loss = step()
        if not isinstance(loss, Tensor):
            raise TypeError(f"bench: {peer} must return the loss, but got {type(loss).__name__}")
        gradients = {name: leaf.grad for name, leaf in self.leaves.items()}
        self.clear()
        for name, leaf in self.leaves.items():
            gradient = gradients[name]
            if gradient is None or gradient.shape != leaf.shape:
                raise RuntimeError(f"bench: {peer} left no gradient of {name}, or one of another shape")
        return {
            "loss": loss.detach(),
            **{name: gradient for name, gradient in gradients.items() if gradient is not None},
        }

    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        by_row = [name for name in self.leaves if name in ("input", "target")]
        whole = ["loss", *(name for name in self.leaves if name not in by_row)]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in whole}
        norm = dict.fromkeys(by_row, 0.0)
        distance = {peer: dict.fromkeys(by_row, 0.0) for peer in outcomes}
        # Piece by piece, because float64 copies of the largest inputs would not fit beside them.
        for rows in chunks(self.case):
            exact = self._exact(rows)
            for name in whole:
                sums[name] = sums[name] + exact[name]
            for name in by_row:
                norm[name] += float(exact[name].square().sum())
                for peer, outcome in outcomes.items():
                    distance[peer][name] += float((outcome[name][rows].double() - exact[name]).square().sum())
        errors: dict[str, dict[str, float]] = {}
        for peer, outcome in outcomes.items():
            errors[peer] = {name: relative_error(outcome[name], sums[name]) for name in whole}
            errors[peer].update((name, math.sqrt(distance[peer][name] / norm[name])) for name in by_row)
        return errors

    def _exact(self, rows: slice) -> Outcome:
        """Return some rows' share of the loss and of the gradients, by autograd in float64."""
        tensors = {
            name: (tensor[rows] if name in ("input", "target") else tensor).detach().double()
            for name, tensor in self.tensors.items()
        }
        leaves = [tensors[name].requires_grad_() for name in self.leaves]
        total = reference.linear_mse_loss(
            tensors["input"],
            tensors["linear_weight"],
            tensors["target"],
            linear_bias=tensors["linear_bias"],
            reduction="sum",
        )
        share = total / (self.case.rows * self.case.out_features)
        gradients = torch.autograd.grad(share, leaves)
        return {"loss": share.detach(), **dict(zip(self.leaves, gradients, strict=True))}
