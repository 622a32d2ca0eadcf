"""The estimator of latency: what two models take while nothing disturbs them.

Owns which samples count, the ratio of candidate to reference from those, and its bootstrap. Pure
numpy: no clock, no runtime, no protocol. Intervals and rules are `latency.py`'s.

Why undisturbed samples: on a shared host a neighbour slows whole blocks by a tenth to a half, for
0.1 s or for most of a minute, and not both models alike, so that a median over all of a measurement
tells how much of it was disturbed. The fastest samples are the same in a calm hour and a restless
one. Why blocks of both in turn: what lasts, such as a clock that stays low or a device that is
slower today, finds both in the same state and cancels. A clock that falls for a part of the time is
a disturbance like any other: the tail tells of it, and so do the tainted pairs of a report.
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

EDGE_SHARE = 0.02
"""Of a model's samples, that are faster than what counts as its fastest latency."""
MIN_EDGE_RANK = 3
"""The fastest latency is the third fastest sample's at least: one or two may be luck."""
UNDISTURBED = 0.1
"""Samples count that are slower than the fastest by this at most, in logarithms. On a host at rest
most are: half of them lie within 0.06, where a model's sessions differ by `SESSION_SPREAD`. A
neighbour's bursts cost 0.25 to 0.45. Of three sets of 24 to 60 measurements of INT8 mobilenet_v2 at
224 pixels beside a loaded core, in a calm, a restless and a bad hour, the interquartile range was
0.33, 0.21 and 0.42 of that of 20 runs after 10, and the middle of them 0.448, 0.444 and 0.450; with
medians of all samples 0.18, 0.48 and 0.38, and 0.452, 0.461 and 0.482. With 0.08 it is 0.37, 0.22
and 0.34, with 0.12 0.28, 0.17 and 0.43, with an edge of 0.01 or 0.03 the same to 0.08. Chosen on
these."""
BIN = 0.005
"""Width of the bins of samples from which the bootstrap draws, in logarithms: as exact as its
bounds need to be, at the same cost for a model of 0.1 ms as for one of 100."""
N_BINS = 160
"""From `BELOW_EDGE` on; the outer ones hold all that is beyond. A resample without a sample at rest
has its edge where a neighbour's bursts are, and its window above that."""
BELOW_EDGE = 0.1
"""Where the bins begin, below the fastest latency of all samples."""
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

    Those that are slower by `UNDISTURBED` at most than the fastest latency (`EDGE_SHARE`). It is a
    trimmed mean with the trimming on one side, where disturbances are (Huber 1981, section 1.4).
    Exchanging candidate and reference changes the sign of their difference and nothing else, and
    both have as many samples: two copies of one model come out equal. Where the samples of a quiet
    device scatter by more than about 4 %, the slower ones of these do not count either.

    >>> undisturbed(np.array([0.0, 0.02, 0.04, 0.3, 2.0]))
    0.02
    """
    return float(_kept(logs).mean())


def undisturbed_share(logs: Floats) -> float:
    """How many of the samples that is, as a share.

    >>> undisturbed_share(np.array([0.0, 0.02, 0.04, 0.3, 2.0]))
    0.6
    """
    return _kept(logs).size / logs.size


def _kept(logs: Floats) -> Floats:
    ordered = np.sort(logs)
    edge = float(ordered[_edge_rank(logs.size) - 1])
    return ordered[: np.searchsorted(ordered, edge + UNDISTURBED, side="right")]


def _edge_rank(n: int) -> int:
    """The rank, from 1, of the sample that is the fastest latency.

    >>> [_edge_rank(n) for n in (1, 2, 12, 100, 1000)]
    [1, 2, 3, 3, 20]
    """
    return min(n, max(MIN_EDGE_RANK, round(EDGE_SHARE * n)))


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
    times = _times(len(pairs), seed=seed, n_resamples=n_resamples)
    logs = _binned_undisturbed(pairs.candidate, times) - _binned_undisturbed(pairs.reference, times)
    return logs[:-1], float(logs[-1])


def bootstrap_level(samples: Sequence[Floats], *, seed: int) -> tuple[Floats, float]:
    """The same of one model alone: what its blocks' samples take undisturbed."""
    logs = _binned_undisturbed(samples, _times(len(samples), seed=seed, n_resamples=N_RESAMPLES))
    return logs[:-1], float(logs[-1])


def _times(n: int, *, seed: int, n_resamples: int) -> Floats:
    """How often each of n places is drawn, a row for each resample; in the last row once."""
    length = run_length(n)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, n, size=(n_resamples, -(-n // length), 1))
    picks = ((starts + np.arange(length)) % n).reshape(n_resamples, -1)[:, :n]
    rows = np.arange(n_resamples)[:, np.newaxis] * n
    drawn = np.bincount((picks + rows).ravel(), minlength=n_resamples * n).reshape(-1, n)
    return np.vstack([drawn, np.ones((1, n))])


def _binned_undisturbed(samples: Sequence[Floats], times: Floats) -> Floats:
    """`undisturbed` of the samples, those of place i so many times as `times[:, i]` says."""
    everything = np.concatenate(samples)
    rank = _edge_rank(everything.size)
    begin = float(np.partition(everything, rank - 1)[rank - 1]) - BELOW_EDGE
    bins = np.clip((everything - begin) / BIN, 0, N_BINS - 1).astype(np.int_)
    owners = np.repeat(np.arange(len(samples)), [part.size for part in samples])
    places = owners * N_BINS + bins
    shape = (len(samples), N_BINS)
    counts = np.bincount(places, minlength=math.prod(shape)).reshape(shape)
    sums = np.bincount(places, everything - begin, minlength=math.prod(shape)).reshape(shape)
    # Not `@`: that would wake the threads of a linear algebra library on a device that is timed.
    n_below = np.cumsum(np.einsum("bi,ik->bk", times, counts.astype(np.float64)), axis=1)
    sum_below = np.cumsum(np.einsum("bi,ik->bk", times, sums), axis=1)
    n_all = n_below[:, -1:]
    ranks = np.minimum(n_all, np.maximum(MIN_EDGE_RANK, np.round(EDGE_SHARE * n_all)))
    edges = (n_below >= ranks).argmax(axis=1)
    # The last bin has no upper end: what lies there counts only where the fastest does too.
    ends = np.maximum(edges, np.minimum(edges + round(UNDISTURBED / BIN), N_BINS - 2))
    rows = np.arange(len(times))
    logs: Floats = begin + sum_below[rows, ends] / n_below[rows, ends]
    return logs
