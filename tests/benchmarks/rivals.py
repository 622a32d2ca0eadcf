"""A service whose search is one of Optuna's samplers: `python -m tests.benchmarks.rivals tpe`.

For `real_search`: jobs run as ever (baselines, pruned bases, evaluation, confirmation), and only
who proposes in the search phase is another. The samplers are those of `search_methods`, over the
same ordered integers as ours, told every trial's figures and what lies outside the box in which
hypervolumes are counted. Takes the options of `autotune serve` that an embedded service gives.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from autotune.search.front import REFERENCE_DROP, REFERENCE_RATIO, latency_of, ranks
from autotune.search.landscape import Encoding
from autotune.search.planner import Proposal
from autotune.search.proposals import BATCH, Proposals
from autotune.search.runner import Runner
from autotune.service.server import serve
from autotune.settings import Settings
from device_agents.device import host_id
from storage.artifacts import ArtifactStore
from storage.records import TrialRecord
from storage.repository import Repository

SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(multivariate=True, seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(population_size=10, seed=seed),
}
_REPEATS = 20
"""Draws per proposal asked for, before a sampler that repeats itself is left alone."""


@dataclass(slots=True)
class Conversation:
    """One study, told and asked in turn; points are rows of `Encoding`."""

    study: optuna.Study
    space: Mapping[str, IntDistribution]
    told: dict[tuple[int, ...], tuple[float, float] | None] = field(default_factory=dict)
    open: dict[tuple[int, ...], optuna.Trial] = field(default_factory=dict)

    @classmethod
    def begin(cls, sampler: BaseSampler, sizes: Sequence[int]) -> Conversation:
        """A study of two objectives (ratio to FP32's latency, accuracy drop), both smaller."""
        optuna.logging.set_verbosity(logging.ERROR)
        return cls(
            study=optuna.create_study(directions=["minimize"] * 2, sampler=sampler),
            space={f"c{i:03}": IntDistribution(0, size - 1) for i, size in enumerate(sizes)},
        )

    def tell(self, point: tuple[int, ...], figures: tuple[float, float] | None) -> None:
        """What a point measured; None where it failed. A point is told once."""
        if point in self.told:
            return
        self.told[point] = figures
        trial = self.open.pop(point, None)
        if trial is not None:
            self._answer(trial, figures)
        elif figures is not None:
            params = dict(zip(self.space, point, strict=True))
            self.study.add_trial(
                optuna.create_trial(
                    values=list(figures),
                    params=params,
                    distributions=dict(self.space),
                    constraints=_constraints(figures),
                )
            )

    def ask(self, n: int) -> list[tuple[int, ...]]:
        """Up to `n` points that were neither told nor asked; what repeats is told at once."""
        found: list[tuple[int, ...]] = []
        for _ in range(_REPEATS * n):
            if len(found) == n:
                break
            trial = self.study.ask(dict(self.space))
            point = tuple(int(trial.params[name]) for name in self.space)
            if point in self.told:
                self._answer(trial, self.told[point])
            elif point in self.open:
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                self.open[point] = trial
                found.append(point)
        return found

    def _answer(self, trial: optuna.Trial, figures: tuple[float, float] | None) -> None:
        if figures is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        for name, value in _constraints(figures).items():
            trial.set_constraint(name, value)
        self.study.tell(trial, list(figures))


def _constraints(figures: tuple[float, float]) -> dict[str, float]:
    """Feasible at or below 0: inside the box that hypervolumes are counted in."""
    return {"ratio": figures[0] - REFERENCE_RATIO, "drop": figures[1] - REFERENCE_DROP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival(Proposals):
    """Optuna by itself: it knows the space, the baselines and what it asked for."""

    sampler: Callable[[int], BaseSampler]
    conversations: list[Conversation] = field(default_factory=list)

    def warm_start(self, trials: Sequence[TrialRecord]) -> list[Proposal]:
        """Nothing: structure is what the rivals do not know."""
        return []

    def refine(self, trials: Sequence[TrialRecord], *, size: int = BATCH) -> list[Proposal]:
        """The sampler's next points, told all that was measured."""
        encoding = Encoding(space=self.space, bases=({}, *self.bases))
        if not self.conversations:
            made = Conversation.begin(self.sampler(self.seed), encoding.sizes)
            self.conversations.append(made)
        (conversation,) = self.conversations
        for trial in trials:
            point = encoding.point(trial.candidate)
            if point is not None and trial.outcome is not None:
                conversation.tell(tuple(point.tolist()), figures_of(trial))
        points = conversation.ask(size)
        return [Proposal(candidate=encoding.candidate(p), proposed_by="optuna") for p in points]


def figures_of(trial: TrialRecord) -> tuple[float, float] | None:
    """(ratio to FP32's latency, accuracy drop, not below 0); None where it does not rank."""
    latency, accuracy = latency_of(trial), trial.accuracy
    if latency is None or accuracy is None or not ranks(trial):
        return None
    return latency.ratio, max(accuracy.drop, 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rivals")
    parser.add_argument("method", choices=sorted(SAMPLERS))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--no-trust-job-code", action="store_true")
    given = parser.parse_args(arguments)
    sampler = SAMPLERS[given.method]

    def make_runner(repository: Repository, artifacts: ArtifactStore, settings: Settings) -> Runner:
        return Runner(
            repository,
            artifacts,
            data_dir=settings.data_dir,
            host_id=host_id(),
            make_proposals=functools.partial(Rival, sampler=sampler),
        )

    settings = Settings(data_dir=given.data_dir, port=given.port)
    serve(settings, ready_file=given.ready_file, make_runner=make_runner)
    return 0


if __name__ == "__main__":
    sys.exit(main())
