"""How many images a search evaluates when its candidates race, on a measured table.

Each trial of a search is raced as `search/evaluation.py` does it: baselines see every image, the
others stop where a drop beyond the limit is certain, and what is on the front in the end is shown
the rest. Racing itself is `compression/racing.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.compression.racing import Race, Racing
from autotune.search.evaluation import race_of
from autotune.search.improvement import front_of, hypervolume
from tests.benchmarks.harness import BOOTSTRAP_DRAWS, Figure
from tests.benchmarks.oracles import Measured
from tests.benchmarks.search_methods import REFERENCE

LEAST_SHARE = 0.99


def images_ratio(oracle: Measured, searches: Sequence[np.ndarray], runs: int) -> Figure:
    """Images per trial over all there are, the mean over searches with its interval.

    Raises:
        ValueError: a search lost more than a hundredth of its hypervolume to a wrong verdict.
    """
    ratios, shares = zip(
        *(raced(oracle, points[:runs], seed) for seed, points in enumerate(searches)), strict=True
    )
    if float(np.mean(shares)) < LEAST_SHARE:
        raise ValueError(f"racing left {np.mean(shares):.3f} of the hypervolume")
    rng = np.random.default_rng(0)
    draws = rng.choice(ratios, size=(BOOTSTRAP_DRAWS, len(ratios))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Figure(value=float(np.mean(ratios)), low=float(low), high=float(high), n=len(ratios))


def raced(oracle: Measured, points: np.ndarray, seed: int) -> tuple[float, float]:
    """Images per trial over all, and the share of the hypervolume that is found all the same."""
    right = oracle.table.right[oracle.table.index(points)].astype(int)
    lost = oracle.table.right[0].astype(int) - right
    used, seen_drop = [], []
    race = race_of(max_accuracy_drop=None, seed=seed)
    total = lost.shape[1]
    for number, differences in enumerate(lost):
        is_baseline = number < len(oracle.baselines())
        n = total if is_baseline else _stop(differences[race.order(total)], race)
        used.append(n)
        seen_drop.append(differences[race.order(total)][:n].mean())
    ratios = oracle.latency(points)
    full = np.column_stack([ratios, np.maximum(lost.mean(axis=1), 0.0)])
    seen = np.column_stack([ratios, np.maximum(seen_drop, 0.0)])
    members = front_of(seen)
    on_front = [any((row == member).all() for member in members) for row in seen]
    images = [total if member else n for n, member in zip(used, on_front, strict=True)]
    found = hypervolume(full[on_front], REFERENCE) / hypervolume(full, REFERENCE)
    return float(np.mean(images)) / total, found


def _stop(differences: np.ndarray, race: Race) -> int:
    """Images after which a race has its verdict; all where it has none."""
    racing = Racing(race, len(differences))
    for start in range(0, len(differences), race.block):
        if racing.verdict(differences[start : start + race.block]) is not None:
            return min(start + race.block, len(differences))
    return len(differences)
