"""What a training run is told: checked once, by one function, with the caller's name in every sentence."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from torchintro.training.options import ENGINES, TrainingOptions, check_options, learning_rates


def test_what_is_not_given_is_left_open():
    assert check_options("train", epochs=3) == TrainingOptions(3, None, None, "auto", None)
    given = {"epochs": 3, "batch_size": 8, "shuffle": False, "engine": "fused", "seed": 5}
    options = check_options("train", **given)
    assert dataclasses.asdict(options) == given
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.epochs = 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, but got 0"),
        ({"epochs": 2.0}, TypeError, "epochs must be an integer, but got 2.0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, but got 0"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, but got True"),
        ({"shuffle": 1}, TypeError, "shuffle must be True or False, but got 1"),
        ({"engine": "fast"}, ValueError, f"engine must be one of {', '.join(ENGINES)}, but got 'fast'"),
        ({"seed": "0"}, TypeError, "seed must be an integer, but got '0'"),
    ],
)
def test_bad_options_are_said(arguments, error, message):
    with pytest.raises(error, match=f"^train: {message}$"):
        check_options("train", **{"epochs": 3} | arguments)


def test_every_generator_begins_anew():
    options = TrainingOptions(1, seed=3)
    first, second = (torch.randperm(50, generator=options.generator()) for _ in range(2))
    assert torch.equal(first, second)
    assert TrainingOptions(1).generator() is None


@pytest.mark.parametrize("lr", [[0.1, 0.2, 0.3], (0.1, 0.2, 0.3), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)])
def test_a_learning_rate_for_each_epoch(lr):
    assert learning_rates("train", lr, 3) == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"^train: lr must be one number or one for each of 2 epochs, but got 3$"):
        learning_rates("train", lr, 2)


def test_one_learning_rate_is_that_of_all_epochs():
    assert learning_rates("train", torch.tensor(0.5), 2) == learning_rates("train", 0.5, 2) == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"^train: lr\[1\] must be a positive, finite number, but got -1.0$"):
        learning_rates("train", [1.0, -1.0], 2)
