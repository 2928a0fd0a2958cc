"""K models on their way through the epochs, by the training-loop operators."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .choice import seconds
from .optimizers import Rule
from .options import TrainingOptions
from .row_kinds import MemoryRows, Rows

__all__ = ["FusedRun", "OperatorRun", "StatisticsRun", "StreamedRun"]


class OperatorRun(abc.ABC):
    """K models on their way through the epochs, by an operator that trains them in place."""

    def __init__(self, initial: nn.Linear, rules: Sequence[Rule], *, dtype: torch.dtype) -> None:
        models = len(rules)
        weight, bias = initial.weight.detach(), initial.bias
        whole = torch.contiguous_format
        self.weight = weight.to(dtype).expand(models, -1, -1).clone(memory_format=whole)
        self.bias = None if bias is None else bias.detach().to(dtype).expand(models, -1).clone(memory_format=whole)
        self.rule = rules[0].name
        self.options = torch.tensor([rule.options for rule in rules], dtype=torch.float64)
        memory = 1 + max(rule.memory for rule in rules)
        parameters = weight.numel() + weight.shape[0]
        self.state = torch.zeros(memory, models, parameters, dtype=dtype, device=self.weight.device)
        self._initial = weight.flatten() if bias is None else torch.cat([weight.flatten(), bias.detach()])
        self.state[0, :, : self._initial.numel()] = self._initial
        self.stopped = torch.full((models,), -1)
        self.trained = initial.weight.requires_grad, bias is not None and bias.requires_grad
        self.epoch = self.step = 0
        self.steps_an_epoch = 1
        self.seconds_an_epoch = 0.0

    def advance(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Run as many epochs as ``lr`` (E, K) has rows; return their losses and validation losses."""
        losses: tuple[Tensor, Tensor] = self._call(lr)
        self.epoch += lr.shape[0]
        self.step += lr.shape[0] * self.steps_an_epoch
        return losses

    @abc.abstractmethod
    def _call(self, lr: Tensor) -> tuple[Tensor, Tensor]: ...

    def _models(self, lr: Tensor, further: int = 0) -> tuple[Any, ...]:
        """Return what both operators are told of the models, ``further`` epochs after those that are counted."""
        how = self.options, self.state, self.stopped, self.rule
        return self.weight, self.bias, lr, *how, self.epoch + further, self.step

    def start_again(self) -> None:
        """Put all parameters back to the initial ones."""
        self.state[0, :, : self._initial.numel()] = self._initial
        self.put_back()

    def put_back(self, model: int | None = None) -> None:
        """Put the parameters of one model or of all back to what they were when their loss was last finite."""
        chosen = slice(None) if model is None else slice(model, model + 1)
        last, weights = self.state[0, chosen], self.weight[0].numel()
        if self.trained[0]:
            self.weight[chosen].copy_(last[:, :weights].view_as(self.weight[chosen]))
        if self.bias is not None and self.trained[1]:
            self.bias[chosen].copy_(last[:, weights:])


class FusedRun(OperatorRun):
    """Rows in memory, all of an epoch in one call."""

    def __init__(self, rows: MemoryRows, initial: nn.Linear, rules: Sequence[Rule], options: TrainingOptions) -> None:
        super().__init__(initial, rules, dtype=rows.dtype)
        self.rows = rows
        self.batch_size = min(options.batch_size or rows.count, rows.count)
        self.shuffle, self.generator = options.shuffle is not False, options.generator()
        self.steps_an_epoch = -(-rows.count // self.batch_size)
        self.seconds_an_epoch = seconds(rows, rows.count, len(rules))[2]

    def _call(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        held_out = self.rows.validation or (None, None)
        losses: tuple[Tensor, Tensor] = torch.ops.torchintro.linear_mse_fit(
            self.rows.X,
            self.rows.y,
            *self._models(lr),
            self.batch_size,
            self.shuffle,
            self.generator,
            *held_out,
            *self.trained,
        )
        return losses


class StatisticsRun(OperatorRun):
    """Second moments instead of rows."""

    def __init__(self, rows: Rows, initial: nn.Linear, rules: Sequence[Rule]) -> None:
        self.moments = rows.moments()
        # On the host, where an epoch of some features takes less than a launch.
        host = copy.deepcopy(initial).cpu() if initial.weight.device.type != "cpu" else initial
        super().__init__(host, rules, dtype=torch.float64)
        self.largest = torch.finfo(rows.dtype).max
        self.seconds_an_epoch = seconds(rows, 1, len(rules))[1]

    def _call(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        losses: tuple[Tensor, Tensor] = torch.ops.torchintro.linear_statistics_fit(
            *self.moments,
            *self._models(lr),
            *self.trained,
            self.largest,
        )
        return losses


class StreamedRun(OperatorRun):
    """Mini-batches of rows that are read once an epoch, in their order."""

    def __init__(self, rows: Rows, initial: nn.Linear, rules: Sequence[Rule], batch_size: int) -> None:
        super().__init__(initial, rules, dtype=rows.dtype)
        self.rows, self.batch_size = rows, batch_size
        self.steps_an_epoch = 0  # counted as they are made
        self.seconds_an_epoch = math.inf  # one epoch a call

    def _call(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.zeros_like(lr)
        held_out = torch.full_like(lr, math.nan)[: lr.shape[0] if self.rows.has_validation else 0]
        for epoch in range(lr.shape[0]):
            running, count = self.stopped < 0, 0
            for X, y in self.rows.pieces(self.batch_size):
                some, _ = torch.ops.torchintro.linear_mse_fit(
                    X,
                    y,
                    *self._models(lr[epoch : epoch + 1], epoch),
                    self.batch_size,
                    False,
                    None,
                    None,
                    None,
                    *self.trained,
                )
                # One that stopped in an earlier piece of this epoch stays at the loss that was not finite.
                losses[epoch] += torch.where(some[0].isnan() & ~losses[epoch].isfinite(), 0.0, some[0] * X.shape[0])
                self.step += -(-X.shape[0] // self.batch_size)
                count += X.shape[0]
            losses[epoch] = torch.where(running, losses[epoch] / count, math.nan)
            for k in (self.stopped < 0).nonzero().flatten().tolist() if self.rows.has_validation else ():
                bias = None if self.bias is None else self.bias[k]
                held_out[epoch, k] = self.rows.validation_loss(functional.linear_mse_loss, self.weight[k], bias)
                if not held_out[epoch, k] <= torch.finfo(self.rows.dtype).max:
                    self.put_back(k)
                    self.stopped[k] = self.epoch + epoch
        return losses, held_out
