"""The searches that the search benchmark compares.

A method is a function of what has been measured; all are given the same baselines. Ours is
`search_ours.py`; the others are asked for one point after the other. Optuna's samplers are told
a repeated point's figures without a new run, and where the reference point is: its two figures
are their constraints. The greedy walk and the one-at-a-time table are what tools of this field
do: walk along the ranking of sensitivities, or measure each choice alone, add up, and solve for
every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tests.benchmarks.conversation import DRAWS, SAMPLERS, Conversation, MakeSampler
from tests.benchmarks.oracles import Oracle
from tests.benchmarks.search_ours import model_based

Search = Callable[[Oracle, int, int], np.ndarray]
"""(oracle, runs, seed) to the points measured, in order, `(runs, n_columns)`."""


def optuna_search(sampler: MakeSampler) -> Search:
    """One of Optuna's samplers over ordered integers, with both objectives and constraints."""

    def search(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        study = Conversation.begin(sampler(seed), oracle.sizes)
        asked = [tuple(point.tolist()) for point in oracle.baselines()]
        while asked:
            for point in asked:
                run = oracle.measure(np.array(point), rng)
                study.tell(point, (run.ratio, run.drop))
            left = runs - len(study.told)
            asked = study.ask(1, draws=DRAWS * runs - study.n_drawn) if left > 0 else []
        return np.array(list(study.told))

    return search


def greedy_walk(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
    """From all at the lowest precision back to FP32, the most sensitive group first.

    The walk of AIMET's automatic mixed precision: the ranking is by sensitivity, each step is
    measured, and steps are widened where there are fewer runs than groups. What is left of the
    runs goes to random points.
    """
    rng = np.random.default_rng(seed)
    points = oracle.baselines()
    order = np.argsort([-damage[1] for damage in oracle.damages()[: oracle.n_groups]])
    left = runs - len(points)
    current = points[1].copy()
    for part in np.array_split(order, min(left, len(order))):
        current = current.copy()
        current[part] = 0
        points.append(current)
    return _filled(oracle, points, runs, rng)


def one_at_a_time(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
    """Each choice alone, as far as two thirds of the runs go; then the sums' optima.

    The table's optima for rising weights of the drop come from one choice after the other, which
    is exact here: without boundaries nothing ties the groups.
    """
    rng = np.random.default_rng(seed)
    points = oracle.baselines()
    gains = _table(oracle, points, 2 * runs // 3 - len(points), rng)
    known = {tuple(p) for p in points}
    for point in _optima(gains, oracle.damages()):
        if len(points) < runs and tuple(point) not in known:
            known.add(tuple(point))
            points.append(point)
    return _filled(oracle, points, runs, rng)


def _filled(
    oracle: Oracle, points: list[np.ndarray], runs: int, rng: np.random.Generator
) -> np.ndarray:
    """The points, with random ones behind them up to `runs`."""
    drawn = rng.integers(oracle.sizes, size=(max(runs - len(points), 0), len(oracle.sizes)))
    return np.array([*points, *drawn][:runs])


def _table(
    oracle: Oracle, points: list[np.ndarray], n_probes: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """What each choice alone changes of the ratio, the first ones of the longest groups first.

    Appends the probes to `points`.
    """
    base = oracle.measure(points[0], rng).ratio
    gains = [np.zeros(size) for size in oracle.sizes]
    shares = oracle.shares()
    probes = [
        (-option, float(shares[column]), column)
        for column, size in enumerate(oracle.sizes)
        for option in range(1, size)
    ]
    for negative, _, column in sorted(probes, reverse=True)[: max(n_probes, 0)]:
        point = points[0].copy()
        point[column] = -negative
        points.append(point)
        gains[column][-negative] = oracle.measure(point, rng).ratio - base
    return gains


def predicted_by_table(
    oracle: Oracle, points: np.ndarray, runs: int, rng: np.random.Generator
) -> np.ndarray:
    """The ratios that a table of choices measured alone adds up to, after `runs`, `(n,)`."""
    baselines = oracle.baselines()
    gains = _table(oracle, baselines, runs - len(baselines), rng)
    total = np.ones(len(points))
    for column, gain in enumerate(gains):
        total += gain[points[:, column]]
    return total


def _optima(gains: list[np.ndarray], damage: list[np.ndarray]) -> Iterator[np.ndarray]:
    for weight in np.geomspace(0.1, 300, 60):
        yield np.array([int(np.argmin(g + weight * d)) for g, d in zip(gains, damage, strict=True)])


METHODS: dict[str, Search] = {
    "ours": model_based,
    **{name: optuna_search(sampler) for name, sampler in SAMPLERS.items()},
    "greedy": greedy_walk,
    "table": one_at_a_time,
}
