"""What the search benchmark searches: measured tables, and simulated devices and models.

An oracle is what a device and a data set would answer, without either: every point has a known
true figure and can be measured with noise.

- `Measured` replays a table (`search_tables.py`): real latencies and answers of real models, of
  ten groups. A run's noise is drawn from the table's own replicates.
- `Simulated` holds what no table can: fifty groups with four precisions and five prune ratios.
  Calibrated on real profiles are how time is shared among groups and what 8 bits make of it
  (`_KINDS`), what boundaries cost and how little of that the sizes of tensors tell
  (`_BOUNDARY`), and how far the uniform file's profile and sensitivities are off
  (`_PROFILE_ERROR`, `_SENSITIVITY_ERROR`); what fewer bits in weights alone cost, how damages
  spread and add up and what pruning does are choices. On top lie an effect of every pair of
  neighbours, which no sum holds, and damages that reinforce each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from autotune.search.features import Factor, Features, Link
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What kernels of one kind take.

    `share` is of FP32's time, over that of a mean group, `share_spread` its standard deviation
    over its mean; `int8` is the time at 8 bits over FP32's, a geometric mean, `int8_spread` the
    standard deviation of its logarithm; `fewer` the times with 8-bit and 4-bit weights alone.
    """

    share: float
    share_spread: float
    int8: float
    int8_spread: float
    fewer: tuple[float, float]


_KINDS = {
    "stem": _Kind(share=1.2, share_spread=0.4, int8=1.66, int8_spread=0.17, fewer=(1.0, 1.25)),
    "conv": _Kind(share=1.07, share_spread=0.9, int8=0.18, int8_spread=0.36, fewer=(1.0, 1.25)),
    "pointwise": _Kind(
        share=1.22, share_spread=0.58, int8=0.64, int8_spread=0.39, fewer=(1.0, 1.25)
    ),
    "depthwise": _Kind(
        share=0.52, share_spread=0.32, int8=1.16, int8_spread=0.22, fewer=(1.0, 1.1)
    ),
}
"""From the profiles of the FP32 and the uniform INT8 files of whole jobs on x86 with VNNI
(onnxruntime 1.31, one thread, 64x64), each scaled to its file's latency: `stem`, the first
convolution, `pointwise` and `depthwise` are means over mobilenet_v2 (five jobs), mobilenet_v3_small
and efficientnet_b0, spreads those within a model; `conv` are the eleven 3x3 groups of resnet18.
`fewer` are choices, with a spread of `_FEWER_SPREAD`, so that every precision is worth a try."""

_FEWER_SPREAD = 0.2

_BOUNDARY = 0.0095
"""Of FP32's latency, what one boundary costs in the mean. The measured tables fit one cost for
each of nine boundaries beside one for each choice; over their tensors' bytes these are 0.0061 +
0.125 per MB (mobilenet_v2), 0.0070 + 0.238 (mobilenet_v3_small) and 0.0053 + 0.025
(efficientnet_b0), and those models' groups have tensors of 50, 12 and 39 kB in the mean."""

_BOUNDARY_BY_BYTES, _BYTES_SPREAD, _BOUNDARY_SPREAD = 1 / 3, 1.4, 1.1
"""The part of that which goes with the bytes; the standard deviations of bytes and of the other
part over their means. In the tables bytes explain a third of how boundaries differ, whose costs
spread by 0.9 of their mean."""

_PROFILE_ERROR = 0.26
"""Of the logarithm, between a group's time at 8 bits in the profile of the uniform file and what
it takes in mixtures: in the tables 0.22, 0.22, 0.27 and 0.32 within a model, over 39 groups."""

_SENSITIVITY_ERROR = 0.4
"""Of the logarithm, between a sensitivity and the damage in a mixture. In the tables, within a
model: the divergence of a choice alone on 64 images against what it adds to mixtures whose other
choices diverge by 0.03 nats at most (0.34, 23 groups) or by 0.1 (0.54); past that answers saturate,
which is counted by itself."""


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
    tensor_sizes: np.ndarray
    boundaries: np.ndarray
    hidden: np.ndarray
    ratios: tuple[float, ...]
    prune_damages: np.ndarray
    profiled_int8: np.ndarray
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
        """Kernel times of the uniform files' profiles, tensor sizes, sensitivities."""
        int8 = profiled(self.profiled_int8, uniform[1] / uniform[0])
        return self._latency_features(1 - int8 / self.time_shares), self._drop_features(per_nat)

    def _left(self, points: np.ndarray) -> np.ndarray:
        if not self.ratios:
            return np.ones((len(points), self.n_groups))
        kept: np.ndarray = 1 - 0.85 * np.asarray(self.ratios)[points[:, self.n_groups :]]
        return kept

    def _latency_features(self, int8_savings: np.ndarray) -> Features:
        n, n_precisions = self.n_groups, self.speeds.shape[1]
        scales = time_scales(self.time_shares)
        savings = np.zeros((n, n_precisions))
        savings[:, 1] = int8_savings
        factors = time_factors(self.time_shares, list(savings))
        links = boundary_links(self.tensor_sizes)
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
    """An oracle whose groups are of those kinds (`stem`, `conv`, `pointwise`, `depthwise`)."""
    rng = np.random.default_rng(seed)
    n = len(kinds)
    own = [_KINDS[kind] for kind in kinds]
    shares = _positive(rng, np.array([k.share_spread for k in own])) * [k.share for k in own]
    shares /= shares.sum()
    nominal = np.array([(1.0, k.int8, *k.fewer) for k in own])[:, :n_precisions]
    spread = np.array([(0.0, k.int8_spread, *[_FEWER_SPREAD] * 2) for k in own])[:, :n_precisions]
    speeds = nominal * np.exp(spread * rng.normal(size=nominal.shape))
    steps = rng.gamma(0.5, 0.06 / n, (n, n_precisions - 1)) * [1, 0.3, 4][: n_precisions - 1]
    damages = np.hstack([np.zeros((n, 1)), steps])
    sizes = _positive(rng, np.full(n - 1, _BYTES_SPREAD))
    other = _positive(rng, np.full(n - 1, _BOUNDARY_SPREAD))
    by_bytes = _BOUNDARY_BY_BYTES * sizes / sizes.mean()
    # Together 0.7 % of FP32's latency for fifty groups; what sums leave of the tables beyond the
    # noise of their points is 0, 0, 0.6 and 1.0 %.
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
        tensor_sizes=sizes,
        boundaries=_BOUNDARY * (by_bytes + (1 - _BOUNDARY_BY_BYTES) * other),
        hidden=hidden,
        ratios=tuple(ratios),
        prune_damages=prune_damages,
        known_damages=estimated(damages),
        known_prune_damages=estimated(prune_damages),
        profiled_int8=shares * speeds[:, 1] * np.exp(rng.normal(0, _PROFILE_ERROR, n)),
    )


def _positive(rng: np.random.Generator, spread: np.ndarray) -> np.ndarray:
    """Gamma variables of mean 1 and those standard deviations."""
    shape = 1 / spread**2
    found: np.ndarray = rng.gamma(shape) / shape
    return found
