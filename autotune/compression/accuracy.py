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
import onnxruntime

from autotune.compression.data import LabelledData
from autotune.compression.racing import Race, Racing, Verdict, interval_at_any_time
from autotune.compression.shipped_runtime import BY_ONNXRUNTIME, open_answers
from autotune.errors import CompressionError, InvalidModel
from storage.records import AccuracyReport

CONFIDENCE_LEVEL = 0.95
ONNXRUNTIME = "onnxruntime"
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
_Z_HALF_ALPHA = 2.241402727604947  # its 98.75 % quantile: an interval at half the error rate
_BATCH = 16
# Probabilities under 1e-12 count as 1e-12, so that one missing class cannot make the mean
# divergence infinite: no sample contributes more than 28 nats.
_LEAST_LOG = math.log(1e-12)


class AccuracyEvaluator:
    """Judges artifacts on one fixed set of samples; FP32 has run once.

    Arrays may be read-only. Not thread-safe.
    """

    def __init__(self, fp32: bytes, data: LabelledData, *, split: str, threads: int = 1) -> None:
        self._data = data
        self._split = split
        self._threads = threads
        started = time.monotonic()
        try:
            outputs = _outputs(_session(fp32, threads), data.x, np.arange(len(data)))
        except CompressionError as error:
            raise InvalidModel(f"the FP32 model cannot be evaluated: {error}") from error
        self._log_p = log_probabilities(outputs)
        self._fp32_correct = outputs.argmax(axis=1) == data.y
        self._fp32_wall_s = time.monotonic() - started

    @property
    def n_samples(self) -> int:
        """How many samples every report is about."""
        return len(self._data)

    @property
    def fp32_report(self) -> AccuracyReport:
        """The source model's own report: its drop and its divergence are 0."""
        return self._report(self._fp32_correct, 0.0, self._fp32_wall_s)

    def evaluate(
        self, artifact: bytes, *, race: Race | None = None, runtime: str = ONNXRUNTIME
    ) -> AccuracyReport:
        """The artifact's top-1 on the samples, its interval, and its drop against FP32.

        With a `race` the samples come in random order and the evaluation ends as soon as they
        leave no doubt on which side of the race's limit the drop is; the report says so.
        `runtime` is the one that the artifact ships with: each has arithmetic of its own.

        Raises:
            CompressionError: the artifact does not load or run, or its output is NaN.
        """
        started = time.monotonic()
        answers = _answers(artifact, runtime, self._threads)
        n = self.n_samples
        order = np.arange(n) if race is None else race.order(n)
        racing = None if race is None else Racing(race, n)
        outputs = np.empty(self._log_p.shape, dtype=np.float32)
        seen, verdict = 0, None
        while seen < n and verdict is None:
            part = order[seen : n if race is None else seen + race.block]
            outputs[part] = self._fitting(answers(self._data.x, part))
            seen += len(part)
            # After the last sample nothing is left to save, and the drop itself is known.
            if racing is not None and seen < n:
                verdict = racing.verdict(self._lost(part, outputs[part]))
        rows = np.sort(order[:seen])
        log_q = log_probabilities(outputs[rows])
        report = self._report(
            outputs[rows].argmax(axis=1) == self._data.y[rows],
            mean_kl_divergence(self._log_p[rows], log_q),
            time.monotonic() - started,
            rows=rows,
        )
        if race is None or verdict is None:
            return report
        lost = self._lost(rows, outputs[rows])
        return self._stopped(report, lost, _reason(race, verdict, seen, n))

    def _lost(self, rows: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """1 for each sample that FP32 alone gets right, -1 where only the artifact does."""
        correct = outputs.argmax(axis=1) == self._data.y[rows]
        return self._fp32_correct[rows].astype(np.int8) - correct.astype(np.int8)

    def _fitting(self, outputs: np.ndarray) -> np.ndarray:
        if outputs.shape[1:] != self._log_p.shape[1:]:
            raise CompressionError(
                f"the artifact answers with shape {('n', *outputs.shape[1:])}, "
                f"FP32 with {('n', *self._log_p.shape[1:])}"
            )
        return outputs

    def _stopped(self, report: AccuracyReport, lost: np.ndarray, reason: str) -> AccuracyReport:
        """The report with figures that hold although the data said when to stop.

        The accuracy is FP32's on all samples less the drop on those seen, so that it compares
        with reports on all of them: whether the samples seen were easy ones cancels out. Its
        bounds join those of both parts, each at half the error rate (Bonferroni).
        """
        alpha = 1 - CONFIDENCE_LEVEL
        drop_low, drop_high = interval_at_any_time(lost, alpha=alpha)
        least, most = interval_at_any_time(lost, alpha=alpha / 2)
        fp32_value = float(self._fp32_correct.mean())
        fp32_low, fp32_high = wilson_interval(
            int(self._fp32_correct.sum()), self.n_samples, z=_Z_HALF_ALPHA
        )
        return replace(
            report,
            fp32_value=fp32_value,
            value=fp32_value - report.drop,
            value_low=max(fp32_low - most, 0.0),
            value_high=min(fp32_high - least, 1.0),
            drop_low=drop_low,
            drop_high=drop_high,
            stopped_early=reason,
        )

    def _report(
        self, correct: np.ndarray, mean_kl: float, wall_s: float, *, rows: np.ndarray | None = None
    ) -> AccuracyReport:
        fp32_correct = self._fp32_correct if rows is None else self._fp32_correct[rows]
        n = len(correct)
        low, high = wilson_interval(int(correct.sum()), n)
        drop_low, drop_high = paired_difference_interval(fp32_correct, correct)
        value, fp32_value = float(correct.mean()), float(fp32_correct.mean())
        return AccuracyReport(
            split=self._split,
            n_samples=n,
            value=value,
            value_low=low,
            value_high=high,
            fp32_value=fp32_value,
            # From counts: 6 of 600 samples are 0.01, without the rounding of two fractions.
            drop=(int(fp32_correct.sum()) - int(correct.sum())) / n,
            drop_low=drop_low,
            drop_high=drop_high,
            mean_kl=mean_kl,
            confidence_level=CONFIDENCE_LEVEL,
            wall_s=wall_s,
        )


def _reason(race: Race, verdict: Verdict, seen: int, total: int) -> str:
    says = "exceeds" if verdict is Verdict.WORSE else "stays within"
    return (
        f"{seen} of {total} samples were enough: the accuracy drop {says} "
        f"{100 * race.limit:g} points (error rate at most {100 * race.alpha:g} %)"
    )


def wilson_interval(successes: int, n: int, *, z: float = _Z) -> tuple[float, float]:
    """The score interval of a proportion, 95 % for the default `z` (Wilson 1927).

    Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3.

    >>> low, high = wilson_interval(81, 263)
    >>> round(low, 4), round(high, 4)
    (0.2553, 0.3662)
    """
    p = successes / n
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
    n = len(first)
    both = int((first & second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
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
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()))


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    if margins == 0:
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


def _answers(
    artifact: bytes, runtime: str, threads: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """From all samples and the rows that are asked for to the outputs on these."""
    if runtime in BY_ONNXRUNTIME:
        session = _session(artifact, threads)
        return lambda x, rows: _outputs(session, x, rows)
    answers = open_answers(artifact, runtime, threads=threads)
    return lambda x, rows: _finite(answers(x[rows]))


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime's exceptions share no public base class
        raise CompressionError(f"onnxruntime cannot run the artifact: {error}") from error


def _outputs(session: onnxruntime.InferenceSession, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The answers on those samples, batch by batch."""
    name = session.get_inputs()[0].name
    # One copy for a race's random order; none where the samples lie one behind the other.
    in_order = bool((np.diff(rows) == 1).all())
    chosen = x[rows[0] : rows[-1] + 1] if in_order else x[rows]
    try:
        parts = [
            session.run(None, {name: np.ascontiguousarray(chosen[i : i + _BATCH])})[0]
            for i in range(0, len(rows), _BATCH)
        ]
    except Exception as error:
        # onnxruntime's exceptions share no public base class
        raise CompressionError(f"onnxruntime cannot run the artifact: {error}") from error
    return _finite(np.concatenate(parts))


def _finite(outputs: np.ndarray) -> np.ndarray:
    if not np.isfinite(outputs).all():
        bad = int((~np.isfinite(outputs)).any(axis=1).sum())
        raise CompressionError(f"the artifact's output is NaN or infinite on {bad} samples")
    return outputs
