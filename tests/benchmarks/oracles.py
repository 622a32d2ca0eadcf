"""What the search benchmark searches: measured tables, and simulated devices and models.

An oracle is what a device and a data set would answer, without either: every point has a known
true figure and can be measured with noise.

- `Measured` replays a table (`search_tables.py`): real latencies and answers of real models, of
  ten groups. A run's noise is drawn from the table's own replicates.
- `Simulated` holds what no table can: fifty groups with four precisions and five prune ratios.
  Of its constants, that a 3x3 convolution takes 0.3 of FP32's time at 8 bits and a depthwise one
  1.35, comes from measurements (design.md); what the others take, how damages spread and add up,
  what boundaries cost and how far sensitivities are off are choices. On top lie an effect of
  every pair of neighbours, which no sum holds, and damages that reinforce each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from autotune.search.landscape import INT8_SAVING
from autotune.search.minima import minima
from autotune.search.priors import (
    LEAST_SHARE,
    boundary_links,
    damage_factors,
    damage_links,
    profiled,
    time_factors,
    time_scales,
)
from autotune.search.surrogate import Factor, Features, Link
from tests.benchmarks.tables import Table

SAMPLES = 450
NOISE = 0.01
"""Relative standard deviation of a simulated measurement of latency: half of the interval that
ends a screening measurement is 2 %, which is twice this."""

DROP_PER_NAT = 0.5
"""Of simulated models."""

REPLICATES_PER_RUN = 4
"""Replicates of a table that a device run's figure is the mean of: half a second of sampling,
as a screening measurement takes."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one trial reports: ratio to FP32's latency, accuracy drop (not below 0), mean KL.

    `drop_error` is the drop's standard deviation; None where all samples were seen.
    """

    ratio: float
    drop: float
    kl: float
    drop_error: float | None = None


class Oracle(Protocol):
    """A space of integer points, option 0 leaving the model as it is, and its truth."""

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per column."""

    @property
    def n_groups(self) -> int:
        """Layer groups; the first columns are their precisions."""

    @property
    def n_samples(self) -> int:
        """Images that a drop is counted on."""

    @property
    def noise(self) -> float:
        """Relative standard deviation of a run's ratio."""

    def latency(self, points: np.ndarray) -> np.ndarray:
        """True ratios, `(n,)`."""

    def drop(self, points: np.ndarray) -> np.ndarray:
        """True accuracy drops, `(n,)`; below 0 where a point happens to be better."""

    def measure(self, point: np.ndarray, rng: np.random.Generator) -> Run:
        """One device run."""

    def baselines(self) -> list[np.ndarray]:
        """FP32, then every precision everywhere."""

    def shares(self) -> np.ndarray:
        """What part of FP32's time is thought to be each column's, `(n_columns,)`."""

    def damages(self) -> list[np.ndarray]:
        """Sensitivities: the divergence of each option alone in nats, with their error."""

    def features(self, per_nat: float, uniform: Sequence[float]) -> tuple[Features, Features]:
        """What a search knows beside its runs.

        Given the drop per nat of divergence and the ratios measured of the baselines.
        """


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A table, replayed."""

    table: Table

    @property
    def name(self) -> str:
        """The model's."""
        return self.table.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per group."""
        return self.table.sizes

    @property
    def n_groups(self) -> int:
        """Layer groups."""
        return len(self.sizes)

    @property
    def n_samples(self) -> int:
        """Test images."""
        return int(self.table.right.shape[1])

    @property
    def noise(self) -> float:
        """Relative standard deviation of a run's ratio."""
        return float(self._residuals.std()) / math.sqrt(REPLICATES_PER_RUN)

    def latency(self, points: np.ndarray) -> np.ndarray:
        """The means of the points' replicates, `(n,)`."""
        found: np.ndarray = self.table.latency[self.table.index(points)]
        return found

    def drop(self, points: np.ndarray) -> np.ndarray:
        """On all test images, `(n,)`."""
        found: np.ndarray = self.table.drop[self.table.index(points)]
        return found

    def measure(self, point: np.ndarray, rng: np.random.Generator) -> Run:
        """The truth with as much noise as `REPLICATES_PER_RUN` replicates have in the mean."""
        index = int(self.table.index(point[None])[0])
        error = rng.choice(self._residuals, REPLICATES_PER_RUN).mean()
        return Run(
            ratio=float(self.table.latency[index] * math.exp(error)),
            drop=max(float(self.table.drop[index]), 0.0),
            kl=float(self.table.kl[index]),
        )

    @cached_property
    def _residuals(self) -> np.ndarray:
        """Of the replicates' logarithms around their points' means, widened for having them."""
        parts = []
        for own in self.table.replicates:
            if len(own) > 1:
                logs = np.log(own)
                parts.append((logs - logs.mean()) * math.sqrt(len(own) / (len(own) - 1)))
        return np.concatenate(parts)

    def baselines(self) -> list[np.ndarray]:
        """FP32, then each option everywhere; a group without it takes its last."""
        last = np.array(self.sizes) - 1
        return [np.minimum(option, last) for option in range(int(last.max()) + 1)]

    def shares(self) -> np.ndarray:
        """By FP32's kernel times."""
        times = self.table.kernel_ns[0]
        found: np.ndarray = times / times.sum()
        return found

    def damages(self) -> list[np.ndarray]:
        """As the compression engine tells them: each option alone, on few images."""
        found = []
        for column, size in enumerate(self.sizes):
            alone = np.zeros((size, self.n_groups), dtype=int)
            alone[:, column] = np.arange(size)
            found.append(self.table.early_kl[self.table.index(alone)])
        return found

    def features(self, per_nat: float, uniform: Sequence[float]) -> tuple[Features, Features]:
        """Kernel times of the uniform files' profiles, tensor sizes, sensitivities."""
        ratios = np.array(uniform) / uniform[0]
        times = [
            profiled(own, ratio) for own, ratio in zip(self.table.kernel_ns, ratios, strict=True)
        ]
        savings = [
            np.array([1 - times[option][c] / times[0][c] for option in range(size)])
            for c, size in enumerate(self.sizes)
        ]
        factors = time_factors(self.shares(), savings)
        damages = damage_factors([per_nat * damage for damage in self.damages()])
        return (
            Features(factors, boundary_links(self.table.tensor_bytes)),
            Features(damages, damage_links(damages)),
        )


_SPEEDS = {
    # share of FP32's time: at 8 bits, with 8-bit weights, with 4-bit weights
    "conv": (0.30, 1.0, 1.25),
    "pointwise": (0.55, 1.0, 1.25),
    "depthwise": (1.35, 1.0, 1.1),
}
_SENSITIVITY_ERROR = 0.4  # of the logarithm, between a sensitivity and the damage in a mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A space of integer points and its truth.

    The first `n_groups` columns are precisions, option 0 being FP32; where the oracle prunes,
    as many more are prune ratios, option 0 being none.
    """

    name: str
    time_shares: np.ndarray
    speeds: np.ndarray
    true_damages: np.ndarray
    boundaries: np.ndarray
    hidden: np.ndarray
    ratios: tuple[float, ...]
    prune_damages: np.ndarray
    known_damages: np.ndarray
    known_prune_damages: np.ndarray

    @property
    def n_groups(self) -> int:
        """Layer groups."""
        return len(self.time_shares)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per column."""
        precisions = (self.speeds.shape[1],) * self.n_groups
        return precisions + ((len(self.ratios),) * self.n_groups if self.ratios else ())

    @property
    def n_samples(self) -> int:
        """Images that a drop is counted on."""
        return SAMPLES

    @property
    def noise(self) -> float:
        """Relative standard deviation of a run's ratio."""
        return NOISE

    def latency(self, points: np.ndarray) -> np.ndarray:
        """True ratio to FP32's latency, `(n,)`."""
        n, groups = self.n_groups, np.arange(self.n_groups)
        precisions = points[:, :n]
        left = self._left(points)
        before = np.hstack([np.ones((len(points), 1)), left[:, :-1]])
        work = self.time_shares * self.speeds[groups, precisions] * left * before
        converted = (precisions[:, 1:] > 0) != (precisions[:, :-1] > 0)
        crossing = (self.boundaries * converted * left[:, :-1]).sum(axis=1)
        pairs = self.hidden[groups[:-1], precisions[:, :-1], precisions[:, 1:]].sum(axis=1)
        total: np.ndarray = work.sum(axis=1) + crossing + pairs
        return total

    def drop(self, points: np.ndarray) -> np.ndarray:
        """True accuracy drop on the samples, a multiple of 1 / SAMPLES, `(n,)`."""
        joint = self._joint_damage(points)
        saturated = 0.85 * (1 - np.exp(-joint / 0.85))  # no more than all of the accuracy is lost
        luck = 0.5 * np.sin(points @ (7.13 * np.arange(points.shape[1]) + 1.7))
        found: np.ndarray = np.round(saturated * SAMPLES + luck * points.any(axis=1)) / SAMPLES
        return found

    def _joint_damage(self, points: np.ndarray) -> np.ndarray:
        n, groups = self.n_groups, np.arange(self.n_groups)
        own = self.true_damages[groups, points[:, :n]]
        if self.ratios:
            own = own + self.prune_damages[groups, points[:, n:]]
        found: np.ndarray = own.sum(axis=1)
        found += 0.3 * np.sqrt(own[:, 1:] * own[:, :-1]).sum(axis=1)
        return found

    def optima(self, weights: np.ndarray) -> np.ndarray:
        """Per weight the point that minimizes latency + weight x joint damage, exactly.

        A group's precision and prune ratio together bear on those of the next group alone.
        """
        n, ratios = self.n_groups, self.ratios or (0.0,)
        grid = np.stack(np.meshgrid(range(self.speeds.shape[1]), range(len(ratios)), indexing="ij"))
        precision, pruned = grid.reshape(2, -1)
        left = 1 - 0.85 * np.asarray(ratios)[pruned]
        own = self.true_damages[:, precision]
        if self.ratios:
            own = own + self.prune_damages[:, pruned]
        work = self.time_shares[:, None] * self.speeds[:, precision] * left
        converted = (precision[:, None] > 0) != (precision > 0)
        pairs = {
            (i, i + 1): left[:, None] * (work[i + 1] + self.boundaries[i] * converted)
            + self.hidden[i][np.ix_(precision, precision)]
            + weights[:, None, None] * 0.3 * np.sqrt(np.outer(own[i], own[i + 1]))
            for i in range(n - 1)
        }
        singles = [weights[:, None] * damage for damage in own]
        singles[0] = singles[0] + work[0]
        chosen = minima(singles, pairs, range(n))
        parts = (precision[chosen], pruned[chosen])
        return np.hstack(parts if self.ratios else parts[:1])

    def measure(self, point: np.ndarray, rng: np.random.Generator) -> Run:
        """A noisy ratio, the drop as the search counts it, and the divergence behind it."""
        return Run(
            ratio=float(self.latency(point[None])[0] * math.exp(rng.normal(0, NOISE))),
            drop=max(float(self.drop(point[None])[0]), 0.0),
            kl=float(self._joint_damage(point[None])[0]) / DROP_PER_NAT,
        )

    def baselines(self) -> list[np.ndarray]:
        """FP32, then every precision everywhere."""
        found = []
        for option in range(self.speeds.shape[1]):
            point = np.zeros(len(self.sizes), dtype=int)
            point[: self.n_groups] = option
            found.append(point)
        return found

    def shares(self) -> np.ndarray:
        """Of the groups; of a prune ratio what its group and the next one have."""
        following = np.append(self.time_shares[1:], 0.0)
        pruned = self.time_shares + following
        return np.concatenate([self.time_shares, pruned if self.ratios else []])

    def damages(self) -> list[np.ndarray]:
        """Sensitivities: the divergence of each option alone in nats, with their error."""
        tables = [*self.known_damages, *(self.known_prune_damages if self.ratios else ())]
        return [table / DROP_PER_NAT for table in tables]

    def features(self, per_nat: float, uniform: Sequence[float]) -> tuple[Features, Features]:
        """Time shares, tensor sizes, sensitivities; no profiles."""
        return self._latency_features(), self._drop_features(per_nat)

    def _left(self, points: np.ndarray) -> np.ndarray:
        if not self.ratios:
            return np.ones((len(points), self.n_groups))
        kept: np.ndarray = 1 - 0.85 * np.asarray(self.ratios)[points[:, self.n_groups :]]
        return kept

    def _latency_features(self) -> Features:
        n, n_precisions = self.n_groups, self.speeds.shape[1]
        scales = time_scales(self.time_shares)
        thought = np.array([0.0, INT8_SAVING, *[0.0] * (n_precisions - 2)])
        factors = time_factors(self.time_shares, [thought] * n)
        links = boundary_links(self.boundaries)
        if self.ratios:
            for share in self.shares()[n:]:
                factors.append(
                    Factor(
                        n_options=len(self.ratios),
                        effects=-0.85 * share * np.asarray(self.ratios),
                        scale=0.3 * max(share, LEAST_SHARE),
                        is_ordered=True,
                    )
                )
            links += [Link(first=i, second=n + i, scale=scales[i]) for i in range(n)]
            links += [Link(first=i + 1, second=n + i, scale=scales[i + 1]) for i in range(n - 1)]
            links += [Link(first=n + i, second=n + i + 1, scale=scales[i]) for i in range(n - 1)]
        return Features(factors, links)

    def _drop_features(self, per_nat: float) -> Features:
        factors = [
            replace(factor, is_ordered=column >= self.n_groups)
            for column, factor in enumerate(
                damage_factors([per_nat * damage for damage in self.damages()])
            )
        ]
        return Features(factors, damage_links(factors[: self.n_groups]))


def simulated(
    name: str,
    *,
    kinds: Sequence[str],
    n_precisions: int,
    ratios: Sequence[float] = (),
    seed: int,
) -> Simulated:
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

    return Simulated(
        name=name,
        time_shares=shares,
        speeds=speeds,
        true_damages=damages,
        boundaries=0.3 * sizes / sizes.sum(),
        hidden=hidden,
        ratios=tuple(ratios),
        prune_damages=prune_damages,
        known_damages=estimated(damages),
        known_prune_damages=estimated(prune_damages),
    )
