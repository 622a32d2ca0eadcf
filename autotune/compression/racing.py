"""Racing: stop evaluating a candidate when the samples seen tell its accuracy drop well enough.

Owns the order of the samples and the forecast of those not seen; it runs no model. `accuracy.py`
feeds it block after block; which candidates race, and against which limit, is
`autotune.search`'s to say.

A sample's margin is by how much its label's log-probability exceeds the largest other one's: it
is right where the margin is positive. Compression shifts margins, and a sample changes sides
only where the shift outweighs FP32's margin, which is known of every sample beforehand. So

- the samples that most likely change come first: nearly all changes are among them. Every
  `DRAWN_EVERY`th is drawn at random from all that are left, so that a candidate which also
  breaks what was safe is seen to;
- the shifts seen tell how likely each sample not seen changes: they are taken as a share of the
  margin, fitted by least squares, plus a normal error. The expected changes are counted with
  those seen. The bounds around them take the error for Student's t, and where a larger share of
  the errors seen would be enough than that says, the share;
- some samples are easily shifted whatever is compressed. A candidate of the same model that was
  shown all of them tells which: in a job uniform INT8, or what is pruned alike and not quantized
  (`search/races.py`). Its shifts are the auxiliary variable of a regression estimate (Cochran 1977,
  "Sampling Techniques", chapter 7): they order the samples together with the margins, a share of
  them is fitted beside that of the margin, and the larger they are the larger is the error, by as
  much as is most likely for the shifts seen.

What the forecast assumes is that samples not seen shift like those seen, given both. It was
checked on every point of four measured tables (5,120 candidates, 300 samples,
`tests/benchmarks/tables.py`): the drop over all samples lay outside the race's bounds for 0, 0, 0
and 2 % of a model's points, and three points were called worse that were not. Drops that are called
known are off by 1.5, 2.1, 0.8 and 1.7 samples (root of the mean square); 11 to 13 % of the samples
were seen, where the margins alone need 15 to 20 %. A candidate that is called worse may be off by
several points of its drop, as its `error` says. Ordering and drawing samples by what is known
beforehand is that of Shekhar et al. 2023 ("Risk-limiting financial audits via weighted sampling
without replacement"); their bounds assume nothing of the samples, and would take a third of 300
to exclude 3 points.

A race is looked at after every block, and each look is another chance of a wrong verdict. What
corrects for it is the forecast's own error in the bound (`_FORECAST_ERROR`), which hardly changes
from look to look and is reckoned with at each: so the error rate is that of whole races with all
their looks. Over 300 scenarios of 2,000 simulated candidates each, without an auxiliary and with
several that tell much or nothing, at most 2.2 % had a drop outside the bounds that their race ended
with, 0.4 % a wrong "worse" among them (`racing_error_rate` of
`tests/benchmarks/accuracy_per_image.py`). What the bounds do not hold for is a single class of ten
that breaks while no sample of the others moves: it is known by the few of its samples that were
seen, and 8 % without an auxiliary and 3 to 9 % with one are outside, a fifth in the worst scenario.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr

ALPHA = 0.05
"""The error rate of one candidate's race: as that of the intervals in an accuracy report."""

BLOCK = 16
"""Samples between two looks: one of the evaluator's batches; a look costs less than 1 ms."""

LEAST_SEEN = 32
"""Samples before the first verdict: a class of ten that a candidate breaks is among them with a
probability of 97 %."""

DRAWN_EVERY = 8
"""Of the order of samples, each of this number is drawn at random. With 4 the bounds are wrong for
6 % instead of 8 % of candidates that break one class of ten, and searches on efficientnet_b0's
table need 0.25 instead of 0.24 of the samples."""

KNOWN_SHARE = 2 / 3
"""A race ends where the changes expected among samples not seen are at most this share of those
seen (of one where there are none). A difference of two counts varies as their sum does, so that
all samples would narrow the interval by a fifth (1 - sqrt(3 / 5)). Of 300 samples searches on the
four measured tables need 0.20, 0.20, 0.20 and 0.24 with it, FP32's and the auxiliary's included,
and find 0.993, 0.995, 1.000 and 0.998 of what those find that are told all (40 other seeds than
those it was chosen with; standard errors up to 0.002)."""

KNOWN_SHARE_ALONE = 0.25
"""The same without an auxiliary: the forecast is less sure, and with more than this the bounds of
one model's points are wrong for 5 % instead of 2 %."""

_DEGREES_OF_FREEDOM = 5
"""Of the error in the bounds. With a normal one there, and the margins alone, 22 % instead of 6 %
of 400 simulated candidates that break one class of ten end outside them. What is expected is a
normal one's all the same: of candidates that are known, among 400 points of each of four measured
tables, it is off by 1.1, 0.4, 0.1 and 0.7 of 300 samples instead of 1.4, 0.7, 1.0 and 1.1 (root of
the mean square, the margins alone, `KNOWN_SHARE` 1 / 6)."""

_FORECAST_ERROR = 0.35
"""Of the expected changes, relative: what the fit itself may be off. With 0.25, by the margins
alone, an eighth of one model's points, all far beyond the limit, are outside the bounds."""

LIKE_UNIFORM = 0.2
"""The share of uniform INT8's shift that a mixture's is thought to have before any is seen, as
surely as `_PRIOR_SAMPLES` say. Of what searches find that are told all, resnet18's find 0.95,
0.990, 0.992, 0.993 and 0.97 with 0, 0.15, 0.2, 0.25 and 0.3, efficientnet_b0's 0.975 with 0 and
0.994 or more with the others (60 seeds)."""

LIKE_BASE = 1.0
"""The same of a pruned base's, which differs from what is built on it by precisions alone. Races
of 43 candidates on five bases (400 samples, jobs of mobilenet_v2 and mobilenet_v3_small) ended
after 32 samples with the drop of all of them; by uniform INT8 they ended after 61 and 157 in the
mean, off by 2.4 and 5.6 samples, by the margins alone after 107 and 150, off by 0.7 and 6.1."""

_PRIOR_SAMPLES = 1.0
"""Of the auxiliary's mean squared shift: with 3 or 10 resnet18's searches find 0.991 or 0.987
instead of 0.992 (60 seeds)."""

_UNEVEN = (0.0, 0.1, 0.3, 1.0)
"""What is tried of how much larger the error's variance is where the auxiliary's shift is large:
by this times the shift's square over its mean one. With 3 and 10 among them one heavy error on a
sample that the auxiliary moves far makes all the others large: of candidates with heavy errors
whose auxiliary takes a part of every margin up to 5 instead of 2 % are outside the bounds."""

_LARGEST_SHARE = 2.0
"""Of the auxiliary's shift: a candidate may be worse than it is. A choice."""

_LEAST_SHIFT = 1e-9


class Verdict(StrEnum):
    """Why a race ended before its last sample."""

    WORSE = "worse"
    KNOWN = "known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a candidate that was shown every sample does to each, `(n,)` in the order of the data.

    `margins` are those of its labels, `divergences` the KL from FP32's answers in nats.
    """

    margins: np.ndarray
    divergences: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """What a candidate races against.

    `limit` is the accuracy drop, as a fraction, that a useful candidate does not exceed. A race
    ends when the drop over all samples exceeds it at the error rate `alpha`, or when the samples
    left would hardly change what is known. `likeness` is the share of the `auxiliary`'s shifts that
    is expected of the others' before any is seen.
    """

    limit: float
    alpha: float = ALPHA
    block: int = BLOCK
    seed: int = 0
    auxiliary: Shown | None = field(default=None, repr=False, compare=False)
    likeness: float = LIKE_UNIFORM

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it is a probability between 0 and 1")
        if self.block < 1:
            raise ValueError(f"block is {self.block}; a look needs at least one sample")

    def order(self, margins: np.ndarray) -> np.ndarray:
        """The order in which samples of these margins are seen, the same in every process."""
        n, shifts = len(margins), self.auxiliary_shifts(margins)
        distance = np.abs(margins) - self.likeness * shifts
        hardest = iter(np.argsort(distance / _scale(shifts), kind="stable").tolist())
        drawn = iter(np.random.default_rng(self.seed).permutation(n).tolist())
        is_taken = [False] * n
        order = []
        for is_drawn in was_drawn(n):
            index = next(i for i in (drawn if is_drawn else hardest) if not is_taken[i])
            is_taken[index] = True
            order.append(index)
        return np.array(order, dtype=int)

    def auxiliary_shifts(self, margins: np.ndarray) -> np.ndarray:
        """How far the auxiliary shifts each sample towards the side where it is not, `(n,)`.

        0 without one.
        """
        if self.auxiliary is None:
            return np.zeros(len(margins))
        others = self.auxiliary.margins
        if len(others) != len(margins):
            raise ValueError(
                f"the auxiliary has margins of {len(others)} samples, FP32 of {len(margins)}; "
                "they must be of the same data"
            )
        return _shifts(margins, others)

    def mean_divergence(self, divergences: np.ndarray, order: np.ndarray) -> float:
        """The mean over all samples, in nats, of what is known of the first ones of an order.

        As many times the auxiliary's as on the samples seen: a ratio estimate (Cochran 1977,
        chapter 6). Of 16 mixtures of four models each it is off by 0.27 to 0.33 of the truth after
        32 of 400 samples, most of it to one side; without an auxiliary, by those drawn at random,
        by 0.7 to 1.4. Of 43 mixtures on pruned bases it is off by 0.01 instead of 0.3 and 0.6.
        """
        if self.auxiliary is not None:
            of_all = self.auxiliary.divergences
            of_seen = float(of_all[order[: len(divergences)]].sum())
            if of_seen > _LEAST_SHIFT:
                return float(divergences.sum()) / of_seen * float(of_all.mean())
        return mean_over_all(divergences, len(order))


def _shifts(margins: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far each margin moved towards the side where the sample is not, `(..., n)`."""
    found: np.ndarray = np.abs(margins) - np.where(margins > 0, others, -others)
    return found


def _scale(shifts: np.ndarray, uneven: float = 1.0) -> np.ndarray:
    """How large errors are relative to those of samples that the auxiliary leaves, `(n,)`."""
    squares = shifts**2
    found: np.ndarray = np.sqrt(1 + uneven * squares / max(float(squares.mean()), _LEAST_SHIFT))
    return found


def was_drawn(n: int) -> np.ndarray:
    """Which of the first samples of an order were drawn at random, `(n,)`."""
    found: np.ndarray = np.arange(n) % DRAWN_EVERY == DRAWN_EVERY - 1
    return found


def mean_over_all(values: np.ndarray, total: int) -> float:
    """The mean over all samples of what is known of the first ones of an order, `(n,)`.

    Those drawn stand for all that were not among the hardest: a stratified estimate.
    """
    if len(values) == total:
        return float(values.mean())
    is_drawn = was_drawn(len(values))
    hardest = values[~is_drawn]
    rest = float((values[is_drawn] if is_drawn.any() else hardest).mean())
    return (float(hardest.sum()) + rest * (total - len(hardest))) / total


def label_margins(log_p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """By how much each label's log-probability exceeds the largest other one's, `(n,)`.

    Positive exactly where top-1 is right; of equal ones the first class wins, as argmax has it.
    """
    rows = np.arange(len(y))
    others = log_p.copy()
    others[rows, y] = -np.inf
    # With a single class there is no other one: every sample is right by as much as can be.
    margins = np.clip(log_p[rows, y] - others.max(axis=1), -1e3, 1e3)
    is_right = log_p.argmax(axis=1) == y
    found: np.ndarray = np.where(is_right, np.maximum(margins, 1e-12), np.minimum(margins, 0.0))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What races know after a block; arrays `(n_candidates,)`, counts of all the samples.

    `lost` and `won` are the samples that FP32 alone and the candidate alone get right: those
    seen and those `expected` of the ones not seen. `error` is one standard deviation of their
    difference. `drop` is that over all samples, a fraction, to a tenth of a sample: candidates
    of which nothing is expected to differ are equal, as all samples would have them. `low` and
    `high` bound it at the race's error rate.
    """

    expected: np.ndarray
    drop: np.ndarray
    lost: np.ndarray
    won: np.ndarray
    error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    is_worse: np.ndarray
    is_known: np.ndarray

    def verdict(self, candidate: int = 0) -> Verdict | None:
        """Why that candidate's race ends here; None where it goes on."""
        if self.is_worse[candidate]:
            return Verdict.WORSE
        return Verdict.KNOWN if self.is_known[candidate] else None


class Racing:
    """Races under way, any number side by side; a single candidate is one row.

    Args:
        race: limit, error rate and order of the samples, which `order` gives.
        margins: FP32's, of all samples.
        n_candidates: rows of what `see` takes.
    """

    def __init__(self, race: Race, margins: np.ndarray, *, n_candidates: int = 1) -> None:
        self._race = race
        self.order = race.order(margins)
        self._margins = margins[self.order]
        self._sizes, self._is_right = np.abs(self._margins), self._margins > 0
        self._auxiliary = race.auxiliary_shifts(margins)[self.order]
        unevenness = _UNEVEN if self._auxiliary.any() else _UNEVEN[:1]
        self._scales = [_scale(self._auxiliary, each) for each in unevenness]
        self._weight = _PRIOR_SAMPLES * (float((self._auxiliary**2).mean()) or 1.0)
        # One that changes no sample tells little of what does.
        tells = bool((self._auxiliary >= self._sizes).any())
        self._known_share = KNOWN_SHARE if tells else KNOWN_SHARE_ALONE
        self._z = NormalDist().inv_cdf(1 - race.alpha / 2)
        self._shifts = np.zeros((n_candidates, 0))
        self._lost, self._won = np.zeros(n_candidates), np.zeros(n_candidates)

    def see(self, margins: np.ndarray) -> Standing:
        """Add the candidates' margins on the next block of `order`, `(n_candidates, n)`."""
        n_before = self._shifts.shape[1]
        part = slice(n_before, n_before + margins.shape[1])
        was_right = self._is_right[part]
        self._shifts = np.hstack([self._shifts, _shifts(self._margins[part], margins)])
        self._lost += (was_right & (margins <= 0)).sum(axis=1)
        self._won += (~was_right & (margins > 0)).sum(axis=1)
        return self._standing()

    def _standing(self) -> Standing:
        total, n_seen = len(self._sizes), self._shifts.shape[1]
        likely, possible, reckoned = self._changes()
        # Whole samples change, no more than all right ones to wrong and all wrong ones to right.
        is_right = self._is_right[n_seen:]
        so_far, side = self._lost - self._won, np.where(is_right, 1.0, -1.0)
        to_lose, to_win = likely[:, is_right].sum(axis=1), likely[:, ~is_right].sum(axis=1)
        middle = so_far + possible @ side
        expected = reckoned.sum(axis=1)
        error = np.sqrt(expected + (_FORECAST_ERROR * expected) ** 2)
        low = np.maximum(np.floor(middle - self._z * error), so_far - (~is_right).sum())
        high = np.minimum(np.ceil(middle + self._z * error), so_far + is_right.sum())
        drop = np.clip(so_far + to_lose - to_win, low, high)
        may_end = n_seen >= LEAST_SEEN
        seen = np.maximum(self._lost + self._won, 1.0)
        return Standing(
            expected=expected,
            drop=np.round(drop, 1) / total,
            lost=self._lost + to_lose,
            won=self._won + to_win,
            error=error,
            low=low / total,
            high=high / total,
            is_worse=may_end & (low > self._race.limit * total + 1e-9),
            is_known=may_end & (expected <= self._known_share * seen),
        )

    def _changes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How likely each sample not seen changes, each `(n_candidates, n_left)`.

        With the errors seen taken as normal ones; with tails as long as may be; and as the
        error reckons with: where a larger share of the errors seen would be enough, the share.
        """
        n_seen, left = self._shifts.shape[1], slice(self._shifts.shape[1], None)
        shares, scales = self._fitted()
        explained = shares @ np.array([self._sizes, self._auxiliary])
        errors = (self._shifts - explained[:, :n_seen]) / scales[:, :n_seen]
        errors.sort(axis=1)
        spread = np.sqrt((errors**2).mean(axis=1, keepdims=True))
        needed = (self._sizes[left] - explained[:, left]) / scales[:, left]
        reached = [1 - np.searchsorted(*pair) / n_seen for pair in zip(errors, needed, strict=True)]
        needed /= np.maximum(spread, _LEAST_SHIFT)
        possible = student_tail(needed)
        return normal_tail(needed), possible, np.maximum(possible, reached)

    def _fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """What explains each candidate's shifts best, and how large errors then are.

        Parts of the margin and of the auxiliary's shift, `(n_candidates, 2)`; errors relative to
        each other, `(n_candidates, total)`.
        """
        n, n_seen = self._shifts.shape
        shares, scales = np.zeros((n, 2)), np.ones((n, len(self._sizes)))
        likeliest = np.full(n, -np.inf)
        for scale in self._scales:
            found, likelihood = self._fitted_with(scale[:n_seen])
            is_likelier = likelihood > likeliest
            likeliest = np.where(is_likelier, likelihood, likeliest)
            shares[is_likelier], scales[is_likelier] = found[is_likelier], scale
        return shares, scales

    def _fitted_with(self, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of margin and auxiliary where errors are as `scale`; their log-likelihoods.

        Least squares, with the prior of the auxiliary's share as so many samples more.
        """
        sizes, auxiliary = (x[: len(scale)] / scale for x in (self._sizes, self._auxiliary))
        shifts = self._shifts / scale
        cross = float(sizes @ auxiliary)
        squares = float(sizes @ sizes), float(auxiliary @ auxiliary) + self._weight
        moments = shifts @ sizes, shifts @ auxiliary + self._weight * self._race.likeness
        determinant = max(squares[0] * squares[1] - cross**2, _LEAST_SHIFT)
        of_size = np.clip((moments[0] * squares[1] - moments[1] * cross) / determinant, 0.0, 1.0)
        # Given that one, which may have been clipped.
        of_auxiliary = (moments[1] - of_size * cross) / squares[1]
        shares = np.column_stack([of_size, np.clip(of_auxiliary, 0.0, _LARGEST_SHARE)])
        errors = shifts - shares @ np.array([sizes, auxiliary])
        return shares, _log_likelihood(errors, scale)


def _log_likelihood(errors: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Of normal errors `(n_candidates, n)`, already divided by `scale`, but for a constant."""
    variance = np.maximum((errors**2).mean(axis=1), _LEAST_SHIFT**2)
    found: np.ndarray = -len(scale) / 2 * np.log(variance) - float(np.log(scale).sum())
    return found


def normal_tail(t: np.ndarray) -> np.ndarray:
    """The probability that a normal error of deviation 1 exceeds `t`.

    >>> normal_tail(np.array([0.0, 1.96])).round(4).tolist()
    [0.5, 0.025]
    """
    found: np.ndarray = ndtr(-t)
    return found


def student_tail(t: np.ndarray) -> np.ndarray:
    """The probability that Student's t of five degrees of freedom exceeds `t`, never below 0.

    Abramowitz and Stegun 26.7.3, for an odd number of degrees.

    >>> student_tail(np.array([0.0, 2.5706, -2.5706])).round(4).tolist()
    [0.5, 0.025, 0.975]
    """
    x = t / math.sqrt(_DEGREES_OF_FREEDOM)
    cosine = 1 / (1 + x**2)
    within = np.arctan(x) + x * cosine * (1 + 2 / 3 * cosine)
    found: np.ndarray = np.maximum(0.5 - within / math.pi, 0.0)
    return found
