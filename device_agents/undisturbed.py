"""The estimator of latency: what two models take while nothing disturbs them.

Owns how much each sample and each pair of blocks counts, the ratio of candidate to reference from
these, and its bootstrap. Pure numpy: no clock, no runtime, no protocol. Intervals and rules are
`latency.py`'s.

Why pairs of blocks: what slows both for a while, such as a clock that stays low or a device that is
slower today, cancels in their ratio. Why the undisturbed ones: on a shared host a neighbour slows
whole blocks by a tenth to a half, for 0.1 s or for most of a minute, and not both models alike, so
that a median over all pairs tells how much of a measurement was disturbed. The fastest pairs are
the same in a calm hour and a restless one, and of a bad minute the fastest calls. A clock that
falls for a part of the time is a disturbance like any other: the tail tells of it, and so do the
tainted pairs of a report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SLOWDOWN = 0.03
"""What is slower than the fastest by this, in logarithms, counts 1 / e of that: a sample against
the fastest of its block, a pair of blocks against the fastest pairs. Bad minutes leave gaps of
single calls, which a block's median does not see: of two traces of 402 and 600 s of INT8 and FP32
mobilenet_v2 in bad hours, ratios of 8 s with medians and 0.04 have an interquartile range of 0.57
and 0.53 of that of 20 runs after 10, with this 0.34 and 0.35, and 0.16 and 0.18 where the device is
waited for (`rest.REST_CAPS`; medians: 0.23 and 0.30). FP32 against itself spreads as with medians.
Of all 8 s of these traces, and of three sets of 60, 40 and 24 measurements in a bad, a restless and
a calm hour, it is 0.52, 0.43, 0.36, 0.11 and 0.30; with 0.02 for both 0.38, 0.29, 0.31, 0.16 and
0.36, with 0.04 0.57, 0.50, 0.43, 0.13 and 0.27: less tells more of a bad hour and spreads more in a
calm one. What slows one of the models alone, by a tenth and in spells that are three fifths of the
time, moves the ratio by 0.024, and 72 % of 300 simulated intervals hold it; in spells that are nine
tenths of the time 1 % do. Chosen on these."""
LUCKY = 2
"""So many of the fastest pairs may be luck: the third is what the others are held against. Samples
of a block have no such guard: no call is faster than it can be, but by an error of the clock."""
LARGEST_EXPONENT = 300.0
"""No weight is 0, not even of samples that nobody can have measured."""
UNDISTURBED = 0.1
"""A sample is undisturbed that is slower than what its model takes undisturbed by this at most, in
logarithms: nine tenths and more are on a host at rest."""
N_RESAMPLES = 1000
"""With these the bounds wander by a twentieth of the half width from seed to seed."""


class Timed(Protocol):
    """A block of samples, as timed or as sent."""

    @property
    def subject(self) -> str:
        """`candidate` or `reference`."""

    @property
    def samples_ns(self) -> Sequence[int]:
        """In order of time."""

    @property
    def sitting(self) -> int:
        """Blocks of one sitting ran in the same sessions."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """Values in order of time with what each counts; shapes `(n,)`, weights positive, n > 0."""

    values: Floats
    weights: Floats

    def __len__(self) -> int:
        return self.values.size

    def mean(self, places: NDArray[np.int_] | slice = slice(None)) -> float:
        """Of the values at those places, or of all."""
        weights = self.weights[places]
        return float((weights * self.values[places]).sum() / weights.sum())

    @property
    def effective_size(self) -> int:
        """How many values of equal weight have a mean that spreads as this (Kish 1965).

        >>> Weighted(np.zeros(4), np.array([1.0, 1.0, 1e-9, 1e-9])).effective_size
        2
        """
        return round(float(self.weights.sum() ** 2 / np.square(self.weights).sum()))


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the pairs of a measurement took, in order of time; all of shape `(n,)`.

    `candidate` and `reference` are what `levels_of` says of their blocks, `weights` how much each
    pair counts, `sittings` the number of its sitting, ascending.
    """

    candidate: Floats
    reference: Floats
    weights: Floats
    sittings: NDArray[np.int_]

    @classmethod
    def of(cls, blocks: Sequence[Timed]) -> Pairs:
        """Of blocks that come in pairs of one of each, in random order.

        A pair's weight is by the mean of its two latencies, which tells nothing of their ratio
        where both are equally noisy. Where they are not, the noisier one comes out faster, by the
        difference of the variances of their samples over `SLOWDOWN`: 1.6 % with 3 and 2 %, 0.2 %
        with 1 and 0.5 %.

        Raises:
            ValueError: they do not, there are none, or samples are missing or not positive.
        """
        if not are_pairs(blocks):
            raise ValueError(
                "blocks must come in pairs of a candidate and a reference block of positive samples"
            )
        levels = levels_of([x.samples_ns for x in blocks])
        is_candidate = np.array([x.subject == "candidate" for x in blocks])
        candidate, reference = levels[is_candidate], levels[~is_candidate]
        weights = weights_of((candidate + reference) / 2)
        return cls(candidate, reference, weights, np.array([x.sitting for x in blocks[0::2]]))

    @property
    def log_ratios(self) -> Weighted:
        """Of candidate to reference. Two copies of one model come out equal."""
        return Weighted(self.candidate - self.reference, self.weights)

    def level(self, subject: str) -> Weighted:
        """What one of the two took, by the same pairs: its ratio to the other is `log_ratios`."""
        values = self.candidate if subject == "candidate" else self.reference
        return Weighted(values, self.weights)

    def undisturbed_ns(self, subject: str) -> float:
        """What one of the two takes while nothing disturbs it."""
        return math.exp(self.level(subject).mean())


def are_pairs(blocks: Sequence[Timed]) -> bool:
    """Each two blocks are one of the candidate and one of the reference, of positive samples."""
    subjects = [block.subject for block in blocks]
    is_alternating = not any(map(eq, subjects[0::2], subjects[1::2]))
    is_positive = all(min(block.samples_ns, default=0) > 0 for block in blocks)
    return bool(blocks) and len(blocks) % 2 == 0 and is_alternating and is_positive


def levels_of(samples_ns: Sequence[Sequence[int]]) -> Floats:
    """What a model took undisturbed in each of these blocks, in logarithms, shape `(n,)`.

    The mean over a block's samples, of which one counts 1 / e for each `SLOWDOWN` that it is
    slower than the block's fastest. Blocks of two models have to have as many samples to be
    compared; none may be empty.

    >>> np.exp(levels_of([[100, 100, 160], [100, 101, 102]])).round(1).tolist()
    [100.0, 100.8]
    """
    starts = np.cumsum([0, *map(len, samples_ns[:-1])])
    logs = np.log(np.concatenate(samples_ns))
    fastest_of_its = np.repeat(np.minimum.reduceat(logs, starts), list(map(len, samples_ns)))
    weights = np.exp(-np.minimum((logs - fastest_of_its) / SLOWDOWN, LARGEST_EXPONENT))
    levels: Floats = np.add.reduceat(weights * logs, starts) / np.add.reduceat(weights, starts)
    return levels


def weights_of(logs: Floats) -> Floats:
    """How much each of these latencies counts, shape `(n,)`, in logarithms.

    A weight falls by e for each `SLOWDOWN` above the fastest, and is 1 for that one and the
    `LUCKY` ones.
    """
    slower = np.clip((logs - fastest(logs)) / SLOWDOWN, 0.0, LARGEST_EXPONENT)
    weights: Floats = np.exp(-slower)
    return weights


def fastest(logs: Floats) -> float:
    """The fastest of latencies in any order, shape `(n,)`, but for the `LUCKY` ones.

    >>> fastest(np.array([0.0, 2.0, 0.04, 0.3, 0.02]))
    0.04
    """
    rank = min(LUCKY, logs.size - 1)
    return float(np.partition(logs, rank)[rank])


def undisturbed_share(samples_ns: Floats, undisturbed_ns: float) -> float:
    """How many samples of a model that takes so long undisturbed were so, as a share.

    >>> undisturbed_share(np.array([100.0, 102.0, 109.0, 140.0]), 100.0)
    0.75
    """
    return float((samples_ns <= undisturbed_ns * math.exp(UNDISTURBED)).mean())


def run_length(n: int) -> int:
    """Values per run of the block bootstrap: n ** (1/3) (Hall, Horowitz and Jing 1995), 2 or more.

    >>> [run_length(n) for n in (1, 8, 27, 200)]
    [1, 2, 3, 6]
    """
    return min(n, max(2, round(math.cbrt(n))))


def bootstrap(series: Weighted, *, seed: int, n_resamples: int = N_RESAMPLES) -> Floats:
    """How far the weighted means of resamples are from that of all, shape `(n_resamples,)`.

    Circular block bootstrap (Politis and Romano 1992): runs of `run_length` neighbours are drawn
    with replacement until there are as many as in the original. Linear in what each value adds
    (Cochran 1977, section 6.4: the weights of a resample sum to those of all), because one without
    a value of weight would tell of the others. The same seed gives the same.
    """
    n = len(series)
    length = run_length(n)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, n, size=(n_resamples, -(-n // length), 1))
    picks = ((starts + np.arange(length)) % n).reshape(n_resamples, -1)[:, :n]
    adds = series.weights * (series.values - series.mean()) / series.weights.sum()
    away: Floats = adds[picks].sum(axis=1)
    return away
