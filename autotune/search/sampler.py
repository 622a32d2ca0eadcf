"""The one door to Optuna: proposals from what has been measured.

A study is a disposable view: it is rebuilt in memory from trial records for every batch of
proposals, so a restart loses nothing. Only measured results are ever told to it.

A layer group's ordered precisions, the pruned bases and the runtimes are integers
(`landscape.Encoding`), because ordered integers carry "fewer bits" to the sampler where
categories would not. Pruned bases are offered as a list, since each new set of prune ratios
costs a recovery training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from autotune.search.feasibility import ANY, Limits, constraints
from autotune.search.front import FURTHER_OBJECTIVES, latency_of, non_dominated, ranks
from autotune.search.landscape import Encoding
from search_spaces import Candidate
from storage.records import TrialRecord

_GROUP, _BASE, _RUNTIME = "precision:", "base", "runtime"
_ATTEMPTS = 50
"""Draws before the sampler gives up finding a candidate that is new."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Asks Optuna's multivariate TPE (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022).

    Objectives, all smaller: latency p50 in ns, accuracy drop, and those `beside` them.
    Constraints: those of `feasibility.constraints`, feasible at or below 0.
    """

    encoding: Encoding
    seed: int
    limits: Limits = ANY
    max_accuracy_drop: float | None = None
    beside: tuple[str, ...] = ()

    def propose(
        self,
        trials: Sequence[TrialRecord],
        n: int,
        *,
        is_unwanted: Callable[[Candidate], bool],
    ) -> list[Candidate]:
        """Up to `n` new candidates that are not unwanted; fewer where hardly any are left.

        They have the choices on which all members of the front agree, as long as there are such.
        The same trials and the same seed give the same proposals.
        """
        if n == 0:
            return []  # a study of a hundred trials takes as long to build as all else together
        study, distributions = self.study(trials), self.distributions()
        proposals: list[Candidate] = []
        agreed = self.agreed(trials)
        # Where all is agreed upon, as in a front of one, there is nothing to vary.
        stages = [agreed, {}] if 0 < len(agreed) < len(distributions) else [{}]
        for fixed in stages:
            for _ in range(_ATTEMPTS + n):
                if len(proposals) == n:
                    break
                study.enqueue_trial(fixed)
                candidate = self._decode(study.ask(distributions).params)
                if not is_unwanted(candidate) and candidate not in proposals:
                    proposals.append(candidate)
        return proposals

    def agreed(self, trials: Sequence[TrialRecord]) -> dict[str, int]:
        """The choices that all members of the front have in common, by name."""
        front = non_dominated(trials, beside=self.beside)
        members = [self.encoding.point(trial.candidate) for trial in front]
        points = np.array([point for point in members if point is not None])
        if not len(points):
            return {}
        is_common = (points == points[0]).all(axis=0)
        options = zip(self._names, points[0].tolist(), is_common, strict=True)
        varies = self.distributions()
        return {name: option for name, option, common in options if common and name in varies}

    def study(self, trials: Sequence[TrialRecord]) -> optuna.Study:
        """An in-memory study that holds every ranking trial of this space."""
        optuna.logging.set_verbosity(logging.ERROR)
        study = optuna.create_study(
            directions=["minimize"] * (2 + len(self.beside)),
            sampler=optuna.samplers.TPESampler(
                seed=self.seed + len(trials), multivariate=True, n_startup_trials=8
            ),
        )
        distributions = self.distributions()
        for trial in trials:
            point = self.encoding.point(trial.candidate)
            latency = latency_of(trial)
            if point is None or latency is None or trial.accuracy is None or not ranks(trial):
                continue
            further = [FURTHER_OBJECTIVES[name](trial) for name in self.beside]
            if not all(map(math.isfinite, further)):
                continue
            options = dict(zip(self._names, point.tolist(), strict=True))
            study.add_trial(
                create_trial(
                    state=OptunaState.COMPLETE,
                    values=[
                        latency.p50_ns,
                        trial.accuracy.drop,
                        *further,
                    ],
                    params={name: options[name] for name in distributions},
                    distributions=distributions,
                    user_attrs={"candidate": trial.candidate.digest, "number": trial.number},
                    constraints=constraints(
                        trial,
                        latency,
                        limits=self.limits,
                        max_accuracy_drop=self.max_accuracy_drop,
                    )
                    or None,
                )
            )
        return study

    def distributions(self) -> dict[str, BaseDistribution]:
        """One integer per choice that has more than one option."""
        columns = zip(self._names, self.encoding.sizes, strict=True)
        return {name: IntDistribution(0, size - 1) for name, size in columns if size > 1}

    @property
    def _names(self) -> list[str]:
        """Of the encoding's columns."""
        return [*(f"{_GROUP}{group}" for group in self.encoding.groups), _BASE, _RUNTIME]

    def _decode(self, params: Mapping[str, int]) -> Candidate:
        return self.encoding.candidate([params.get(name, 0) for name in self._names])
