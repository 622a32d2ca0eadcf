"""Accuracy of an artifact: the file itself in a plain session, paired with FP32.

Owns the metric and its intervals. The artifact runs in onnxruntime's CPU provider with
default options, or in the runtime that it ships with, as a user would run it; simulated
quantization is never trusted. Latency is `device_agents`' to measure; when an evaluation may
end early, `racing.py`'s to decide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autotune.compression.data import LabelledData
from autotune.compression.racing import (
    Race,
    Racing,
    Shown,
    Standing,
    Verdict,
    label_margins,
)
from autotune.compression.session import Session
from autotune.compression.shipped_runtime import BY_ONNXRUNTIME, open_answers
from autotune.errors import CompressionError, InvalidModel
from storage.records import AccuracyReport

CONFIDENCE_LEVEL = 0.95
ONNXRUNTIME = "onnxruntime"
_WHAT = "the artifact"
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
_Answers = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Probabilities under 1e-12 count as 1e-12, so that one missing class cannot make the mean
# divergence infinite.
_LEAST_LOG = math.log(1e-12)
LARGEST_DIVERGENCE = -_LEAST_LOG
"""What one sample contributes at most, in nats."""


class AccuracyEvaluator:
    """Judges artifacts on one fixed set of samples; FP32 has run once.

    Arrays may be read-only. Not thread-safe.
    """

    def __init__(self, fp32: bytes, data: LabelledData, *, split: str, threads: int = 1) -> None:
        self._data = data
        self._split = split
        self._threads = threads
        try:
            outputs = _finite(Session(fp32, threads=threads, what=_WHAT).answers(data.x))
        except CompressionError as error:
            raise InvalidModel(f"the FP32 model cannot be evaluated: {error}") from error
        self._log_p = log_probabilities(outputs)
        self._fp32_correct = outputs.argmax(axis=1) == data.y
        self._margins = label_margins(self._log_p, data.y)

    @property
    def n_samples(self) -> int:
        """How many samples every report is about."""
        return len(self._data)

    def evaluate(
        self, artifact: bytes, *, race: Race | None = None, runtime: str = ONNXRUNTIME
    ) -> AccuracyReport:
        """The artifact's top-1 on the samples, its interval, and its drop against FP32.

        With a `race` the samples come in its order and the evaluation ends where it does; the
        report says so, and forecasts the samples that were not seen. `runtime` is the one that
        the artifact ships with: each has arithmetic of its own.

        Raises:
            CompressionError: the artifact does not load or run, or its output is NaN.
        """
        if race is None:
            return self.complete(artifact, runtime=runtime)[0]
        started = time.monotonic()
        return self._raced(race, _answers(artifact, runtime, self._threads), started)

    def complete(
        self, artifact: bytes, *, runtime: str = ONNXRUNTIME
    ) -> tuple[AccuracyReport, Shown]:
        """The report on every sample, and what others may race by.

        Raises:
            CompressionError: as `evaluate`.
        """
        started = time.monotonic()
        answers = _answers(artifact, runtime, self._threads)
        outputs = self._fitting(answers(self._data.x, np.arange(self.n_samples)))
        log_q = log_probabilities(outputs)
        kl = kl_divergences(self._log_p, log_q)
        correct = outputs.argmax(axis=1) == self._data.y
        report = self._report(correct, _mean(kl), time.monotonic() - started)
        return report, Shown(margins=label_margins(log_q, self._data.y), divergences=kl)

    def _raced(self, race: Race, answers: _Answers, started: float) -> AccuracyReport:
        n, racing = self.n_samples, Racing(race, self._margins)
        order = racing.order
        correct, kl = np.zeros(n, dtype=bool), np.zeros(n)
        seen, verdict = 0, None
        while seen < n and verdict is None:
            part = order[seen : seen + race.block]
            log_q = log_probabilities(self._fitting(answers(self._data.x, part)))
            margins = label_margins(log_q, self._data.y[part])
            correct[part] = margins > 0
            kl[part] = kl_divergences(self._log_p[part], log_q)
            seen += len(part)
            standing = racing.see(margins[None])
            # After the last sample nothing is left to save, and the drop itself is known.
            verdict = standing.verdict() if seen < n else None
        if verdict is None:
            return self._report(correct, _mean(kl), time.monotonic() - started)
        mean_kl = max(0.0, race.mean_divergence(kl[order[:seen]], order))
        report = self._forecast(standing, seen, mean_kl, time.monotonic() - started)
        return replace(report, stopped_early=_reason(race, standing, seen, n))

    def _fitting(self, outputs: np.ndarray) -> np.ndarray:
        if outputs.shape[1:] != self._log_p.shape[1:]:
            raise CompressionError(
                f"the artifact answers with shape {('n', *outputs.shape[1:])}, "
                f"FP32 with {('n', *self._log_p.shape[1:])}"
            )
        return outputs

    def _report(self, correct: np.ndarray, mean_kl: float, wall_s: float) -> AccuracyReport:
        n = self.n_samples
        right, fp32_right = int(correct.sum()), int(self._fp32_correct.sum())
        low, high = wilson_interval(right, n)
        drop_low, drop_high = paired_difference_interval(self._fp32_correct, correct)
        return AccuracyReport(
            split=self._split,
            n_samples=n,
            value=right / n,
            value_low=low,
            value_high=high,
            fp32_value=fp32_right / n,
            # From counts: 6 of 600 samples are 0.01, without the rounding of two fractions.
            drop=(fp32_right - right) / n,
            drop_low=drop_low,
            drop_high=drop_high,
            mean_kl=mean_kl,
            confidence_level=CONFIDENCE_LEVEL,
            wall_s=wall_s,
        )

    def _forecast(
        self, standing: Standing, seen: int, mean_kl: float, wall_s: float
    ) -> AccuracyReport:
        """The report on all samples, those not seen as the race expects them.

        Each interval is the one that so many lost and won would have, widened by how far the
        race's bounds are from what it expects; independent errors add up in squares.
        """
        n = self.n_samples
        lost, won, error = (float(x[0]) for x in (standing.lost, standing.won, standing.error))
        fp32_right = int(self._fp32_correct.sum())
        # From a count, as in `_report`: of two candidates that are right as often the one that
        # raced must not come out better by a rounding, or it takes the other's place on the front.
        right = min(max(fp32_right - round(float(standing.drop[0]) * n, 1), 0.0), float(n))
        drop = (fp32_right - right) / n
        less, more = drop - float(standing.low[0]), float(standing.high[0]) - drop

        interval = _paired_interval(fp32_right - lost, lost, won, n)
        drop_low, drop_high = _widened(drop, interval, below=less, above=more)
        low, high = _widened(right / n, wilson_interval(right, n), below=more, above=less)
        return AccuracyReport(
            split=self._split,
            n_samples=seen,
            value=right / n,
            value_low=max(low, 0.0),
            value_high=min(high, 1.0),
            fp32_value=fp32_right / n,
            drop=drop,
            drop_low=max(drop_low, -1.0),
            drop_high=min(drop_high, 1.0),
            # No better known than to a sample, as all samples would tell it.
            drop_error=max(error, 1.0) / n,
            mean_kl=mean_kl,
            confidence_level=CONFIDENCE_LEVEL,
            wall_s=wall_s,
        )


def _widened(
    value: float, interval: tuple[float, float], *, below: float, above: float
) -> tuple[float, float]:
    low, high = interval
    return value - math.hypot(value - low, below), value + math.hypot(high - value, above)


def _reason(race: Race, standing: Standing, seen: int, total: int) -> str:
    enough = f"{seen} of {total} samples were enough"
    if standing.verdict() is Verdict.WORSE:
        return (
            f"{enough}: the accuracy drop exceeds {100 * race.limit:g} points "
            f"(error rate {100 * race.alpha:g} %)"
        )
    expected = float(standing.expected[0])
    how_many = f"{expected:.2g}" if expected >= 0.05 else "almost none"
    return f"{enough}: {how_many} of those left are expected to change sides"


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); expected counts need not be whole.

    Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3.

    >>> low, high = wilson_interval(81, 263)
    >>> round(low, 4), round(high, 4)
    (0.2553, 0.3662)
    """
    p, z = successes / n, _Z
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # With all or none right one bound is exact; rounding would leave it beside the proportion.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def paired_difference_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of mean(first) - mean(second), two boolean arrays over the same samples.

    Newcombe 1998, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17, 2635-2650, method 10: the
    Wilson intervals of both proportions joined through their continuity-corrected
    correlation phi. It keeps its coverage where nothing or little differs.
    """
    both = int((first & second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    return _paired_interval(both, only_first, only_second, len(first))


def _paired_interval(
    both: float, only_first: float, only_second: float, n: int
) -> tuple[float, float]:
    """The same from counts, which need not be whole."""
    neither = n - both - only_first - only_second
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    low1, high1 = wilson_interval(both + only_first, n)
    low2, high2 = wilson_interval(both + only_second, n)
    phi = _correlation(both, only_first, only_second, neither)
    below = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    above = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    difference = p1 - p2
    return difference - math.sqrt(max(below, 0.0)), difference + math.sqrt(max(above, 0.0))


def mean_kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Mean over samples of KL(p || q) in nats; 0 for equal distributions, larger is worse.

    Both are log-probabilities of shape `(n_samples, n_classes)`, none under log(1e-12).
    """
    return _mean(kl_divergences(log_p, log_q))


def kl_divergences(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each sample in nats, `(n_samples,)`, from such log-probabilities."""
    found: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return found


def _mean(divergences: np.ndarray) -> float:
    """Not below 0, where rounding would put that of equal distributions; NaN stays NaN."""
    return float(np.maximum(divergences.mean(), 0.0))


def _correlation(both: float, only_first: float, only_second: float, neither: float) -> float:
    margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    if margins <= 0:
        return 0.0
    product = float(both * neither - only_first * only_second)
    if product > 0:
        n = both + only_first + only_second + neither
        product = max(product - n / 2, 0.0)
    return product / math.sqrt(margins)


def log_probabilities(outputs: np.ndarray) -> np.ndarray:
    """Log-softmax; outputs that are probabilities already are only taken the logarithm of."""
    values = outputs.astype(np.float64)
    sums = values.sum(axis=1)
    if (values >= 0).all() and np.allclose(sums, 1.0, atol=0.02):
        logs = np.log(np.maximum(values / sums[:, None], 1e-300))
    else:
        shifted = values - values.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.maximum(logs, _LEAST_LOG)


def _answers(artifact: bytes, runtime: str, threads: int) -> _Answers:
    """From all samples and the rows that are asked for to the outputs on these."""
    if runtime in BY_ONNXRUNTIME:
        session = Session(artifact, threads=threads, what=_WHAT)
        return lambda x, rows: _finite(session.answers(_chosen(x, rows)))
    answers = open_answers(artifact, runtime, threads=threads)
    return lambda x, rows: _finite(answers(x[rows]))


def _chosen(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # One copy for a race's random order; none where the samples lie one behind the other.
    in_order = bool((np.diff(rows) == 1).all())
    return x[rows[0] : rows[-1] + 1] if in_order else x[rows]


def _finite(outputs: np.ndarray) -> np.ndarray:
    if not np.isfinite(outputs).all():
        bad = int((~np.isfinite(outputs)).any(axis=1).sum())
        raise CompressionError(f"the artifact's output is NaN or infinite on {bad} samples")
    return outputs
