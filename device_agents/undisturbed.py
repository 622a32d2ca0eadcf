"""The estimator of latency: what two models take while nothing disturbs them.

Owns which samples count, the ratio of candidate to reference from those, and its bootstrap. Pure
numpy: no clock, no runtime, no protocol. Intervals and rules are `latency.py`'s.

Why undisturbed samples: on a shared host a neighbour slows whole blocks by a tenth to a half, for
0.1 s or for most of a minute, and not both models alike, so that a median over all of a measurement
tells how much of it was disturbed. The fastest samples are the same in a calm hour and a restless
one. Why blocks of both in turn: what remains, such as a clock that falls by half, or a device that
is slower today, finds both in the same state and cancels.
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

EDGE_SHARE = 0.01
"""Of a model's samples, whose mean is its fastest latency: a single one may be luck."""
UNDISTURBED = 0.12
"""Samples count that are slower than the fastest by this at most, in logarithms. On a host at rest
nearly all are: half of them lie within 0.06, where a model's sessions differ by `SESSION_SPREAD`. A
neighbour's bursts cost 0.25 to 0.45. Of three sets of 24 to 60 measurements of INT8 mobilenet_v2 at
224 pixels beside a loaded core, in a calm, a restless and a bad hour, the interquartile range was
0.28, 0.25 and 0.32 of that of 20 runs after 10, and the medians 0.449, 0.446 and 0.451; with all
samples 0.18, 0.48 and 0.38, and 0.452, 0.461 and 0.482. With 0.08 the calm hour has 0.42, with 0.15
the bad one 0.43; with half of `EDGE_SHARE` or twice as much they are the same to 0.03."""
BIN = 0.005
"""Width of the bins of samples from which the bootstrap draws, in logarithms: as exact as its
bounds need to be, at the same cost for a model of 0.1 ms as for one of 100."""
N_BINS = 64
"""Above the fastest sample; the last holds all slower ones. The window of `UNDISTURBED` takes 24,
the others are where a resample's fastest may lie."""
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
class Pairs:
    """The samples of a measurement by pair of blocks, in order of time; logarithms of ns.

    `candidate` and `reference` have an array for each pair, `sittings` the number of its sitting,
    shape `(n,)`, ascending.
    """

    candidate: Sequence[Floats]
    reference: Sequence[Floats]
    sittings: NDArray[np.int_]

    @classmethod
    def of(cls, blocks: Sequence[Timed]) -> Pairs:
        """Of blocks that come in pairs of one of each, in random order.

        Raises:
            ValueError: they do not, or there are none.
        """
        subjects = [block.subject for block in blocks]
        if not blocks or len(blocks) % 2 or any(map(eq, subjects[0::2], subjects[1::2])):
            raise ValueError("blocks must come in pairs of one candidate and one reference block")
        logs = [np.log(np.asarray(block.samples_ns, dtype=np.float64)) for block in blocks]
        by_subject = {
            name: [x for x, subject in zip(logs, subjects, strict=True) if subject == name]
            for name in ("candidate", "reference")
        }
        sittings = np.array([block.sitting for block in blocks[0::2]])
        return cls(by_subject["candidate"], by_subject["reference"], sittings)

    def __len__(self) -> int:
        return len(self.candidate)

    def log_ratio(self, places: NDArray[np.int_] | None = None) -> float:
        """Of the undisturbed latencies, candidate over reference, in those pairs or all."""
        chosen = range(len(self)) if places is None else places
        candidate, reference = (
            undisturbed(np.concatenate([part[i] for i in chosen]))
            for part in (self.candidate, self.reference)
        )
        return candidate - reference


def undisturbed(logs: Floats) -> float:
    """The mean of the samples that nothing disturbed; logarithms in any order, shape `(n,)`, n > 0.

    Those that are slower by `UNDISTURBED` at most than the mean of the fastest `EDGE_SHARE`, at
    least one. Exchanging candidate and reference changes the sign of their difference and nothing
    else, and both have as many samples: two copies of one model come out equal. Where the samples
    of a quiet device scatter by 5 % and more, the slower ones of these do not count either.

    >>> undisturbed(np.array([0.0, 0.04, 0.08, 0.3, 2.0]))
    0.04
    """
    return float(_kept(logs).mean())


def undisturbed_share(logs: Floats) -> float:
    """How many of the samples that is, as a share.

    >>> undisturbed_share(np.array([0.0, 0.04, 0.08, 0.3, 2.0]))
    0.6
    """
    return _kept(logs).size / logs.size


def _kept(logs: Floats) -> Floats:
    ordered = np.sort(logs)
    fastest = float(ordered[: max(1, round(EDGE_SHARE * ordered.size))].mean())
    return ordered[: np.searchsorted(ordered, fastest + UNDISTURBED, side="right")]


def undisturbed_ns(blocks: Sequence[Timed], subject: str) -> float:
    """What a model takes while nothing disturbs it, from all of its blocks."""
    samples = [np.asarray(b.samples_ns, dtype=np.float64) for b in blocks if b.subject == subject]
    return math.exp(undisturbed(np.log(np.concatenate(samples))))


def run_length(n: int) -> int:
    """Values per run of the block bootstrap: n ** (1/3) (Hall, Horowitz and Jing 1995), 2 or more.

    >>> [run_length(n) for n in (1, 8, 27, 200)]
    [1, 2, 3, 6]
    """
    return min(n, max(2, round(math.cbrt(n))))


def bootstrap(pairs: Pairs, *, seed: int, n_resamples: int = N_RESAMPLES) -> tuple[Floats, float]:
    """Log ratios of resampled pairs, shape `(n_resamples,)`, and of the pairs themselves.

    Circular block bootstrap (Politis and Romano 1992): runs of `run_length` neighbouring pairs
    are drawn with replacement until there are as many as in the original. From samples in bins of
    `BIN`; the same seed gives the same.
    """
    n = len(pairs)
    length = run_length(n)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, n, size=(n_resamples, -(-n // length), 1))
    picks = ((starts + np.arange(length)) % n).reshape(n_resamples, -1)[:, :n]
    rows = np.arange(n_resamples)[:, np.newaxis] * n
    drawn = np.bincount((picks + rows).ravel(), minlength=n_resamples * n).reshape(-1, n)
    times: Floats = np.vstack([drawn, np.ones((1, n))])
    logs = _binned_undisturbed(pairs.candidate, times) - _binned_undisturbed(pairs.reference, times)
    return logs[:-1], float(logs[-1])


def _binned_undisturbed(samples: Sequence[Floats], times: Floats) -> Floats:
    """`undisturbed` of the samples, those of place i so many times as `times[:, i]` says."""
    everything = np.concatenate(samples)
    lowest = everything.min()
    bins = np.minimum((everything - lowest) / BIN, N_BINS - 1).astype(np.int_)
    owners = np.repeat(np.arange(len(samples)), [part.size for part in samples])
    places = owners * N_BINS + bins
    shape = (len(samples), N_BINS)
    counts = np.bincount(places, minlength=math.prod(shape)).reshape(shape)
    sums = np.bincount(places, everything - lowest, minlength=math.prod(shape)).reshape(shape)
    # Not `@`: that would wake the threads of a linear algebra library on a device that is timed.
    n_below = np.cumsum(np.einsum("bi,ik->bk", times, counts.astype(np.float64)), axis=1)
    sum_below = np.cumsum(np.einsum("bi,ik->bk", times, sums), axis=1)
    rows = np.arange(len(times))
    n_fastest = np.maximum(1.0, np.round(EDGE_SHARE * n_below[:, -1]))
    first = (n_below >= n_fastest[:, np.newaxis]).argmax(axis=1)
    edges = sum_below[rows, first] / n_below[rows, first] + UNDISTURBED
    ends = np.minimum(np.rint(edges / BIN - 0.5).astype(np.int_), N_BINS - 1)
    logs: Floats = lowest + sum_below[rows, ends] / n_below[rows, ends]
    return logs
