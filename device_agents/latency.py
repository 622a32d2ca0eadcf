"""Latency statistics: from alternating blocks of samples to a ratio that can be trusted.

Owns the estimator (ratio to the reference), its interval (the wider of a block bootstrap over
pairs and Student's over sittings) and the rules that stop a measurement or call it unsteady. Pure
numpy: no clock, no runtime, no protocol. The timed loop is `sampling.py`'s.

Why pairs of blocks: on a shared machine the plain median of 20 runs spreads by 6 % and more,
but disturbances move two neighbouring blocks together, so their ratio spreads far less. What is
left comes in runs of slow blocks, which is why the bootstrap resamples runs of pairs. What
slows both models, such as a clock that falls by half, cancels and is no reason to discard data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE_LEVEL = 0.95
NORMAL_QUANTILE = 1.959964
"""The normal distribution's quantile for `CONFIDENCE_LEVEL`, two-sided."""
N_RESAMPLES = 1000
"""With these the bounds wander by a twentieth of the half width from seed to seed."""
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)
"""Student's quantiles for `CONFIDENCE_LEVEL`, two-sided, at 1, 2, ... degrees of freedom."""
MAX_PARTS = len(STUDENT) + 1
"""Parts of a measurement whose medians are held against each other; whole sittings each. With more
of them a ratio that changes half way would not be seen."""
MEDIAN_INEFFICIENCY = math.sqrt(math.pi / 2)
"""By how much the median of many normal values spreads wider than their mean: the median's
asymptotic efficiency is 2 / pi. Of nine values it is 1.22."""
SESSION_SPREAD = 0.028
"""Standard deviation of the ratio of two sessions of INT8 mobilenet_v2 at 224 pixels to two of its
FP32 file, from where they happen to lie in memory: on an idle x86 core 0.030 from sitting to
sitting with three pairs each, and 0.011 to 0.023 from pair to pair, 0.06 and more while the host is
busy. Sittings of one process differ as much as those of fresh ones, and means of six by no more
than independent sittings would (0.011)."""
NEIGHBOUR_SHARE = 1.2
"""By how much a ratio may move with its reference's latency, as a share, while that moves little.
What a neighbour on the host takes of cache and memory costs two models as much time, rather than as
large a part of theirs: over some minutes in which copies of 16 MB slowed by 0.45, all in
logarithms, FP32 mobilenet_v2 at 224 pixels slowed by 0.10 (4.2 to 4.6 ms) and its INT8 file by 0.23
(1.8 to 2.3 ms); resnet18 by 0.04 and 0.08, efficientnet_b0 by 0.08 and 0.09, mobilenet_v3_small by
0.34 and 0.23, and what fits into a core's own cache not at all. So the ratio of INT8 moved by 1.2,
1.1, 0.1 and -0.4 of what FP32 did; of mobilenet_v2 by 0.06 to 0.6 in other hours and by 1.0 and 1.1
in the worst. One measurement lies in one state and cannot see it: of 80 in that worst hour 31 hold
the long-run ratio without this, 49 with 0.5, 71 with this share; where it stood at 0.445 half of
the time and at 0.50 the other half 55 did."""
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
MIN_SITTINGS = 12
"""Before the first look. Of twelve sittings that differ by `SESSION_SPREAD`, with a pair each that
is off by as much, the mean is known to ±2.2 %; what looks narrow before that is luck. With a first
look after four sittings of two, half of the measurements that stopped early stated an interval with
the long-run ratio (18 of 33), of those that went on nine in ten (43 of 47)."""
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
    sample is the mean of its group. `median_ns` is their median, kept because it is what every
    statistic below starts from. `energy_joules` was spent over the block's `n_calls` inferences;
    None without a meter. Blocks with the same number of `sitting` ran in the same two sessions.
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
    n_samples: int
    n_blocks: int
    is_steady: bool
    unsteady_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingRule:
    """When to stop sampling: narrow enough, or out of time.

    The interval is looked at after `MIN_SITTINGS` sittings and then each time their number has
    grown by half. Stopping at the first narrow interval favours the ones that are narrow by luck;
    the fewer the looks, the fewer of these.
    """

    target_half_width: float
    growth: float = 1.5

    def next_look(self, n_sittings: int) -> int:
        """The number of sittings at the look after one with `n_sittings`."""
        return max(n_sittings + 1, math.ceil(n_sittings * self.growth))

    def is_satisfied(self, interval: Interval) -> bool:
        """The interval is as narrow as was asked for."""
        return interval.half_width <= self.target_half_width


def log_ratios(is_candidate: NDArray[np.bool_], medians_ns: Floats) -> Floats:
    """Of each pair of neighbouring blocks, the logarithm of candidate over reference.

    Args:
        is_candidate: shape `(2 * n_pairs,)`, in order of time; one True in each pair.
        medians_ns: shape `(2 * n_pairs,)`, the blocks' medians, positive.

    Returns:
        Shape `(n_pairs,)`, in order of time; below 0 the candidate is faster.

    A pair has one block of each, so that exchanging the models changes the sign and nothing
    else: two copies of one model come out equal under any disturbance. Dividing by the mean of
    two neighbouring reference blocks does not: a mean of two catches a slow spell twice as
    often as a single block does. In simulation it is 0.5 % too low with 15 % disturbed blocks,
    and it was 5 % too low in an A/A run on a machine with four times more work than cores.

    Raises:
        ValueError: if the blocks do not come in such pairs, or there are none.
    """
    first, second = is_candidate[0::2], is_candidate[1::2]
    if first.size == 0 or first.size != second.size or bool(np.any(first == second)):
        raise ValueError("blocks must come in pairs of one candidate and one reference block")
    sign = np.where(first, 1.0, -1.0)
    logs: Floats = np.log(medians_ns[0::2] / medians_ns[1::2]) * sign
    return logs


def run_length(n: int) -> int:
    """Values per run of the block bootstrap: n ** (1/3) (Hall, Horowitz and Jing 1995), 2 or more.

    >>> [run_length(n) for n in (1, 8, 27, 200)]
    [1, 2, 3, 6]
    """
    return min(n, max(2, round(math.cbrt(n))))


def small_sample_factor(n: int) -> float:
    """By how much to widen a percentile bootstrap interval of `n` values; towards 1.1.

    A percentile interval knows neither the degrees of freedom that centring on the sample took
    nor that the scale was estimated. Both are mended as for a mean of `n / run_length` runs: the
    root of `n / (n - run_length)`, and Student's over the normal quantile (Abramowitz and Stegun
    26.7.5). The last 1.1 pays for the looks of `StoppingRule`. With the three, 95 % intervals
    cover 93 to 97 % in simulations of quiet, noisy, disturbed and correlated devices that stop
    at the target; without them 75 to 85 %. (`tests/unit/test_latency.py` repeats it.)

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


def bootstrap_medians(values: Floats, *, seed: int, n_resamples: int = N_RESAMPLES) -> Floats:
    """Medians of resampled series, shape `(n_resamples,)`; the same seed gives the same.

    Circular block bootstrap (Politis and Romano 1992): runs of `run_length` neighbouring values
    are drawn with replacement until the series is as long as the original, of shape `(n,)`, in
    order of time.
    """
    n = values.size
    length = run_length(n)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, n, size=(n_resamples, -(-n // length), 1))
    picks = ((starts + np.arange(length)) % n).reshape(n_resamples, -1)[:, :n]
    return _medians(values[picks])


def median_interval(values: Floats, *, seed: int) -> tuple[float, float, float]:
    """Lower bound, median and upper bound of dependent values of shape `(n,)`, n >= 1.

    A percentile interval of `bootstrap_medians`, widened by `small_sample_factor`. With n <= 2
    nothing is known of the spread and the bounds are infinite.
    """
    center = float(median(values))
    factor = small_sample_factor(values.size)
    if math.isinf(factor):
        return -math.inf, center, math.inf
    tail = (1 - CONFIDENCE_LEVEL) / 2
    low, high = quantiles(bootstrap_medians(values, seed=seed), [tail, 1 - tail])
    return center - factor * (center - float(low)), center, center + factor * (float(high) - center)


def sitting_half_width(logs: Floats, sittings: NDArray[np.int_]) -> float:
    """Half the width of an interval that sees what differs from sitting to sitting.

    Args:
        logs: shape `(n,)`, the pairs' log ratios in order of time.
        sittings: shape `(n,)`, the sitting of each pair, ascending.

    In every sitting both models are loaded anew, because a session is faster or slower for as
    long as it lasts, by where it lies in memory. In simulation with sessions that spread by
    `SESSION_SPREAD`, intervals from one pair of sessions that stop at ±1 % cover the ratio in
    a third of the cases. The sittings, whole ones joined to `MAX_PARTS` at most, give independent
    medians, and their spread the standard error of their mean (batch means: Conway 1963). The
    ratio is a median, and where sessions are what differs it is known less well than a mean by
    `MEDIAN_INEFFICIENCY`: without that, intervals that stopped at ±2 % left out the long-run
    ratio in 4 of 36 cases on an idle and a loaded core. A device that throttles half way, or
    shares a core with a neighbour who comes and goes, shows here too. Infinite for a single
    sitting.

    It helps and does not cure where the ratio itself switches between two states that last a
    fifth of the measurement: see `tests/unit/test_latency.py`, which repeats all of it.
    """
    parts = sitting_parts(sittings)
    if len(parts) == 1:
        return math.inf
    medians = [float(median(logs[part])) for part in parts]
    student = STUDENT[len(parts) - 2]
    error = float(np.std(medians, ddof=1)) / math.sqrt(len(parts))
    return student * MEDIAN_INEFFICIENCY * error


def sitting_parts(sittings: NDArray[np.int_]) -> list[NDArray[np.int_]]:
    """The places of each of at most `MAX_PARTS` parts in order of time, whole sittings each."""
    names = distinct(sittings)
    joined = np.array_split(names, min(MAX_PARTS, names.size))
    return [np.flatnonzero((part[0] <= sittings) & (sittings <= part[-1])) for part in joined]


def ratio_interval(blocks: Sequence[TimedBlock], *, seed: int) -> Interval:
    """The ratio of candidate to reference with its interval; below 1 is faster.

    The wider of two intervals: `median_interval` for what changes from pair to pair,
    `sitting_half_width` for what changes from sitting to sitting. With fewer than `MIN_SITTINGS`
    sittings, which is all that a short time cap leaves of a slow model, Student's quantile makes
    the latter very wide under noise: there it is bounded by the former together with
    `SESSION_SPREAD`.

    Raises:
        ValueError: if the blocks do not come in pairs.
    """
    logs = log_ratios(*_columns(blocks))
    sittings = np.array([block.sitting for block in blocks[0::2]])
    low, center, high = median_interval(logs, seed=seed)
    slow, n_sittings = sitting_half_width(logs, sittings), distinct(sittings).size
    known = math.inf
    if n_sittings < MIN_SITTINGS:
        known = NORMAL_QUANTILE * SESSION_SPREAD / math.sqrt(n_sittings)
    low = center - max(center - low, min(slow, math.hypot(center - low, known)))
    high = center + max(high - center, min(slow, math.hypot(high - center, known)))
    return Interval(low=math.exp(low), high=_exp(high), center=math.exp(center))


def summarize(
    blocks: Sequence[TimedBlock],
    *,
    seed: int,
    reference_latency_ns: float | None,
    is_reference: bool = False,
) -> LatencySummary:
    """All statistics of a finished measurement.

    `reference_latency_ns` is the reference's calibrated latency on this device; None takes the
    median of its samples here. All latencies are scaled by calibrated over measured reference, and
    where these differ the bounds are `state_uncertainty` further apart; `is_reference` says that
    the candidate is the same file run the same way. Whether the measurement is steady is not a
    matter of that: it may be all that this device has to offer now.

    Raises:
        ValueError: if the blocks do not come in pairs.
    """
    measured = ratio_interval(blocks, seed=seed)
    references = reference_medians(blocks)
    reference_ns = float(median(references))
    calibrated_ns = reference_latency_ns or reference_ns
    apart = math.exp(state_uncertainty(reference_ns, calibrated_ns, is_reference=is_reference))
    interval = replace(measured, low=measured.low / apart, high=measured.high * apart)
    samples = np.concatenate([b.samples_ns for b in blocks if b.subject == "candidate"])
    p90, p99 = quantiles(samples, [0.9, 0.99]) * (calibrated_ns / reference_ns)
    reason = unsteady_reason(measured)
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


def state_uncertainty(
    reference_ns: float, calibrated_ns: float, *, is_reference: bool = False
) -> float:
    """What is not known of a ratio, or latency, because the device is not in its calibrated state.

    The half width in logarithms: `NEIGHBOUR_SHARE` of the difference between the reference's
    latency and its calibrated one as far as a neighbour may cause it, and `STATE_SHARE` of all of
    it where that is more; `ITSELF_SHARE` where the candidate `is_reference`.

    >>> [round(state_uncertainty(math.exp(moved), 1.0), 3) for moved in (0.0, -0.05, 0.1, 0.7)]
    [0.0, 0.06, 0.12, 0.35]
    """
    moved = abs(math.log(reference_ns / calibrated_ns))
    if is_reference:
        return ITSELF_SHARE * moved
    return max(NEIGHBOUR_SHARE * min(moved, NEIGHBOUR_CHANGE), STATE_SHARE * moved)


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
    references = reference_medians(blocks)
    if references.size < TREND_PARTS:
        return None
    parts = np.array_split(np.log(references), TREND_PARTS)
    logs = np.array([median(part) for part in parts])
    first, second = np.triu_indices(TREND_PARTS, k=1)
    rises = logs[second] - logs[first]
    if abs(float(np.sign(rises).sum())) < TREND_SCORE:
        return None
    change = math.expm1(float(median(rises / (second - first))) * (TREND_PARTS - 1))
    return change if abs(change) > LARGEST_TREND else None


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


def _medians(rows: Floats) -> Floats:
    """The median of each row, finite numbers of shape `(m, n)`."""
    upper = rows.shape[1] // 2
    lower = upper - 1 if rows.shape[1] % 2 == 0 else upper
    ordered = np.partition(rows, (lower, upper), axis=1)
    return (ordered[:, lower] + ordered[:, upper]) / 2


def _columns(blocks: Sequence[TimedBlock]) -> tuple[NDArray[np.bool_], Floats]:
    is_candidate = np.array([b.subject == "candidate" for b in blocks], dtype=np.bool_)
    return is_candidate, np.array([b.median_ns for b in blocks], dtype=np.float64)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
