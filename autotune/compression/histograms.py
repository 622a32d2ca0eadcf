"""Histograms of activations, and the ranges that follow from them.

Owns counting in bounded memory (2,048 bins; a value beyond them doubles the bins' width by
joining neighbours, so nothing is ever counted twice or dropped) and four ways to a range:
least and largest value, percentiles, least square error, least divergence. Which one a
tensor gets is decided by `choose_range`, and around a HardSwish by `upper_end`; running the
model is `calibration.py`'s work.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

BINS = 2048
LEVELS = 255
PERCENTILE = 99.999
"""The share of values kept, in percent; the tails lose half of the rest each."""
CLIP_COST = 100.0
"""What a squared unit lost beyond the range costs against one lost by rounding.

Rounding errors are independent and zero on average, and a layer with K inputs averages them
away; a clipped image loses the same sign at many neighbouring places. With both counted alike
(plain least square error) uniform INT8's divergence grew tenfold on mobilenet_v2 (0.00025 to
0.0025 nats) and by a third on mobilenet_v3_small; 0.01 % percentiles cost 38-fold.
"""
PEAK_COST = 3.0
"""`CLIP_COST` at the upper end of what a HardSwish takes and makes.

Factors that pass a HardSwish (`hard_swish.py`) stretch channels to where its range ends, so that
the peaks of a few images in one channel set the step of all. On mobilenet_v3_small trained on
digits uniform INT8's squared logit errors on 800 other images, as a fraction of quantize_static's,
in the mean of 16 builds whose ranges differ by up to 2 % (one build strays by 5 %): 0.72 with
`CLIP_COST`, 0.70 with 10, 0.69 with 3, 0.68 with 1; the divergence, of which one build strays by
12 %: 0.74, 0.73, 0.73, 0.66. The lower end stays: values pile up on a HardSwish's least one, and
cutting 4 % off that doubled the divergence.
"""
_SHRINKS = np.concatenate([np.linspace(1.0, 0.5, 26), np.geomspace(0.48, 1e-3, 40)])
_LEAST_EXPONENT = -100


@dataclass(slots=True)
class Histogram:
    """Counts of values in bins of width `2 ** exponent`; bin i begins at `i * 2 ** exponent`.

    `counts[0]` is bin `first`. At most `BINS` bins. Not thread-safe.
    """

    exponent: int = _LEAST_EXPONENT
    first: int = 0
    counts: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        """Count finite values."""
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if self.counts is None:
            self.exponent = max(_exponent_for(low, high), _LEAST_EXPONENT)
            self.first, self.counts = _bin(low, self.exponent), np.zeros(1, np.int64)
        self._grow(low, high)
        bins = np.floor(values.ravel() * 2.0**-self.exponent).astype(np.int64) - self.first
        self.counts += np.bincount(bins, minlength=len(self.counts))

    @property
    def n(self) -> int:
        """How many values were counted."""
        return 0 if self.counts is None else int(self.counts.sum())

    @property
    def centres(self) -> np.ndarray:
        """The middle of each bin, float64."""
        count = 0 if self.counts is None else len(self.counts)
        return (np.arange(self.first, self.first + count) + 0.5) * 2.0**self.exponent

    def to_json(self) -> list[object]:
        """Exponent, first bin, and the counts, compressed."""
        counts = np.zeros(0, np.int64) if self.counts is None else self.counts
        packed = zlib.compress(counts.astype("<i8").tobytes(), 6)
        return [self.exponent, self.first, base64.b64encode(packed).decode()]

    @classmethod
    def from_json(cls, document: list[object]) -> Histogram:
        """The histogram that `to_json` wrote."""
        exponent, first, packed = document
        counts = np.frombuffer(zlib.decompress(base64.b64decode(str(packed))), "<i8")
        return cls(int(str(exponent)), int(str(first)), counts.astype(np.int64))

    def _grow(self, low: float, high: float) -> None:
        """Make room for both, joining bins in pairs until there are few enough."""
        if self.counts is None:
            return
        while True:
            first = min(self.first, _bin(low, self.exponent))
            last = max(self.first + len(self.counts) - 1, _bin(high, self.exponent))
            if last - first < BINS:
                break
            if self.first % 2:
                self.counts = np.concatenate([[0], self.counts])
            if len(self.counts) % 2:
                self.counts = np.concatenate([self.counts, [0]])
            self.counts = self.counts.reshape(-1, 2).sum(axis=1)
            self.first, self.exponent = self.first // 2, self.exponent + 1
        before, after = self.first - first, last - (self.first + len(self.counts) - 1)
        self.counts = np.pad(self.counts, (before, after))
        self.first = first


def percentile_range(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """The range that keeps `PERCENTILE` of the values, inside `[low, high]`."""
    if histogram.counts is None:
        return low, high
    share = np.cumsum(histogram.counts) / histogram.n
    tail = (1 - PERCENTILE / 100) / 2
    width = 2.0**histogram.exponent
    left = float(histogram.centres[np.searchsorted(share, tail)]) - width / 2
    last = min(int(np.searchsorted(share, 1 - tail)), len(share) - 1)
    right = float(histogram.centres[last])
    return max(low, min(left, 0.0)), min(high, max(right + width / 2, 0.0))


def square_error_range(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """The range of least mean square error: rounding inside, distance outside."""
    return _best(low, high, lambda a, b: _square_error(histogram, a, b, clip_cost=1.0))


def entropy_range(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """The range whose codes' distribution diverges least from the values' (KL, as TensorRT's).

    Migacz 2017, "8-bit inference with TensorRT": what lies beyond the range is counted at its
    ends; each code spreads its count over its bins that are not empty. As there, no range has
    fewer bins than codes: each bin would have its own, and two bins would diverge in nothing.
    The whole range where it has fewer itself.
    """
    return _best(low, high, lambda a, b: _divergence(histogram, a, b))


def upper_end(histogram: Histogram, low: float, high: float) -> float:
    """Where the range `(low, high)` ends with the least error, what lies above at `PEAK_COST`.

    It is drawn in to 40 % at most. As in `choose_range` no value counts as being further away
    than the range was wide.
    """
    ends = [high * float(shrink) for shrink in np.linspace(1.0, 0.4, 61)]

    def error(end: float) -> float:
        return _square_error(
            histogram, low, end, clip_cost=PEAK_COST, furthest=high - low, only_above=True
        )

    return min(ends, key=error)


def choose_range(histogram: Histogram, low: float, high: float) -> tuple[str, tuple[float, float]]:
    """The method of least expected error, and its range; ties go to the wider one.

    The error is the mean square of rounding plus `CLIP_COST` times that of clipping. A value
    further away than the range is wide counts as being that far: how absurd it is says nothing
    of the others, whose codes it must not take.
    """
    ranges: Mapping[str, tuple[float, float]] = {
        "min-max": (low, high),
        "percentile": percentile_range(histogram, low, high),
        "entropy": entropy_range(histogram, low, high),
        "square error": square_error_range(histogram, low, high),
    }
    errors = {
        name: _square_error(histogram, *held, clip_cost=CLIP_COST, furthest=held[1] - held[0])
        for name, held in ranges.items()
    }
    best = min(ranges, key=lambda name: errors[name])
    return best, ranges[best]


def _best(low: float, high: float, error: Callable[[float, float], float]) -> tuple[float, float]:
    """Both ends are drawn in alike; the first of equals, which is the wider, wins."""
    ranges = [(low * float(shrink), high * float(shrink)) for shrink in _SHRINKS]
    return min(ranges, key=lambda held: error(*held))


def _square_error(
    histogram: Histogram,
    low: float,
    high: float,
    *,
    clip_cost: float,
    furthest: float = math.inf,
    only_above: bool = False,
) -> float:
    if histogram.counts is None or high <= low:
        return math.inf
    centres, n = histogram.centres, histogram.n
    below = 0.0 if only_above else np.maximum(low - centres, 0.0)
    beyond = below + np.maximum(centres - high, 0.0)
    # The outermost bins reach a little over the least and the largest value.
    beyond = np.maximum(beyond - 2.0 ** (histogram.exponent - 1), 0.0)
    inside = float(histogram.counts[beyond == 0].sum()) / n
    rounding = ((high - low) / LEVELS) ** 2 / 12
    clipped = float((histogram.counts * np.minimum(beyond, furthest) ** 2).sum()) / n
    return inside * rounding + clip_cost * clipped


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    if histogram.counts is None or high <= low:
        return math.inf
    centres = histogram.centres
    kept = (centres >= low) & (centres <= high)
    if kept.sum() <= LEVELS:
        return math.inf
    counts = histogram.counts.astype(np.float64)
    p = counts[kept]
    p[0] += counts[centres < low].sum()
    p[-1] += counts[centres > high].sum()
    codes = np.rint((centres[kept] - low) / ((high - low) / LEVELS)).astype(np.int64)
    is_used = counts[kept] > 0
    totals = np.bincount(codes, weights=counts[kept])
    shares = np.maximum(np.bincount(codes, weights=is_used), 1.0)
    q = np.where(is_used, (totals / shares)[codes], 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())


def _exponent_for(low: float, high: float) -> int:
    """Fine enough that a quarter of the bins holds the first values."""
    width = max(high - low, abs(high), abs(low)) / (BINS // 4)
    return math.ceil(math.log2(width)) if width > 0 else _LEAST_EXPONENT


def _bin(value: float, exponent: int) -> int:
    return math.floor(value * 2.0**-exponent)
