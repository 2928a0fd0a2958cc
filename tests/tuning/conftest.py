"""What several tests of tune look at."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture
def batches(monkeypatch):
    """The learning rates that were trained together, in order."""
    from torchintro.tuning import trainer

    trained = []
    train_models = trainer.train_models

    def spy(data, *, lr, **options):
        trained.append(list(lr))
        return train_models(data, lr=lr, **options)

    monkeypatch.setattr(trainer, "train_models", spy)
    return trained


@pytest.fixture
def _ctrl_c_interrupts():
    # Where the suite runs in a shell's background, that Ctrl-C is ignored is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
