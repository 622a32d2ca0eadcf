"""How many images a search evaluates when its candidates race, on a measured table.

The search is run anew, told what races tell it: FP32 and uniform INT8, by which the others race,
see every image, each other trial what `compression/racing.py` shows it, with the drop and the
error that it forecasts. What such a search finds is judged by the front that its races believe in,
at its true figures, against what the search finds that is told every drop as all images have it.
Of a trial's mean divergence the one on all images stands in for that on the images seen, which
tables do not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autotune.compression.racing import Race, Racing
from autotune.search.improvement import front_of, hypervolume
from autotune.search.races import race_of
from tests.benchmarks.accuracy_per_image import by
from tests.benchmarks.harness import BOOTSTRAP_DRAWS, Figure
from tests.benchmarks.oracles import Measured, Run
from tests.benchmarks.search_ours import REFERENCE, model_based


@dataclass(frozen=True, slots=True)
class Seen:
    """What a trial's race ends with: images, the drop and its standard deviation, fractions."""

    images: int
    drop: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Raced(Measured):
    """A table whose drops are what races by uniform INT8 say of them."""

    seed: int

    def measure(self, point: np.ndarray, rng: np.random.Generator) -> Run:
        """The ratio with noise, the drop as raced."""
        run, seen = super().measure(point, rng), self.seen(point)
        return Run(ratio=run.ratio, drop=max(seen.drop, 0.0), kl=run.kl, drop_error=seen.error)

    def seen(self, point: np.ndarray) -> Seen:
        """One trial's race; FP32 and uniform INT8 see every image."""
        index, total = int(self.table.index(point[None])[0]), self.n_samples
        whole = Seen(total, float(self.table.drop[index]), 1 / total)
        if not point.any() or (point == self._uniform).all():
            return whole
        racing = Racing(self._race, self.table.margins[0])
        margins = self.table.margins[index][racing.order]
        for start in range(0, total - self._race.block, self._race.block):
            now = racing.see(margins[None, start : start + self._race.block])
            if now.verdict() is not None:
                error = max(float(now.error[0]), 1.0) / total
                return Seen(start + self._race.block, float(now.drop[0]), error)
        return whole

    @cached_property
    def _race(self) -> Race:
        margins = self.table.margins[int(self.table.index(self._uniform[None])[0])]
        return replace(race_of(max_accuracy_drop=None, seed=self.seed), auxiliary=by(margins))

    @cached_property
    def _uniform(self) -> np.ndarray:
        """Uniform INT8."""
        _, uniform, *_ = self.baselines()
        return uniform


def images_ratio(oracle: Measured, searches: Sequence[np.ndarray], runs: int) -> dict[str, Figure]:
    """Images per trial over all there are, and what is found with them; means over searches.

    `images_with_front_ratio` counts what the front is shown once, before it is confirmed, too;
    `images_hypervolume` is that of the front which races believe in, over that of `searches`,
    one per seed, that were told all.
    """
    ratios, with_front, found = [], [], []
    mean_best = float(np.mean([_hypervolume(oracle, points[:runs]) for points in searches]))
    for seed in range(len(searches)):
        raced = Raced(table=oracle.table, seed=seed)
        own = model_based(raced, runs, seed)
        seen = [raced.seen(point) for point in own]
        is_member = _on_front(oracle, own, np.array([one.drop for one in seen]))
        images = np.array([one.images for one in seen])
        ratios.append(float(images.mean()) / oracle.n_samples)
        completed = np.where(_completed(oracle, own, seen), oracle.n_samples, images)
        with_front.append(float(completed.mean()) / oracle.n_samples)
        found.append(_hypervolume(oracle, own[is_member]))
    return {
        "images_ratio": _mean(ratios),
        "images_with_front_ratio": _mean(with_front),
        "images_hypervolume": _mean([own / mean_best for own in found]),
    }


def _on_front(oracle: Measured, points: np.ndarray, drops: np.ndarray) -> np.ndarray:
    """Which points are not dominated at these drops, `(n,)`."""
    figures = np.column_stack([oracle.latency(points), drops])
    members = front_of(figures)
    return np.array([any((row == member).all() for member in members) for row in figures])


def _completed(oracle: Measured, points: np.ndarray, seen: Sequence[Seen]) -> np.ndarray:
    """Which points have been on the front until all that are on it were shown every image."""
    drops, truth = np.array([one.drop for one in seen]), oracle.drop(points)
    is_complete = np.zeros(len(points), dtype=bool)
    while (new := _on_front(oracle, points, drops) & ~is_complete).any():
        is_complete |= new
        drops = np.where(is_complete, truth, drops)
    return is_complete


def _hypervolume(oracle: Measured, points: np.ndarray) -> float:
    figures = np.column_stack([oracle.latency(points), np.maximum(oracle.drop(points), 0.0)])
    return hypervolume(figures, REFERENCE)


def _mean(values: Sequence[float]) -> Figure:
    rng = np.random.default_rng(0)
    draws = rng.choice(values, size=(BOOTSTRAP_DRAWS, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Figure(value=float(np.mean(values)), low=float(low), high=float(high), n=len(values))
