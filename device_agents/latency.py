"""Latency statistics: from alternating blocks of samples to a ratio that can be trusted.

Owns the estimator (ratio to the reference), its interval (block bootstrap) and the rules that
stop a measurement or call it unsteady. Pure numpy: no clock, no runtime, no protocol. Timing
lives in `measurement_child.py`; the child sends what `summarize` returns.

Why blocks: on a shared machine the plain median of 20 runs spreads by 6 % and more, and slow
drift moves candidate and reference together, so their ratio spreads far less. What is left
comes in runs of slow blocks, which is why the bootstrap resamples runs and not single blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE_LEVEL = 0.95
N_RESAMPLES = 1000
DRIFT_LIMIT = 0.03
"""A reference that moves by more than this fraction within a measurement has drifted."""
WIDE_INTERVAL_FACTOR = 3.0
"""An interval wider than this many targets at the time cap makes a report unsteady."""
REFERENCE_SPREAD_LIMIT = 0.25
"""Interquartile range of the reference's block medians, as a fraction of their median, above
which the machine was busy with something else. On a 2-core machine with both cores loaded the
range stays below 0.2 and the ratio still holds; beyond, its bias is no longer known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedBlock:
    """Samples of one model taken one after the other, in the order of time.

    `samples_ns` are nanoseconds per inference, positive and finite; where calls were grouped a
    sample is the mean of its group. `median_ns` is their median, kept because it is what every
    statistic below starts from.
    """

    subject: Literal["candidate", "reference"]
    samples_ns: tuple[int, ...]
    median_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bounds of a two-sided interval; `half_width` is a fraction of `center`."""

    low: float
    high: float
    center: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width as a fraction of its center; smaller is better."""
        return (self.high - self.low) / 2 / self.center


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """The statistics of a measurement; the fields mean what `protocol.LatencyReport` says."""

    p50_ns: float
    p50_low_ns: float
    p50_high_ns: float
    p90_ns: float
    p99_ns: float
    ratio: float
    ratio_low: float
    ratio_high: float
    confidence_level: float
    reference_p50_ns: float
    reference_latency_ns: float
    n_samples: int
    n_blocks: int
    is_steady: bool
    unsteady_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingRule:
    """When to stop sampling: narrow enough, or out of time.

    The interval is looked at after `min_blocks` candidate blocks and then each time their
    number has grown by a quarter. A look at every block would stop at the first lucky one:
    in simulation that costs ten points of coverage, the geometric schedule about two.
    """

    target_half_width: float
    min_blocks: int
    growth: float = 1.25

    def first_look(self) -> int:
        """The number of candidate blocks at the first look."""
        return max(4, self.min_blocks)

    def next_look(self, n_blocks: int) -> int:
        """The number of candidate blocks at the look after one with `n_blocks`."""
        return max(n_blocks + 1, int(np.ceil(n_blocks * self.growth)))

    def is_satisfied(self, interval: Interval) -> bool:
        """The interval is as narrow as was asked for."""
        return interval.half_width <= self.target_half_width


def candidate_ratios(is_candidate: NDArray[np.bool_], medians_ns: Floats) -> Floats:
    """Each candidate block's median over the mean of its neighbouring reference blocks'.

    Args:
        is_candidate: shape `(n_blocks,)`, in order of time.
        medians_ns: shape `(n_blocks,)`, the blocks' medians.

    Returns:
        Shape `(n_candidates,)`, in order of time; below 1 the candidate is faster. The
        neighbours are the nearest reference blocks before and after; at an end there is one.

    Raises:
        ValueError: if there is no reference block or no candidate block.
    """
    reference_at = np.flatnonzero(~is_candidate)
    candidate_at = np.flatnonzero(is_candidate)
    if reference_at.size == 0 or candidate_at.size == 0:
        raise ValueError("a ratio needs at least one block of the candidate and of the reference")
    after = np.searchsorted(reference_at, candidate_at)
    before = after - 1
    last = reference_at.size - 1
    left = medians_ns[reference_at[np.where(before < 0, 0, before)]]
    right = medians_ns[reference_at[np.where(after > last, last, after)]]
    return medians_ns[candidate_at] * 2 / (left + right)


def block_bootstrap_interval(
    values: Floats,
    *,
    seed: int,
    run_length: int | None = None,
    n_resamples: int = N_RESAMPLES,
    confidence_level: float = CONFIDENCE_LEVEL,
) -> Interval:
    """The percentile interval of the median of dependent values.

    Circular block bootstrap (Politis and Romano 1992): runs of `run_length` neighbouring
    values are drawn with replacement until the sample is as long as the original.

    Args:
        values: shape `(n,)`, in order of time, n >= 1. With n = 1 the interval is a point.
        seed: the same values and seed give the same interval.
        run_length: None takes n ** (1/3), the order that Hall, Horowitz and Jing (1995) derive,
            and at least 2 because neighbouring ratios share a reference block.
        n_resamples: with 1000 the bounds wander by a twentieth of the half width.
        confidence_level: between 0 and 1.
    """
    n = values.size
    length = run_length or max(2, round(n ** (1 / 3)))
    n_runs = -(-n // length)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, n, size=(n_resamples, n_runs, 1))
    picks = ((starts + np.arange(length)) % n).reshape(n_resamples, -1)[:, :n]
    medians = np.median(values[picks], axis=1)
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high), center=float(np.median(values)))


def reference_drift(medians_ns: Floats) -> float:
    """How far the reference moved from the first to the last third, as a fraction.

    `medians_ns` has shape `(n,)`, in order of time. Positive: it became slower. A move within
    three of its own standard errors is noise and counts as 0, as does everything below nine
    blocks: a busy machine is not a drifting one. The error comes from the differences between
    neighbouring ninths (von Neumann 1941), which a drift of the whole hardly touches and which
    see the busy spells that single blocks do not.
    """
    if medians_ns.size < 9:
        return 0.0
    ninths = np.array([np.median(part) for part in np.array_split(medians_ns, 9)])
    # 1.4826 makes a median of absolute values a standard deviation and 1.2533 is the standard
    # error of a median, both for the normal distribution. The roots of 2 of a difference of
    # neighbours and of a difference of thirds cancel.
    noise = 1.4826 * 1.2533 * float(np.median(np.abs(np.diff(ninths)))) / np.sqrt(3)
    first, last = float(np.median(ninths[:3])), float(np.median(ninths[-3:]))
    return (last - first) / first if abs(last - first) > 3 * noise else 0.0


def ratio_interval(blocks: Sequence[TimedBlock], *, seed: int) -> Interval:
    """The ratio of candidate to reference with its interval; below 1 is faster."""
    is_candidate, medians = _columns(blocks)
    return block_bootstrap_interval(candidate_ratios(is_candidate, medians), seed=seed)


def summarize(
    blocks: Sequence[TimedBlock],
    *,
    seed: int,
    target_half_width: float,
    reference_latency_ns: float | None,
) -> LatencySummary:
    """All statistics of a finished measurement.

    `reference_latency_ns` is the reference's calibrated latency on this device; None takes the
    median of its samples here. All latencies are scaled by calibrated over measured reference.

    Raises:
        ValueError: if a subject has no block.
    """
    is_candidate, medians = _columns(blocks)
    ratios = candidate_ratios(is_candidate, medians)
    interval = block_bootstrap_interval(ratios, seed=seed)
    reference_ns = float(np.median(medians[~is_candidate]))
    calibrated_ns = reference_latency_ns or reference_ns
    samples = np.concatenate([b.samples_ns for b in blocks if b.subject == "candidate"])
    p90, p99 = np.quantile(samples, [0.9, 0.99]) * (calibrated_ns / reference_ns)
    reason = unsteady_reason(interval, medians[~is_candidate], target_half_width=target_half_width)
    return LatencySummary(
        p50_ns=interval.center * calibrated_ns,
        p50_low_ns=interval.low * calibrated_ns,
        p50_high_ns=interval.high * calibrated_ns,
        p90_ns=float(p90),
        p99_ns=float(p99),
        ratio=interval.center,
        ratio_low=interval.low,
        ratio_high=interval.high,
        confidence_level=CONFIDENCE_LEVEL,
        reference_p50_ns=reference_ns,
        reference_latency_ns=calibrated_ns,
        n_samples=sum(len(b.samples_ns) for b in blocks),
        n_blocks=len(blocks),
        is_steady=reason is None,
        unsteady_reason=reason,
    )


def unsteady_reason(
    interval: Interval, reference_medians_ns: Floats, *, target_half_width: float
) -> str | None:
    """Why a report should not be ranked, or None.

    An interval that misses its target at the time cap is still an answer, and an honest one.
    It is not one any more where it is `WIDE_INTERVAL_FACTOR` targets wide, or where the
    reference itself spread by more than `REFERENCE_SPREAD_LIMIT`.
    """
    limit = WIDE_INTERVAL_FACTOR * target_half_width
    if interval.half_width > limit:
        return (
            f"the interval is ±{interval.half_width:.1%} wide at the time cap, "
            f"more than {WIDE_INTERVAL_FACTOR:g} times the target of ±{target_half_width:.1%}"
        )
    spread = reference_spread(reference_medians_ns)
    if spread > REFERENCE_SPREAD_LIMIT:
        return (
            f"the reference spread by {spread:.0%} (interquartile range), more than "
            f"{REFERENCE_SPREAD_LIMIT:.0%}: the device was busy with something else"
        )
    return None


def reference_medians(blocks: Sequence[TimedBlock]) -> Floats:
    """The reference blocks' medians in order of time, shape `(n,)`."""
    return np.array([b.median_ns for b in blocks if b.subject == "reference"], dtype=np.float64)


def reference_spread(medians_ns: Floats) -> float:
    """Interquartile range of the block medians as a fraction of their median."""
    low, middle, high = np.quantile(medians_ns, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def as_unsteady(summary: LatencySummary, reason: str) -> LatencySummary:
    """The same figures, marked as not to be ranked."""
    return replace(summary, is_steady=False, unsteady_reason=reason)


def _columns(blocks: Sequence[TimedBlock]) -> tuple[NDArray[np.bool_], Floats]:
    is_candidate = np.array([b.subject == "candidate" for b in blocks], dtype=np.bool_)
    return is_candidate, np.array([b.median_ns for b in blocks], dtype=np.float64)
