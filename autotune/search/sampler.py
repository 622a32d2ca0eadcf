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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from autotune.search.front import latency_of, ranks
from autotune.search.landscape import Encoding
from search_spaces import Candidate
from storage.records import TrialRecord

_GROUP, _BASE, _RUNTIME = "precision:", "base", "runtime"
_ATTEMPTS = 50
"""Draws before the sampler gives up finding a candidate that is new."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Asks Optuna's multivariate TPE (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022).

    Objectives: latency p50 in ns (smaller), accuracy drop (smaller) and, with `by_size`, the
    file's bytes (smaller). Constraint: the upper bound of the latency interval minus the budget,
    feasible at or below 0.
    """

    encoding: Encoding
    seed: int
    latency_budget_ns: float | None = None
    by_size: bool = False

    def propose(
        self,
        trials: Sequence[TrialRecord],
        n: int,
        *,
        is_known: Callable[[Candidate], bool],
    ) -> list[Candidate]:
        """Up to `n` candidates that are new; fewer where the space is nearly exhausted.

        The same trials and the same seed give the same proposals.
        """
        study = self.study(trials)
        proposals: list[Candidate] = []
        for _ in range(_ATTEMPTS + n):
            if len(proposals) == n:
                break
            asked = study.ask(self.distributions())
            candidate = self._decode(asked.params)
            if not is_known(candidate) and candidate not in proposals:
                proposals.append(candidate)
        return proposals

    def study(self, trials: Sequence[TrialRecord]) -> optuna.Study:
        """An in-memory study that holds every ranking trial of this space."""
        optuna.logging.set_verbosity(logging.ERROR)
        study = optuna.create_study(
            directions=["minimize"] * (3 if self.by_size else 2),
            sampler=optuna.samplers.TPESampler(
                seed=self.seed + len(trials), multivariate=True, n_startup_trials=8
            ),
        )
        distributions = self.distributions()
        for trial in trials:
            params = self._encode(trial.candidate)
            latency = latency_of(trial)
            if params is None or latency is None or trial.accuracy is None or not ranks(trial):
                continue
            size = trial.artifact_size_bytes
            if self.by_size and size is None:
                continue
            study.add_trial(
                create_trial(
                    state=OptunaState.COMPLETE,
                    values=[
                        latency.p50_ns,
                        trial.accuracy.drop,
                        *([size] if self.by_size and size is not None else []),
                    ],
                    params=dict(params),
                    distributions=distributions,
                    user_attrs={"candidate": trial.candidate.digest, "number": trial.number},
                    constraints=None
                    if self.latency_budget_ns is None
                    else {"latency_budget": latency.p50_high_ns - self.latency_budget_ns},
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

    def _encode(self, candidate: Candidate) -> dict[str, int] | None:
        point = self.encoding.point(candidate)
        if point is None:
            return None
        values = dict(zip(self._names, point.tolist(), strict=True))
        return {name: values[name] for name in self.distributions()}

    def _decode(self, params: Mapping[str, int]) -> Candidate:
        return self.encoding.candidate([params.get(name, 0) for name in self._names])
