"""The searches that the search benchmark compares: each asks for one point after the other.

A method is a function of what has been measured; all are given the same baselines. Optuna's
samplers are told a repeated point's figures without a new run. The greedy walk and the
one-at-a-time table are what tools of this field do: walk along the ranking of sensitivities,
or measure each choice alone, add up, and solve for every budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler

from autotune.search.front import REFERENCE_DROP, REFERENCE_RATIO
from autotune.search.improvement import Landscape, most_promising
from autotune.search.surrogate import Features, Surrogate
from tests.benchmarks.oracles import NOISE, SAMPLES, Oracle

REFERENCE = (REFERENCE_RATIO, REFERENCE_DROP)
DROP_CEILING = 4 * REFERENCE_DROP
Search = Callable[[Oracle, int, int], np.ndarray]
"""(oracle, runs, seed) to the points measured, in order, `(runs, n_columns)`."""


def model_based(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
    """Ours: `surrogate.py` fitted on everything measured, `improvement.py` asked for the next."""
    rng = np.random.default_rng(seed)
    latency, drop = oracle.features()
    points = oracle.baselines()
    figures = [oracle.measure(point, rng) for point in points]
    while len(points) < runs:
        landscape = fitted(oracle, latency, drop, points, figures)
        found = most_promising(landscape, np.array(points), reference=REFERENCE, n=1, rng=rng)
        if not found:
            break
        points.append(found[0].point)
        figures.append(oracle.measure(found[0].point, rng))
    return np.array(points)


def fitted(
    oracle: Oracle,
    latency: Features,
    drop: Features,
    points: Sequence[np.ndarray],
    figures: Sequence[tuple[float, float]],
) -> Landscape:
    """Both models on what has been measured; the first point is FP32."""
    rows, values = np.array(points), np.array(figures)
    capped = np.minimum(values[:, 1], DROP_CEILING)
    return Landscape(
        Surrogate(latency, rows, values[:, 0], NOISE * values[:, 0], base=float(values[0, 0])),
        Surrogate(drop, rows, capped, np.full(len(rows), 1 / SAMPLES), base=0.0),
    )


def optuna_search(sampler: Callable[[int], BaseSampler]) -> Search:
    """One of Optuna's samplers over ordered integers, with both objectives."""

    def search(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
        optuna.logging.set_verbosity(logging.ERROR)
        rng = np.random.default_rng(seed)
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler(seed))
        names = [f"c{column:03}" for column in range(len(oracle.sizes))]
        space = {n: IntDistribution(0, k - 1) for n, k in zip(names, oracle.sizes, strict=True)}
        seen: dict[tuple[int, ...], tuple[float, float]] = {}
        for point in oracle.baselines():
            seen[tuple(point)] = oracle.measure(point, rng)
            params = dict(zip(names, (int(v) for v in point), strict=True))
            study.add_trial(
                optuna.create_trial(
                    values=list(seen[tuple(point)]),
                    params=params,
                    distributions=dict(space),
                )
            )
        asked = 0
        while len(seen) < runs and asked < 20 * runs:
            asked += 1
            trial = study.ask(dict(space))
            key = tuple(int(trial.params[name]) for name in names)
            if key not in seen:
                seen[key] = oracle.measure(np.array(key), rng)
            study.tell(trial, list(seen[key]))
        return np.array(list(seen))

    return search


def greedy_walk(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
    """From all at the lowest precision back to FP32, the most sensitive group first.

    The walk of AIMET's automatic mixed precision: the ranking is by sensitivity, each step is
    measured, and steps are widened where there are fewer runs than groups.
    """
    rng = np.random.default_rng(seed)
    points = oracle.baselines()
    order = np.argsort(-oracle.known_damages[:, 1])
    left = runs - len(points)
    current = points[1].copy()
    for part in np.array_split(order, min(left, len(order))):
        current = current.copy()
        current[part] = 0
        points.append(current)
    while len(points) < runs:
        points.append(np.array([rng.integers(size) for size in oracle.sizes]))
    return np.array(points[:runs])


def one_at_a_time(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
    """Each choice alone, as far as two thirds of the runs go; then the sums' optima.

    The table's optima for rising weights of the drop come from coordinate descent, which is
    exact here: without boundaries nothing ties the groups.
    """
    rng = np.random.default_rng(seed)
    points = oracle.baselines()
    gains, damage = _table(oracle, points, runs, rng)
    wanted = _optima(gains, damage)
    known = {tuple(p) for p in points}
    for point in wanted:
        if len(points) < runs and tuple(point) not in known:
            known.add(tuple(point))
            points.append(point)
    while len(points) < runs:
        points.append(np.array([rng.integers(size) for size in oracle.sizes]))
    return np.array(points[:runs])


def _table(
    oracle: Oracle, points: list[np.ndarray], runs: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What each choice alone changes, measured while runs last; appends the probes to `points`."""
    base, _ = oracle.measure(points[0], rng)
    n = oracle.n_groups
    gains = [np.zeros(size) for size in oracle.sizes]
    tables = [*oracle.known_damages, *(oracle.known_prune_damages if oracle.ratios else ())]
    probes = [
        (float(oracle.shares[column % n]), column, option)
        for column, size in enumerate(oracle.sizes)
        for option in range(1, size)
    ]
    for _, column, option in sorted(probes, reverse=True)[: 2 * runs // 3 - len(points)]:
        point = points[0].copy()
        point[column] = option
        points.append(point)
        gains[column][option] = oracle.measure(point, rng)[0] - base
    return gains, tables


def predicted_by_table(
    oracle: Oracle, points: np.ndarray, runs: int, rng: np.random.Generator
) -> np.ndarray:
    """The ratios that a table of choices measured alone adds up to, `(n,)`."""
    gains, _ = _table(oracle, oracle.baselines(), 3 * runs // 2, rng)
    total = np.ones(len(points))
    for column, gain in enumerate(gains):
        total += gain[points[:, column]]
    return total


def _optima(gains: list[np.ndarray], damage: list[np.ndarray]) -> Iterator[np.ndarray]:
    for weight in np.geomspace(0.3, 300, 40):
        yield np.array([int(np.argmin(g + weight * d)) for g, d in zip(gains, damage, strict=True)])


METHODS: dict[str, Search] = {
    "ours": model_based,
    "random": optuna_search(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "tpe": optuna_search(lambda seed: optuna.samplers.TPESampler(multivariate=True, seed=seed)),
    "nsga2": optuna_search(
        lambda seed: optuna.samplers.NSGAIISampler(population_size=10, seed=seed)
    ),
    "gp": optuna_search(lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=5)),
    "greedy": greedy_walk,
    "table": one_at_a_time,
}
