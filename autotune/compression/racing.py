"""Racing: stop evaluating a candidate when its samples leave no doubt about its accuracy drop.

Owns the sequential test alone: it runs no model. `accuracy.py` feeds it block after block;
which candidates race, and against which limit, is `autotune.search`'s to say.

The test looks at the data after every block, so it has to be valid at every look at once.
It is a test by betting: each sample's difference from FP32 (1: lost, -1: won, 0: the same) is
bet on against the claim "over all samples the drop is `limit`", with predictable stakes; the
gambler's wealth is then a martingale that starts at 1, and by Ville's inequality it ever
reaches 1 / alpha with a probability of at most alpha, however often one looks (Waudby-Smith
and Ramdas 2024, "Estimating means of bounded random variables by betting", J. R. Stat. Soc. B
86, sections 4 and 5; sampling without replacement: their "Confidence sequences for sampling
without replacement", NeurIPS 2020). Samples must come in random order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

ALPHA = 0.05
"""The error rate of one candidate's race: as that of the intervals in an accuracy report."""

BLOCK = 32
"""Samples between two looks: two of the evaluator's batches; a look costs microseconds."""

_STAKES = np.array([0.1, 0.25, 0.5, 0.8, 0.95])
"""Shares of the largest stake that cannot lose more than all. The wealth is the mean over
them, which is a martingale too; small stakes suit small drops with many differences, large
ones large drops."""

_LEAST_ROOM = 1e-6
_BISECTIONS = 40


class Verdict(StrEnum):
    """Why a race ended before its last sample."""

    WORSE = "worse"
    WITHIN = "within"


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """What a candidate races against.

    `limit` is the accuracy drop, as a fraction, that a useful candidate does not exceed. A race
    ends when the drop over all samples certainly exceeds it; with `ends_within` also when it
    certainly does not. Each of the two verdicts is wrong with a probability of at most `alpha`,
    and for one candidate only one of them can be wrong, so `alpha` holds for the race.
    """

    limit: float
    alpha: float = ALPHA
    block: int = BLOCK
    ends_within: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it is a probability between 0 and 1")
        if self.block < 1:
            raise ValueError(f"block is {self.block}; a look needs at least one sample")

    def order(self, total: int) -> np.ndarray:
        """The random order in which the samples are seen; the same in every process."""
        return np.random.default_rng(self.seed).permutation(total)


class Racing:
    """Races under way, any number side by side; a single candidate is one row.

    Args:
        race: limit and error rate.
        total: samples of a whole evaluation; they are drawn without replacement.
        n_candidates: rows of what `see` takes.
    """

    def __init__(self, race: Race, total: int, *, n_candidates: int = 1) -> None:
        self._threshold = math.log(1 / race.alpha)
        self._ends_within = race.ends_within
        self._worse = _Wealth(race.limit, total, n_candidates)
        self._within = _Wealth(-race.limit, total, n_candidates)

    def see(self, differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add a block, `(n_candidates, n)` of -1, 0 and 1 (lost against FP32: 1).

        Returns two boolean arrays, `(n_candidates,)`: certainly worse, certainly within.
        """
        worse = self._worse.bet(differences) >= self._threshold
        within = self._within.bet(-differences) >= self._threshold
        return worse, within & ~worse & self._ends_within

    def verdict(self, differences: np.ndarray) -> Verdict | None:
        """`see` for a single candidate and a block of shape `(n,)`."""
        worse, within = self.see(differences[None])
        if worse[0]:
            return Verdict.WORSE
        return Verdict.WITHIN if within[0] else None


def interval_at_any_time(values: np.ndarray, *, alpha: float = ALPHA) -> tuple[float, float]:
    """The interval of the mean of values in [-1, 1] that holds wherever one stops.

    A confidence sequence for the population that the samples come from, as a full report's
    intervals are: the means against which the wealth of neither direction has reached
    2 / alpha. At a given number of samples it is wider than an interval for one look.
    """
    threshold = math.log(2 / alpha)
    return -_refuted_from(-values, threshold), _refuted_from(values, threshold)


def _refuted_from(values: np.ndarray, threshold: float) -> float:
    """The least mean that bets on smaller values refute; 1 where they refute none."""
    below, above = -1.0, 1.0
    for _ in range(_BISECTIONS if len(values) else 0):
        middle = (below + above) / 2
        if _Wealth(-middle, None, 1).bet(-values[None])[0] >= threshold:
            above = middle
        else:
            below = middle
    return above


class _Wealth:
    """The logarithm of what bets on large values have won against a mean of `claim` or less."""

    def __init__(self, claim: float, total: int | None, n_candidates: int) -> None:
        self._claim = claim
        self._total = total
        self._n_seen = 0
        self._sum = np.zeros((n_candidates, 1))
        self._log = np.zeros((n_candidates, len(_STAKES)))
        self._is_certain = np.zeros(n_candidates, dtype=bool)

    def bet(self, values: np.ndarray) -> np.ndarray:
        """The log wealth after the block `(n_candidates, n)`; infinite once it is certain."""
        sums = self._sum + np.cumsum(values, axis=1)
        expected = self._expected(sums - values, values.shape[1])
        # Below -1 the claim cannot hold whatever the rest is.
        self._is_certain |= (expected < -1 - 1e-9).any(axis=1)
        room = np.maximum(1 + expected, _LEAST_ROOM)
        gains = np.maximum((values - expected) / room, -1.0)
        self._log += np.log1p(_STAKES * gains[:, :, None]).sum(axis=1)
        self._sum, self._n_seen = sums[:, -1:], self._n_seen + values.shape[1]
        largest = self._log.max(axis=1, keepdims=True)
        mean = np.exp(self._log - largest).mean(axis=1)
        return np.where(self._is_certain, np.inf, largest[:, 0] + np.log(mean))

    def _expected(self, sums_before: np.ndarray, n: int) -> np.ndarray:
        """The mean that the claim leaves for each next sample."""
        if self._total is None:
            return np.full_like(sums_before, self._claim)
        left = self._total - self._n_seen - np.arange(n)
        return (self._total * self._claim - sums_before) / left
