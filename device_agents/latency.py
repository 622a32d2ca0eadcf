"""Latency statistics: from alternating blocks of samples to a ratio that can be trusted.

Owns the ratio's interval (the wider of a block bootstrap over pairs and Student's over sittings)
and the rules that stop a measurement or call it unsteady. Pure numpy: no clock, no runtime, no
protocol. The estimator is `undisturbed.py`'s, the timed loop `sampling.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from device_agents.undisturbed import (
    Floats,
    Pairs,
    Timed,
    Weighted,
    bootstrap,
    run_length,
    undisturbed_share,
)

CONFIDENCE_LEVEL = 0.95
TAIL = (1 - CONFIDENCE_LEVEL) / 2
"""Probability that one of the two bounds is passed."""
NORMAL_QUANTILE = 1.959964
"""The normal distribution's quantile for `CONFIDENCE_LEVEL`, two-sided."""
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)
"""Student's quantiles for `CONFIDENCE_LEVEL`, two-sided, at 1, 2, ... degrees of freedom."""
MAX_PARTS = len(STUDENT) + 1
"""Parts of a measurement whose ratios are held against each other; whole sittings each. With more
of them a ratio that changes half way would not be seen."""
SESSION_SPREAD = 0.028
"""Standard deviation of the ratio of two sessions of INT8 mobilenet_v2 at 224 pixels to two of its
FP32 file, from where they happen to lie in memory: on an idle x86 core 0.030 from sitting to
sitting with three pairs each, and 0.011 to 0.023 from pair to pair, 0.06 and more while the host is
busy. Sittings of one process differ as much as those of fresh ones, and means of six by no more
than independent sittings would (0.011)."""
NEIGHBOUR_SHARE = 1.0
"""By how much a ratio may move with its reference's latency, as a share, while that moves little.
What a neighbour on the host takes of cache and memory for minutes on end slows undisturbed blocks
too, by time rather than by a share of it: a candidate that fits into the core's own cache does not
move at all when its reference does, and its ratio moves by all of that. Over minutes beside a
loaded core the ratio of INT8 mobilenet_v2 moved by -0.9 of what FP32 did at 64 pixels and by 0.1 to
0.5 at 224, mobilenet_v3_small by -0.4, resnet18 by 0.9, while FP32 moved by 0.14, 0.03 to 0.04,
0.06 and 0.01 (standard deviations of logarithms). Of 60 and 40 intervals in two such hours, of
measurements that did not wait for rest, 47 and 80 % hold the hour's ratio without this, 84 and 96 %
with it."""
NEIGHBOUR_CHANGE = 0.1
"""How far, in logarithms, neighbours move the reference's latency for minutes on end: 0.08 to 0.15
from end to end in most hours, 0.18 in one. A choice."""
STATE_SHARE = 0.5
"""The same share where the reference moves by more, which is the clock's or the processor's time:
these slow all that is computed alike. While FP32 mobilenet_v2 was slower by 0.30 its ratio was
larger by 0.07. A choice."""
ITSELF_SHARE = 0.2
"""The same share where the candidate is the reference itself, and moves as it does: a device that
is not at rest is less even than a few seconds tell. Of 80 intervals of FP32 over itself, in two
restless hours, 4 leave out 1 without it, none with it."""
EARLY_SITTINGS = 9
"""Before a look that has to find the interval narrower than `EARLY_SHARE` of what is asked: a model
whose pairs hardly differ is known by then. As many as show a trend (`TREND_PARTS`). The bounds of
its tail are wider (`quantiles.py`), so one that is asked about that goes on."""
EARLY_SHARE = 0.5
"""Of nine sittings with a pair each that differ by 0.005, 0.008 and 0.012, 99, 73 and 22 % look as
narrow as ±1 %, and of their intervals 98, 99 and 93 % hold the ratio; of some that differ by
`SESSION_SPREAD` one in 400 looks so by luck (simulations of 1,500 and 12,000)."""
MIN_SITTINGS = 12
"""Before the first full look. Of twelve sittings that differ by `SESSION_SPREAD`, with a pair each
that is off by as much, the mean is known to ±2.2 %; what looks as narrow before that is luck. With
a first look after four sittings of two, half of the measurements that stopped early stated an
interval with the long-run ratio (18 of 33), of those that went on nine in ten (43 of 47)."""
TREND_PARTS = 9
"""Parts of a measurement whose medians are put in order to see a trend."""
TREND_SCORE = 28
"""Of 36 pairs of parts, how many more must rise than fall, or fall than rise: 0.24 % of all
orders of nine unrelated values do (Kendall 1938, exact)."""
LARGEST_TREND = 0.03
"""Fraction by which the reference may change over a measurement; past it a trend is a drift."""
WIDEST_STEADY_INTERVAL = 0.2
"""Half width of the ratio's interval, as a fraction, past which a report does not rank: an
interval of ±20 % spans what quantization gains or loses on many models, so it orders nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedBlock:
    """Samples of one model taken one after the other, in the order of time.

    `samples_ns` are nanoseconds per inference, positive and finite; where calls were grouped a
    sample is the mean of its group. `median_ns` is their median, by which a drift is seen.
    `energy_joules` was spent over the block's `n_calls` inferences; None without a meter. Blocks
    with the same number of `sitting` ran in the same two sessions.
    """

    subject: Literal["candidate", "reference"]
    samples_ns: tuple[int, ...]
    median_ns: float
    n_calls: int = 0
    energy_joules: float | None = None
    sitting: int = 0


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
    reference_rest_ns: float | None
    n_samples: int
    n_blocks: int
    undisturbed_share: float
    is_steady: bool
    unsteady_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingRule:
    """When to stop sampling: narrow enough, or out of time.

    The interval is looked at after `EARLY_SITTINGS` sittings, for one that is very narrow, after
    `MIN_SITTINGS` and then each time their number has grown by half. Stopping at the first narrow
    interval favours the ones that are narrow by luck; the fewer the looks, the fewer of these.
    """

    target_half_width: float
    growth: float = 1.5

    def next_look(self, n_sittings: int) -> int:
        """The number of sittings at the look after one with `n_sittings`."""
        if n_sittings < MIN_SITTINGS:
            return MIN_SITTINGS
        return max(n_sittings + 1, math.ceil(n_sittings * self.growth))

    def is_satisfied(self, interval: Interval, n_sittings: int) -> bool:
        """The interval of so many sittings is as narrow as was asked for."""
        share = EARLY_SHARE if n_sittings < MIN_SITTINGS else 1.0
        return interval.half_width <= share * self.target_half_width


def small_sample_factor(n: int) -> float:
    """By how much to widen a percentile bootstrap interval of `n` values; towards 1.1.

    A percentile interval knows neither the degrees of freedom that centring on the sample took
    nor that the scale was estimated. Both are mended as for a mean of `n / run_length` runs: the
    root of `n / (n - run_length)`, and Student's over the normal quantile (Abramowitz and Stegun
    26.7.5). The last 1.1 pays for the looks of `StoppingRule`. With the three, intervals of 95 %
    cover 94 to 98 % of 300 in simulations of quiet, noisy, disturbed and correlated devices that
    stop at the target, and without the three 90 to 94 %.
    (`tests/unit/test_latency.py` repeats it.)

    >>> round(small_sample_factor(9), 2), round(small_sample_factor(1000), 2)
    (1.86, 1.12)
    """
    length = run_length(n)
    if n <= length:
        return math.inf
    freedom = max(2.0, n / length - 1)
    z = NORMAL_QUANTILE
    student = z + (z**3 + z) / (4 * freedom)
    student += (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    student += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return 1.1 * math.sqrt(n / (n - length)) * student / z


def bootstrap_half_width(series: Weighted, *, seed: int) -> float:
    """Half the width of an interval of the weighted mean of dependent values.

    A percentile interval of `bootstrap`, widened by `small_sample_factor` of as many values as the
    weighted ones are worth, and as far on the one side as on the other: no resample is faster than
    the fastest blocks seen, while the device may be. Infinite where they are worth two or fewer.
    """
    factor = small_sample_factor(series.effective_size)
    if math.isinf(factor):
        return math.inf
    away = bootstrap(series, seed=seed)
    return factor * float(np.abs(quantiles(away, [TAIL, 1 - TAIL])).max())


def sitting_half_width(pairs: Pairs) -> float:
    """Half the width of an interval that sees what differs from sitting to sitting.

    In every sitting both models are loaded anew, because a session is faster or slower for as
    long as it lasts, by where it lies in memory. In simulation with sessions that spread by
    `SESSION_SPREAD`, intervals from one pair of sessions that stop at ±1 % cover the ratio in
    a third of the cases. The sittings, whole ones joined to `MAX_PARTS` at most that count alike,
    give independent ratios, and how far these are from that of all pairs the standard error of it
    (batch means: Conway 1963; of parts of unequal weight: Cochran 1977, section 6.4). A ratio that
    changes half way shows here too. Infinite for a single sitting.
    """
    series = pairs.log_ratios
    parts = sitting_parts(pairs.sittings, pairs.weights)
    if len(parts) == 1:
        return math.inf
    away = np.array([series.mean(part) for part in parts]) - series.mean()
    shares = np.array([pairs.weights[part].sum() for part in parts]) / pairs.weights.sum()
    error = math.sqrt(len(parts) / (len(parts) - 1) * float(np.square(shares * away).sum()))
    return STUDENT[len(parts) - 2] * error


def sitting_parts(
    sittings: NDArray[np.int_], weights: Floats | None = None
) -> list[NDArray[np.int_]]:
    """The places of each of at most `MAX_PARTS` parts in order of time, whole sittings each.

    All of about the same weight; without weights, of about as many places.
    """
    owners = np.searchsorted(distinct(sittings), sittings)
    heaps = np.bincount(owners, weights)
    middles = (np.cumsum(heaps) - heaps / 2) / heaps.sum()
    numbers = np.minimum(np.floor(MAX_PARTS * middles), MAX_PARTS - 1)[owners]
    return [np.flatnonzero(numbers == number) for number in sorted(set(numbers.tolist()))]


def ratio_interval(blocks: Sequence[Timed], *, seed: int) -> Interval:
    """The ratio of candidate to reference with its interval; below 1 is faster.

    The wider of two intervals: `bootstrap_half_width` for what changes from pair to pair,
    `sitting_half_width` for what changes from sitting to sitting. With fewer than `MIN_SITTINGS`
    sittings, which is all that a short time cap leaves of a slow model, Student's quantile makes
    the latter very wide under noise: there it is bounded by the former together with
    `SESSION_SPREAD`. A ratio with a `trend`, of a candidate that heats up alone, is not known
    better than by all of the trend.

    Raises:
        ValueError: if the blocks do not come in pairs.
    """
    return _interval(Pairs.of(blocks), seed=seed)


def _interval(pairs: Pairs, *, seed: int) -> Interval:
    center, fast = pairs.log_ratios.mean(), bootstrap_half_width(pairs.log_ratios, seed=seed)
    slow, n_sittings = sitting_half_width(pairs), distinct(pairs.sittings).size
    known = math.inf
    if n_sittings < MIN_SITTINGS:
        known = NORMAL_QUANTILE * SESSION_SPREAD / math.sqrt(n_sittings)
    half = max(fast, min(slow, math.hypot(fast, known)), abs(trend(pairs.log_ratios.values)))
    return Interval(low=_exp(center - half), high=_exp(center + half), center=math.exp(center))


def summarize(
    blocks: Sequence[TimedBlock],
    *,
    seed: int,
    reference_latency_ns: float | None,
    reference_rest_ns: float | None = None,
    is_reference: bool = False,
) -> LatencySummary:
    """All statistics of a finished measurement.

    `reference_latency_ns` is the reference's calibrated latency on this device; None takes that of
    its undisturbed blocks here. All latencies are scaled by calibrated over measured reference.
    `reference_rest_ns` is what it takes at rest, None where that is not known: bounds are
    `state_uncertainty` further apart, and those in ns hold for both levels (`level_bounds_ns`);
    `is_reference` says that the candidate is the same file run the same way. Whether the
    measurement is steady is not a matter of that: it may be all that this device has to offer now.

    Raises:
        ValueError: if the blocks do not come in pairs.
    """
    pairs = Pairs.of(blocks)
    measured = _interval(pairs, seed=seed)
    reference_ns = pairs.undisturbed_ns("reference")
    calibrated_ns = reference_latency_ns or reference_ns
    apart = math.exp(
        state_uncertainty(reference_ns, calibrated_ns, reference_rest_ns, is_reference=is_reference)
    )
    interval = replace(measured, low=measured.low / apart, high=measured.high * apart)
    low_ns, high_ns = level_bounds_ns(reference_ns, calibrated_ns, reference_rest_ns)
    samples = np.concatenate([b.samples_ns for b in blocks if b.subject == "candidate"])
    p90, p99 = quantiles(samples, [0.9, 0.99]) * (calibrated_ns / reference_ns)
    reason = unsteady_reason(measured)
    return LatencySummary(
        p50_ns=interval.center * calibrated_ns,
        p50_low_ns=interval.low * low_ns,
        p50_high_ns=interval.high * high_ns,
        p90_ns=float(p90),
        p99_ns=float(p99),
        ratio=interval.center,
        ratio_low=interval.low,
        ratio_high=interval.high,
        confidence_level=CONFIDENCE_LEVEL,
        reference_p50_ns=reference_ns,
        reference_latency_ns=calibrated_ns,
        reference_rest_ns=reference_rest_ns,
        n_samples=sum(len(b.samples_ns) for b in blocks),
        n_blocks=len(blocks),
        undisturbed_share=undisturbed_share(samples, pairs.undisturbed_ns("candidate")),
        is_steady=reason is None,
        unsteady_reason=reason,
    )


def state_uncertainty(
    reference_ns: float,
    calibrated_ns: float,
    reference_rest_ns: float | None = None,
    *,
    is_reference: bool = False,
) -> float:
    """What is not known of a ratio because the device is not at rest.

    The half width in logarithms, by how much slower than at rest the reference is; where it is not
    known what that takes there, by how far it is from its calibrated latency, in either direction.
    `NEIGHBOUR_SHARE` of that as far as a neighbour may cause it, and `STATE_SHARE` of all of it
    where that is more; `ITSELF_SHARE` where the candidate `is_reference`.

    >>> [round(state_uncertainty(math.exp(moved), 1.0), 3) for moved in (0.0, -0.05, 0.1, 0.7)]
    [0.0, 0.05, 0.1, 0.35]
    >>> [round(state_uncertainty(math.exp(moved), 2.0, 1.0), 3) for moved in (-0.05, 0.05)]
    [0.0, 0.05]
    """
    if reference_rest_ns is None:
        moved = abs(math.log(reference_ns / calibrated_ns))
    else:
        moved = max(0.0, math.log(reference_ns / reference_rest_ns))
    if is_reference:
        return ITSELF_SHARE * moved
    return max(NEIGHBOUR_SHARE * min(moved, NEIGHBOUR_CHANGE), STATE_SHARE * moved)


def level_bounds_ns(
    reference_ns: float, calibrated_ns: float, reference_rest_ns: float | None
) -> tuple[float, float]:
    """What the reference takes where nothing disturbs it, as far as known: from, to.

    What it was calibrated at, which may have been in a bad minute or in one of a faster clock; what
    it takes at rest, None where that is not known; and what was found here, if that is faster.

    >>> level_bounds_ns(1.2, 1.1, 1.0), level_bounds_ns(1.0, 0.9, 1.0)
    ((1.0, 1.1), (0.9, 1.0))
    >>> level_bounds_ns(1.0, 1.1, 1.1), level_bounds_ns(1.2, 1.1, None)
    ((1.0, 1.1), (1.1, 1.1))
    """
    levels_ns = (calibrated_ns, reference_rest_ns or calibrated_ns)
    return min(*levels_ns, reference_ns), max(levels_ns)


def energy_per_inference(blocks: Sequence[TimedBlock]) -> float | None:
    """Joules per inference of the candidate, over all its blocks; None without a meter."""
    metered = [b for b in blocks if b.subject == "candidate" and b.energy_joules is not None]
    n_calls = sum(block.n_calls for block in metered)
    if n_calls == 0:
        return None
    return sum(block.energy_joules or 0.0 for block in metered) / n_calls


def unsteady_reason(interval: Interval) -> str | None:
    """Why a report should not be ranked, or None.

    An interval that misses its target at the time cap is still an answer, and an honest one;
    past `WIDEST_STEADY_INTERVAL` it orders nothing any more.
    """
    if interval.half_width <= WIDEST_STEADY_INTERVAL:
        return None
    return (
        f"the interval is ±{interval.half_width:.0%} wide at the time cap, more than "
        f"±{WIDEST_STEADY_INTERVAL:.0%}: the device is busy with something else, or its clock "
        "changes"
    )


def reference_trend(blocks: Sequence[TimedBlock]) -> float | None:
    """By which fraction the reference became slower (below 0: faster), if that is a drift.

    None where the trend is under `LARGEST_TREND`, cannot be told from noise, or has fewer than
    `TREND_PARTS` blocks. The slope is the median of all slopes between parts (Theil 1950, Sen
    1968), the test Mann's (1945); medians of parts, because neighbouring blocks are disturbed
    together and are not nine independent values, their parts nearly are. A single step is no
    trend: what slows both models from one moment on cancels in the ratio.
    """
    change = math.expm1(trend(np.log(reference_medians(blocks))))
    return change if abs(change) > LARGEST_TREND else None


def trend(values: Floats) -> float:
    """By how much these values rise from first to last, shape `(n,)`; 0 where that may be noise."""
    if values.size < TREND_PARTS:
        return 0.0
    parts = np.array([median(part) for part in np.array_split(values, TREND_PARTS)])
    first, second = np.triu_indices(TREND_PARTS, k=1)
    rises = parts[second] - parts[first]
    if abs(float(np.sign(rises).sum())) < TREND_SCORE:
        return 0.0
    return float(median(rises / (second - first))) * (TREND_PARTS - 1)


def reference_medians(blocks: Sequence[TimedBlock]) -> Floats:
    """The reference blocks' medians in order of time, shape `(n,)`."""
    return np.array([b.median_ns for b in blocks if b.subject == "reference"], dtype=np.float64)


# For the first `np.median`, `np.quantile` or `np.unique` numpy loads its masked arrays, which a
# process that lives for one measurement has no other use for: 25 ms of processor time out of 240.


def quantiles(values: Floats, shares: Sequence[float]) -> Floats:
    """Of finite values of shape `(n,)`, linear between neighbours, as numpy's are by default."""
    return np.interp(np.multiply(shares, values.size - 1), np.arange(values.size), np.sort(values))


def distinct(sittings: NDArray[np.int_]) -> NDArray[np.int_]:
    """The different ones, ascending."""
    return np.array(sorted(set(sittings.tolist())), dtype=sittings.dtype)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
