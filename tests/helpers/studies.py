"""Samplers that prescribe, and what the tests of tune ask of a study."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState


class Prescribed(optuna.samplers.BaseSampler):
    """Gives the learning rates of a list by the trial's number."""

    def __init__(self, rates):
        self.rates = rates

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.rates[trial.number]


def states(study):
    return [trial.state.name for trial in study.trials]


def lrs(study):
    """The learning rates of the finished trials."""
    return [trial.params["lr"] for trial in study.trials if trial.state == TrialState.COMPLETE]
