"""The searches that the search benchmark compares: each asks for one point after the other.

A method is a function of what has been measured; all are given the same baselines. Optuna's
samplers are told a repeated point's figures without a new run, and where the reference point
is: its two figures are their constraints. The greedy walk and the one-at-a-time table are what
tools of this field do: walk along the ranking of sensitivities, or measure each choice alone,
add up, and solve for every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from autotune.search.drop_model import DropModel, Drops
from autotune.search.front import REFERENCE_DROP, REFERENCE_RATIO
from autotune.search.improvement import Landscape, most_promising
from autotune.search.landscape import conversion
from autotune.search.surrogate import Surrogate
from tests.benchmarks.conversation import DRAWS, SAMPLERS, Conversation, MakeSampler
from tests.benchmarks.oracles import Oracle, Run

REFERENCE = (REFERENCE_RATIO, REFERENCE_DROP)
Search = Callable[[Oracle, int, int], np.ndarray]
"""(oracle, runs, seed) to the points measured, in order, `(runs, n_columns)`."""


def model_based(oracle: Oracle, runs: int, seed: int) -> np.ndarray:
    """Ours: `surrogate.py` fitted on everything measured, `improvement.py` asked for the next."""
    rng = np.random.default_rng(seed)
    points = oracle.baselines()
    found = [oracle.measure(point, rng) for point in points]
    while len(points) < runs:
        landscape = fitted(oracle, points, found)
        next_ones = most_promising(landscape, np.array(points), reference=REFERENCE, n=1, rng=rng)
        if not next_ones:
            break
        points.append(next_ones[0].point)
        found.append(oracle.measure(next_ones[0].point, rng))
    return np.array(points)


def fitted(oracle: Oracle, points: Sequence[np.ndarray], found: Sequence[Run]) -> Landscape:
    """Both models on what has been measured; the first point is FP32."""
    rows, ratios = np.array(points), np.array([run.ratio for run in found])
    per_nat = conversion([(run.kl, run.drop) for run in found])
    latency, drop = oracle.features(
        per_nat, [run.ratio for run in found[: len(oracle.baselines())]]
    )
    drops = Drops(
        measured=np.array([run.drop for run in found]),
        diverged=per_nat * np.array([run.kl for run in found]),
        errors=np.array([run.drop_error or 0.0 for run in found]),
        n_samples=oracle.n_samples,
        ceiling=REFERENCE_DROP,
    )
    return Landscape(
        Surrogate(latency, rows, ratios, oracle.noise * ratios, base=float(ratios[0])),
        DropModel(drop, rows, drops),
    )


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
