"""The search against general-purpose optimizers: `python -m tests.benchmarks.search`.

Oracles are measured tables of four models with ten groups each, and a simulated model of fifty
groups (`oracles.py`). Ours is what a job of 20 trials does (60 on the oracle of fifty groups):
its warm start, then batches with Optuna's part in them (`search_ours.py`). Every method gets
the same baselines (FP32 and each choice everywhere), the same noisy measurements and the same
number of device runs; all runs count. What a method measured is judged by the oracle's truth: the
hypervolume of the true figures up to the reference point (1.05 of FP32's latency, 3 points lost),
as a share of the best there is. Regret is 1 less that share; smaller is better. Keys, per oracle:

- `ORACLE.regret_vs_random`: our mean regret over the random sampler's, after 20 runs (60 on the
  oracle of fifty groups); `ORACLE.regret_vs_best` over that of the best other method;
- `ORACLE.wide_regret_vs_random`, `ORACLE.wide_regret_vs_best`: the same runs judged up to a
  second reference point (1.5 of FP32's latency, 10 points lost), which no method was told;
- `ORACLE.runs_vs_tpe200`: runs after which our mean hypervolume is what TPE's is after 200, over
  those 200;
- `ORACLE.model_error_ratio`: mean error of our latency model on 50 mixtures that it has not
  seen, after 24 runs of a job so long (`LONG_BUDGET`) that what teaches the model is not cut
  short, over the one-at-a-time table's after as many;
  `ORACLE.within_10_percent`: the share of them that our model is within 10 % of;
- `ORACLE.images_ratio` (tables): images evaluated per trial over all of them, when candidates
  race; `ORACLE.images_hypervolume`: what such a search finds over what it finds without races;
  `ORACLE.images_with_front_ratio`: with what the front is shown once before it is confirmed;
- `ORACLE.propose_ms`: time to fit the models to 100 runs and find a batch by them, over its size;
  `ORACLE.batch_ms`: for such a batch with one of Optuna's in it.

Intervals are bootstraps over seeds. The tables' fronts are known; for fifty groups the best
there is comes from exact optima of weighted sums and their neighbours, so regrets are lower
bounds there, alike for all. Beside the JSON lies a picture of the shares over runs.
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from autotune.search.improvement import hypervolume
from autotune.search.landscape import LONG_BUDGET
from autotune.search.proposals import BATCH
from tests.benchmarks.harness import BOOTSTRAP_DRAWS, Benchmark, Figure, median_figure, start
from tests.benchmarks.oracles import Measured, Oracle, Simulated, simulated
from tests.benchmarks.search_images import images_ratio
from tests.benchmarks.search_methods import METHODS, predicted_by_table
from tests.benchmarks.search_ours import (
    REFERENCE,
    comparison_runs,
    fitted,
    model_based,
    next_batch,
    promising,
    warm_start,
)
from tests.benchmarks.search_picture import draw
from tests.benchmarks.tables import FOLDER, Table

SEEDS, QUICK_SEEDS = 20, 2
TPE_RUNS = 200
WIDE = (1.5, 0.1)
MODEL_RUNS, UNSEEN = 24, 50
_KINDS = ("stem", *("pointwise", "depthwise", "pointwise") * 17)
_SLOW_SEEDS = 5
"""Seeds of Optuna's Gaussian process on a hundred integers, which takes minutes each."""


def main() -> int:
    names = sorted(path.stem for path in FOLDER.glob("*.npz"))
    benchmark = start(
        "search",
        "The search against general-purpose optimizers.",
        models=[*names, "fifty"],
        quick_models=names[:1],
    )
    warnings.filterwarnings("ignore", module="optuna")
    for name in benchmark.models:
        oracle = fifty() if name == "fifty" else Measured(table=Table.load(name))
        compare(benchmark, oracle, QUICK_SEEDS if benchmark.quick else SEEDS)
        benchmark.save()
    if benchmark.json_path is not None:
        shares = {name: raw["shares"] for name, raw in benchmark.raw.items()}
        draw(benchmark.json_path.with_suffix(".png"), shares)
    benchmark.report()
    return 0


def fifty() -> Simulated:
    """Fifty groups with four precisions and five prune ratios each."""
    return simulated(
        "fifty", kinds=_KINDS[:50], n_precisions=4, ratios=(0.0, 0.125, 0.25, 0.375, 0.5), seed=4
    )


def figures_of(oracle: Oracle, points: np.ndarray) -> np.ndarray:
    """True (ratio, drop) of points, `(n, 2)`; drops below zero count as zero."""
    return np.column_stack([oracle.latency(points), np.maximum(oracle.drop(points), 0.0)])


def compare(benchmark: Benchmark, oracle: Oracle, seeds: int) -> None:
    """All keys of one oracle."""
    large = oracle.n_groups > 10
    runs = comparison_runs(oracle)
    points: dict[str, list[np.ndarray]] = {}
    for name, method in METHODS.items():
        benchmark.say(f"{oracle.name}: {name}")
        length = runs
        if not benchmark.quick and name in ("tpe", "ours"):
            length = TPE_RUNS if name == "tpe" else TPE_RUNS // 2
        n = min(seeds, _SLOW_SEEDS) if name == "gp" and large else seeds
        points[name] = [method(oracle, length, seed) for seed in range(n)]
        shares = attained(oracle, points, REFERENCE)
        benchmark.raw[oracle.name] = {"runs": runs, "shares": shares}
        benchmark.save()
    for key, figure in regrets(shares, runs).items():
        benchmark.add(f"{oracle.name}.{key}", figure)
    for key, figure in regrets(attained(oracle, points, WIDE), runs).items():
        benchmark.add(f"{oracle.name}.wide_{key}", figure)
    if not benchmark.quick:
        benchmark.add(f"{oracle.name}.runs_vs_tpe200", runs_to_reach(shares))
    for key, figure in model_error(oracle, seeds).items():
        benchmark.add(f"{oracle.name}.{key}", figure)
    if isinstance(oracle, Measured):
        for key, figure in images_ratio(oracle, points["ours"], runs).items():
            benchmark.add(f"{oracle.name}.{key}", figure)
    for key, figure in proposal_times(oracle).items():
        benchmark.add(f"{oracle.name}.{key}", figure)


def best_hypervolume(oracle: Oracle, reference: Sequence[float]) -> float:
    """Of all points where they are few, else of exact optima and all their neighbours."""
    if not isinstance(oracle, Simulated):
        points = np.array(list(itertools.product(*(range(size) for size in oracle.sizes))))
        return hypervolume(figures_of(oracle, points), reference)
    optima = np.unique(oracle.optima(np.geomspace(0.01, 1000, 400)), axis=0)
    found = [optima]
    for column, size in enumerate(oracle.sizes):
        for option in range(size):
            found.append(optima.copy())
            found[-1][:, column] = option
    return hypervolume(figures_of(oracle, np.vstack(found)), reference)


def attained(
    oracle: Oracle, points: Mapping[str, Sequence[np.ndarray]], reference: Sequence[float]
) -> dict[str, list[list[float]]]:
    """Per method and seed the share of the best hypervolume after each run."""
    best = best_hypervolume(oracle, reference)
    found: dict[str, list[list[float]]] = {}
    for name, seeds in points.items():
        found[name] = []
        for rows in seeds:
            figures = figures_of(oracle, rows)
            volumes = [hypervolume(figures[: n + 1], reference) for n in range(len(figures))]
            found[name].append([volume / best for volume in volumes])
    return found


def regrets(shares: Mapping[str, Sequence[Sequence[float]]], runs: int) -> dict[str, Figure]:
    """Both ratios of mean regrets, with their intervals."""
    regret = {
        name: np.array([1 - run[min(runs, len(run)) - 1] for run in rows])
        for name, rows in shares.items()
    }
    others = {name: values.mean() for name, values in regret.items() if name != "ours"}
    best = min(others, key=lambda name: others[name])
    return {
        "regret_vs_random": ratio_of_means(regret["ours"], regret["random"]),
        "regret_vs_best": ratio_of_means(regret["ours"], regret[best]),
    }


def ratio_of_means(ours: np.ndarray, theirs: np.ndarray, *, seed: int = 0) -> Figure:
    """mean(ours) / mean(theirs) with the 95 % interval of resampling both (Efron 1979)."""
    rng = np.random.default_rng(seed)
    draws = [
        rng.choice(values, size=(BOOTSTRAP_DRAWS, len(values))).mean(axis=1)
        for values in (ours, theirs)
    ]
    low, high = np.percentile(draws[0] / np.maximum(draws[1], 1e-9), [2.5, 97.5])
    value = float(ours.mean() / max(theirs.mean(), 1e-9))
    return Figure(value=value, low=float(low), high=float(high), n=len(ours))


def runs_to_reach(shares: Mapping[str, Sequence[Sequence[float]]], *, seed: int = 0) -> Figure:
    """The first run at which our mean share is TPE's after all of its runs, over those.

    Where ours does not get there within its runs, all of TPE's count.
    """
    ours = np.array([[*run, *[run[-1]] * (TPE_RUNS // 2 - len(run))] for run in shares["ours"]])
    theirs = np.array([run[-1] for run in shares["tpe"]])
    rng = np.random.default_rng(seed)

    def ratio(own: np.ndarray, other: np.ndarray) -> float:
        reached = np.flatnonzero(own.mean(axis=0) >= other.mean() - 1e-12)
        return (int(reached[0]) + 1 if len(reached) else TPE_RUNS) / TPE_RUNS

    draws = [
        ratio(ours[rng.integers(len(ours), size=len(ours))], rng.choice(theirs, len(theirs)))
        for _ in range(BOOTSTRAP_DRAWS)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Figure(value=ratio(ours, theirs), low=float(low), high=float(high), n=len(ours))


def model_error(oracle: Oracle, seeds: int) -> dict[str, Figure]:
    """Mean absolute error of the latency model over the table's, on mixtures drawn at random."""
    ours, table, within = [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng(1000 + seed)
        points = list(model_based(oracle, MODEL_RUNS, seed, budget=LONG_BUDGET))
        seen = {tuple(point) for point in points}
        drawn = rng.integers(oracle.sizes, size=(2 * UNSEEN, len(oracle.sizes)))
        unseen = np.array([point for point in drawn if tuple(point) not in seen][:UNSEEN])
        truth = oracle.latency(unseen)
        landscape = fitted(oracle, points, [oracle.measure(point, rng) for point in points])
        error = np.abs(landscape.first.predict(unseen)[0] - truth)
        ours.append(error.mean())
        within.append((error <= 0.1 * truth).mean())
        predicted = predicted_by_table(oracle, unseen, MODEL_RUNS, rng)
        table.append(np.abs(predicted - truth).mean())
    return {
        "model_error_ratio": ratio_of_means(np.array(ours), np.array(table)),
        "within_10_percent": ratio_of_means(np.array(within), np.ones(len(within))),
    }


def proposal_times(oracle: Oracle) -> dict[str, Figure]:
    """Milliseconds per point that the models propose, and per batch with Optuna's part."""
    rng = np.random.default_rng(0)
    baselines, warm = oracle.baselines(), warm_start(oracle, budget=LONG_BUDGET)
    drawn = rng.integers(oracle.sizes, size=(100, len(oracle.sizes)))
    points = [*baselines, *warm, *drawn]  # Optuna's turn is after 4, 12, 20, ..., 100
    found = [oracle.measure(point, rng) for point in points]
    models, batches = [], []
    for _ in range(5):
        started = time.perf_counter()
        own = promising(fitted(oracle, points, found), points, BATCH, 0, budget=LONG_BUDGET)
        models.append(1e3 * (time.perf_counter() - started) / len(own))
        started = time.perf_counter()
        next_batch(oracle, points, found, seed=0, budget=LONG_BUDGET)
        batches.append(1e3 * (time.perf_counter() - started))
    return {"propose_ms": median_figure(models), "batch_ms": median_figure(batches)}


if __name__ == "__main__":
    sys.exit(main())
