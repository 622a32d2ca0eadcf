"""The search against general-purpose optimizers, on simulated oracles: `tests.benchmarks.search`.

Every method gets the same baselines (FP32 and each precision everywhere), the same noisy
measurements and the same number of device runs; all runs count. What a method measured is
judged by the oracle's truth: the hypervolume of the true figures up to the reference point
(1.05 of FP32's latency, 3 points lost), as a share of the best there is. Regret is 1 less
that share; smaller is better. Keys, per oracle:

- `ORACLE.regret_vs_random`: our mean regret over the random sampler's, after 20 runs (60 on the
  oracle of fifty groups); `ORACLE.regret_vs_best` over that of the best other method;
- `ORACLE.runs_vs_tpe`: runs after which ours has the hypervolume that TPE has after 200 (100 on
  the oracle of fifty groups), over those 200;
- `ORACLE.model_error_ratio`: mean error of our latency model on 50 mixtures that it has not
  seen, after 24 runs of ours, over the one-at-a-time table's after as many;
- `ORACLE.propose_ms`: time for one proposal when 60 runs are done.

Intervals are bootstraps over seeds. The oracles of ten groups are solved by enumeration; for
fifty groups the best there is comes from descending on the truth, so regrets are lower bounds
there, alike for all. They are simulated: figures about real models come from whole jobs.
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from autotune.search.improvement import hypervolume, most_promising
from tests.benchmarks.harness import BOOTSTRAP_DRAWS, Benchmark, Figure, median_figure, start
from tests.benchmarks.oracles import Oracle, simulated
from tests.benchmarks.search_methods import (
    METHODS,
    REFERENCE,
    fitted,
    model_based,
    predicted_by_table,
)

SEEDS, QUICK_SEEDS = 20, 2
TPE_RUNS = {False: 200, True: 100}
MODEL_RUNS, UNSEEN = 24, 50
_KINDS = ("conv", *("pointwise", "depthwise", "pointwise") * 17)
_SLOW_SEEDS = 5
"""Seeds of Optuna's Gaussian process on a hundred integers, which takes minutes each."""


def main() -> int:
    benchmark = start("search", "The search against general-purpose optimizers.")
    warnings.filterwarnings("ignore", module="optuna")
    seeds = QUICK_SEEDS if benchmark.quick else SEEDS
    oracles = [ten(seed) for seed in range(1 if benchmark.quick else 4)]
    for oracle in [*oracles, *(() if benchmark.quick else (fifty(),))]:
        compare(benchmark, oracle, seeds)
        benchmark.save()
    benchmark.report()
    return 0


def ten(seed: int) -> Oracle:
    """Ten groups of FP32, 8 bits and 8-bit weights."""
    return simulated(f"ten_{seed}", kinds=_KINDS[:10], n_precisions=3, seed=seed)


def fifty() -> Oracle:
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
    runs, long_runs = (60 if large else 20), TPE_RUNS[large]
    best = best_hypervolume(oracle)
    shares: dict[str, list[list[float]]] = {}
    for name, method in METHODS.items():
        benchmark.say(f"{oracle.name}: {name}")
        length = long_runs if name in ("tpe", "ours") and not benchmark.quick else runs
        if name == "ours":
            length = min(length, 2 * runs)
        n = min(seeds, _SLOW_SEEDS) if name == "gp" and large else seeds
        shares[name] = [attained(oracle, method(oracle, length, seed), best) for seed in range(n)]
    benchmark.raw[oracle.name] = {"runs": runs, "best": best, "shares": shares}
    for key, figure in regrets(shares, runs).items():
        benchmark.add(f"{oracle.name}.{key}", figure)
    if not benchmark.quick:
        benchmark.add(f"{oracle.name}.runs_vs_tpe", runs_to_reach(shares, long_runs))
    benchmark.add(f"{oracle.name}.model_error_ratio", model_error(oracle, seeds))
    benchmark.add(f"{oracle.name}.propose_ms", proposal_time(oracle))


def best_hypervolume(oracle: Oracle) -> float:
    """By enumeration where that is possible, else by descents on the truth from many weights."""
    if np.prod([float(size) for size in oracle.sizes]) <= 1e5:
        points = np.array(list(itertools.product(*(range(size) for size in oracle.sizes))))
        return hypervolume(figures_of(oracle, points), REFERENCE)
    found = []
    for weight in np.geomspace(0.5, 500, 60):
        point = oracle.baselines()[1]
        for _ in range(4):
            for column, size in enumerate(oracle.sizes):
                options = np.repeat(point[None], size, axis=0)
                options[:, column] = np.arange(size)
                values = figures_of(oracle, options)
                point = options[int(np.argmin(values[:, 0] + weight * values[:, 1]))]
                found.append(options)
    return hypervolume(figures_of(oracle, np.vstack(found)), REFERENCE)


def attained(oracle: Oracle, points: np.ndarray, best: float) -> list[float]:
    """The share of the best hypervolume after each run."""
    figures = figures_of(oracle, points)
    return [hypervolume(figures[: n + 1], REFERENCE) / best for n in range(len(figures))]


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


def runs_to_reach(shares: Mapping[str, Sequence[Sequence[float]]], long_runs: int) -> Figure:
    """Per seed: the first run of ours with what TPE has in the end, over TPE's runs.

    Where ours does not get there within its runs, all of TPE's count.
    """
    goal = float(np.mean([run[-1] for run in shares["tpe"]]))
    reached = [
        next((n + 1 for n, share in enumerate(run) if share >= goal), long_runs) / long_runs
        for run in shares["ours"]
    ]
    return median_figure(reached)


def model_error(oracle: Oracle, seeds: int) -> Figure:
    """Mean absolute error of the latency model over the table's, on mixtures drawn at random."""
    ours, table = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(1000 + seed)
        unseen = rng.integers(oracle.sizes, size=(UNSEEN, len(oracle.sizes)))
        truth = oracle.latency(unseen)
        points = list(model_based(oracle, MODEL_RUNS, seed))
        measured = [oracle.measure(point, rng) for point in points]
        landscape = fitted(oracle, *oracle.features(), points, measured)
        ours.append(np.abs(landscape.first.predict(unseen)[0] - truth).mean())
        predicted = predicted_by_table(oracle, unseen, MODEL_RUNS, rng)
        table.append(np.abs(predicted - truth).mean())
    return ratio_of_means(np.array(ours), np.array(table))


def proposal_time(oracle: Oracle) -> Figure:
    """Milliseconds to fit both models on 60 runs and find the next point."""
    rng = np.random.default_rng(0)
    points = [*oracle.baselines(), *rng.integers(oracle.sizes, size=(60, len(oracle.sizes)))]
    figures = [oracle.measure(point, rng) for point in points]
    latency, drop = oracle.features()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        landscape = fitted(oracle, latency, drop, points, figures)
        most_promising(landscape, np.array(points), reference=REFERENCE, n=1, rng=rng)
        times.append(1e3 * (time.perf_counter() - started))
    return median_figure(times)


if __name__ == "__main__":
    sys.exit(main())
