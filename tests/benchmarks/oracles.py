"""Simulated devices and models for the search benchmark: every point has a known true figure.

An oracle is what a device and a data set would answer, without either. Its constants are
measured ones: a 3x3 convolution takes 0.3 of FP32's time at 8 bits, a depthwise one 1.35,
weight-only precisions about FP32's time and 4-bit convolution weights more (README, facts of
the kernels); a boundary costs in proportion to its tensor. On top lie what no additive model
holds: an effect of every pair of neighbours, and accuracy in which damages reinforce each other.
Latencies are measured with noise, drops on a finite set of samples, sensitivities with error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autotune.search.surrogate import Factor, Features, Link

SAMPLES = 450
NOISE = 0.01
"""Relative standard deviation of a measured latency: half of the interval that ends a
screening measurement is 2 %, which is twice this."""

_SPEEDS = {
    # share of FP32's time: at 8 bits, with 8-bit weights, with 4-bit weights
    "conv": (0.30, 1.0, 1.25),
    "pointwise": (0.55, 1.0, 1.25),
    "depthwise": (1.35, 1.0, 1.1),
}
_SENSITIVITY_ERROR = 0.4  # of the logarithm, between a sensitivity and the damage in a mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """A space of integer points and its truth.

    The first `n_groups` columns are precisions, option 0 being FP32; where the oracle prunes,
    as many more are prune ratios, option 0 being none.
    """

    name: str
    shares: np.ndarray
    speeds: np.ndarray
    damages: np.ndarray
    boundaries: np.ndarray
    hidden: np.ndarray
    ratios: tuple[float, ...]
    prune_damages: np.ndarray
    known_damages: np.ndarray
    known_prune_damages: np.ndarray

    @property
    def n_groups(self) -> int:
        """Layer groups."""
        return len(self.shares)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per column."""
        precisions = (self.speeds.shape[1],) * self.n_groups
        return precisions + ((len(self.ratios),) * self.n_groups if self.ratios else ())

    def latency(self, points: np.ndarray) -> np.ndarray:
        """True ratio to FP32's latency, `(n,)`."""
        n, groups = self.n_groups, np.arange(self.n_groups)
        precisions = points[:, :n]
        left = self._left(points)
        before = np.hstack([np.ones((len(points), 1)), left[:, :-1]])
        work = self.shares * self.speeds[groups, precisions] * left * before
        converted = (precisions[:, 1:] > 0) != (precisions[:, :-1] > 0)
        crossing = (self.boundaries * converted * left[:, :-1]).sum(axis=1)
        pairs = self.hidden[groups[:-1], precisions[:, :-1], precisions[:, 1:]].sum(axis=1)
        total: np.ndarray = work.sum(axis=1) + crossing + pairs
        return total

    def drop(self, points: np.ndarray) -> np.ndarray:
        """True accuracy drop on the samples, a multiple of 1 / SAMPLES, `(n,)`."""
        n, groups = self.n_groups, np.arange(self.n_groups)
        own = self.damages[groups, points[:, :n]]
        if self.ratios:
            own = own + self.prune_damages[groups, points[:, n:]]
        joint = own.sum(axis=1) + 0.3 * np.sqrt(own[:, 1:] * own[:, :-1]).sum(axis=1)
        saturated = 0.85 * (1 - np.exp(-joint / 0.85))  # no more than all of the accuracy is lost
        luck = 0.5 * np.sin(points @ (7.13 * np.arange(points.shape[1]) + 1.7))
        found: np.ndarray = np.round(saturated * SAMPLES + luck * points.any(axis=1)) / SAMPLES
        return found

    def measure(self, point: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
        """What one trial reports: a noisy ratio, and the drop as the search counts it."""
        ratio = float(self.latency(point[None])[0] * math.exp(rng.normal(0, NOISE)))
        return ratio, max(float(self.drop(point[None])[0]), 0.0)

    def baselines(self) -> list[np.ndarray]:
        """FP32, then every precision everywhere."""
        found = []
        for option in range(self.speeds.shape[1]):
            point = np.zeros(len(self.sizes), dtype=int)
            point[: self.n_groups] = option
            found.append(point)
        return found

    def features(self) -> tuple[Features, Features]:
        """What a search knows before it measures: time shares, tensor sizes, sensitivities."""
        return self._latency_features(), self._drop_features()

    def _left(self, points: np.ndarray) -> np.ndarray:
        if not self.ratios:
            return np.ones((len(points), self.n_groups))
        kept: np.ndarray = 1 - 0.85 * np.asarray(self.ratios)[points[:, self.n_groups :]]
        return kept

    def _latency_features(self) -> Features:
        n, n_precisions = self.n_groups, self.speeds.shape[1]
        scales = 0.5 * np.maximum(self.shares, 0.1 / n)
        thought = np.array([0.0, -0.4, *[0.0] * (n_precisions - 2)])
        factors = [
            Factor(n_options=n_precisions, effects=share * thought, scale=scale)
            for share, scale in zip(self.shares, scales, strict=True)
        ]
        sizes = self.boundaries / self.boundaries.sum()
        links = [
            Link(first=i, second=i + 1, scale=0.5 * max(sizes[i], 0.1 / n), is_boundary=True)
            for i in range(n - 1)
        ]
        if self.ratios:
            following = np.append(self.shares[1:], 0.0)
            for share in self.shares + following:
                effects = -0.85 * share * np.asarray(self.ratios)
                factors.append(
                    Factor(
                        n_options=len(self.ratios),
                        effects=effects,
                        scale=0.3 * max(share, 0.1 / n),
                        is_ordered=True,
                    )
                )
            links += [Link(first=i, second=n + i, scale=scales[i]) for i in range(n)]
            links += [Link(first=i + 1, second=n + i, scale=scales[i + 1]) for i in range(n - 1)]
            links += [Link(first=n + i, second=n + i + 1, scale=scales[i]) for i in range(n - 1)]
        return Features(factors, links)

    def _drop_features(self) -> Features:
        tables = [*self.known_damages, *(self.known_prune_damages if self.ratios else ())]
        factors = [
            Factor(
                n_options=len(table),
                effects=table,
                scale=0.7 * max(float(table.max()), 1e-4),
                is_ordered=index >= self.n_groups,
            )
            for index, table in enumerate(tables)
        ]
        links = [
            Link(
                first=i,
                second=i + 1,
                scale=math.sqrt(factors[i].scale * factors[i + 1].scale),
            )
            for i in range(self.n_groups - 1)
        ]
        return Features(factors, links)


def simulated(
    name: str,
    *,
    kinds: Sequence[str],
    n_precisions: int,
    ratios: Sequence[float] = (),
    seed: int,
) -> Oracle:
    """An oracle whose groups are of those kinds (`conv`, `pointwise`, `depthwise`)."""
    rng = np.random.default_rng(seed)
    n = len(kinds)
    weight = {"conv": 1.0, "pointwise": 0.8, "depthwise": 0.3}
    shares = rng.gamma(2.0, 1.0, n) * [weight[kind] for kind in kinds]
    shares /= shares.sum()
    speeds = np.ones((n, n_precisions))
    for option in range(1, n_precisions):
        nominal = np.array([_SPEEDS[kind][option - 1] for kind in kinds])
        speeds[:, option] = nominal * np.exp(rng.normal(0, 0.2, n))
    steps = rng.gamma(0.5, 0.06 / n, (n, n_precisions - 1)) * [1, 0.3, 4][: n_precisions - 1]
    damages = np.hstack([np.zeros((n, 1)), steps])
    sizes = rng.gamma(1.5, 1.0, n - 1)
    hidden = rng.normal(0, 0.05 / n, (n - 1, n_precisions, n_precisions))
    hidden[:, 0, :] = hidden[:, :, 0] = 0.0
    severity = rng.gamma(1.0, 0.15 / n, n)
    prune_damages = np.outer(severity, np.asarray(ratios or [0.0]) ** 2 * 4)

    def estimated(truth: np.ndarray) -> np.ndarray:
        found: np.ndarray = truth * np.exp(rng.normal(0, _SENSITIVITY_ERROR, truth.shape))
        return found

    return Oracle(
        name=name,
        shares=shares,
        speeds=speeds,
        damages=damages,
        boundaries=0.3 * sizes / sizes.sum(),
        hidden=hidden,
        ratios=tuple(ratios),
        prune_damages=prune_damages,
        known_damages=estimated(damages),
        known_prune_damages=estimated(prune_damages),
    )
