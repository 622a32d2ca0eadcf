"""Optuna's samplers, told and asked point by point: what both search benchmarks compare ours with.

A point is one integer per column, and is told once. A sampler is told every point's two figures,
ratio to FP32's latency and accuracy drop, and what of them lies outside the box in which
hypervolumes are counted. Who measures a point is the benchmark's: `search_methods.py` asks an
oracle, `rivals.py` a real device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from autotune.search.front import REFERENCE_DROP, REFERENCE_RATIO

MakeSampler = Callable[[int], BaseSampler]
"""A sampler by its seed."""

SAMPLERS: Mapping[str, MakeSampler] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(multivariate=True, seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(population_size=10, seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=5),
}
DRAWS = 20
"""Per point wanted, before a sampler that repeats itself is left alone."""


@dataclass(slots=True)
class Conversation:
    """One study, told and asked in turn."""

    study: optuna.Study
    space: Mapping[str, IntDistribution]
    told: dict[tuple[int, ...], tuple[float, float] | None] = field(default_factory=dict)
    open: dict[tuple[int, ...], optuna.Trial] = field(default_factory=dict)
    n_drawn: int = 0

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

    def ask(self, n: int, *, draws: int) -> list[tuple[int, ...]]:
        """Up to `n` points that were neither told nor asked, in at most so many draws.

        What repeats is told at once.
        """
        found: list[tuple[int, ...]] = []
        for _ in range(draws):
            if len(found) == n:
                break
            self.n_drawn += 1
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
