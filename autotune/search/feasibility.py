"""What a trial may cost at most: the limits of a question, and how far a trial is past them.

Owns what feasible means. Of a latency it is the upper bound of its interval, at the quantile
that was asked for; of size, peak memory and energy the figure itself. A figure that is not
known is past every limit. Which trial answers a question is `front.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from autotune.errors import InvalidJob
from autotune.limits import QUANTILES, amounts, bytes_text, joules_text, ms_text
from device_agents.protocol import LatencyReport, Quantile
from device_agents.quantiles import tail_bounds
from storage.records import DeviceRecord, JobRecord, TrialRecord

_DROP_UNIT = 0.01
"""A drop past its limit is told to the sampler in points, as the others are in their limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper limits, all positive; None where any figure will do.

    `latency_ns` bounds the latency at the quantile `at`. `size_bytes` is the artifact's file,
    `memory_bytes` the peak of a process that serves it, `energy_joules` one inference's.
    """

    latency_ns: float | None = None
    at: Quantile = "p50"
    size_bytes: float | None = None
    memory_bytes: float | None = None
    energy_joules: float | None = None

    def excesses(self, trial: TrialRecord, report: LatencyReport | None) -> dict[str, float]:
        """By what fraction of each limit the trial is past it, by the limit's name.

        At or below 0 the limit is kept; infinite where the figure is not known. `report` is the
        trial's latency that counts.
        """
        figures = {
            "latency": (
                self.latency_ns,
                None if report is None else at_quantile(report, self.at).high_ns,
            ),
            "size": (self.size_bytes, trial.artifact_size_bytes),
            "memory": (self.memory_bytes, None if report is None else report.peak_memory_bytes),
            "energy": (self.energy_joules, None if report is None else report.energy_joules),
        }
        return {
            name: math.inf if figure is None or not math.isfinite(figure) else figure / limit - 1
            for name, (limit, figure) in figures.items()
            if limit is not None
        }

    def texts(self, *, on_every_device: bool = False) -> dict[str, str]:
        """Each limit in words, by its name."""
        latency = (
            "the budget on every device" if on_every_device else ms_text(self.latency_ns or 0.0)
        )
        if self.at != "p50":
            latency += f" at {self.at}"
        texts = {
            "latency": (self.latency_ns, latency),
            "size": (self.size_bytes, f"a file of {bytes_text(self.size_bytes or 0)}"),
            "memory": (self.memory_bytes, f"{bytes_text(self.memory_bytes or 0)} of memory"),
            "energy": (self.energy_joules, f"{joules_text(self.energy_joules or 0)} an inference"),
        }
        return {name: text for name, (limit, text) in texts.items() if limit is not None}

    def in_words(self, *, on_every_device: bool = False) -> str:
        """All limits in words; empty without any."""
        *first, last = self.texts(on_every_device=on_every_device).values() or [""]
        return f"{', '.join(first)} and {last}" if first else last


ANY = Limits()
"""No limits at all."""


def limits_of(job: JobRecord) -> Limits:
    """The limits of a job on its primary device, as far as they are known yet."""
    return with_amounts(
        Limits(latency_ns=job.latency_budget_ns, at=job.spec.get("latency_at", "p50")),
        amounts(job.spec),
    )


def with_amounts(limits: Limits, given: Mapping[str, float]) -> Limits:
    """The limits with others of `autotune.limits.AMOUNTS` where they are given."""
    fields = {
        "max_size": "size_bytes",
        "max_memory": "memory_bytes",
        "max_energy": "energy_joules",
    }
    changes: dict[str, Any] = {fields[key]: amount for key, amount in given.items()}
    return replace(limits, **changes)


class AtQuantile(NamedTuple):
    """A latency at one quantile with its interval; an end is None where samples were too few."""

    ns: float
    low_ns: float | None
    high_ns: float | None


def at_quantile(report: LatencyReport, at: Quantile) -> AtQuantile:
    """The latency at that quantile."""
    known = (
        AtQuantile(report.p50_ns, report.p50_low_ns, report.p50_high_ns),
        AtQuantile(report.p90_ns, report.p90_low_ns, report.p90_high_ns),
        AtQuantile(report.p99_ns, report.p99_low_ns, report.p99_high_ns),
    )
    return known[QUANTILES.index(at)]


def bounded(report: LatencyReport) -> LatencyReport:
    """The report with the tail's bounds; from its samples where the agent did not send all."""
    if None not in (report.p90_low_ns, report.p90_high_ns) or not report.blocks:
        return report
    bounds = tail_bounds(
        report.blocks,
        reference_latency_ns=report.reference_latency_ns,
        reference_rest_ns=report.reference_rest_ns,
        reference_ns=report.reference_p50_ns,
    )
    return report.model_copy(update=bounds)


def constraints(
    trial: TrialRecord,
    report: LatencyReport | None,
    *,
    limits: Limits,
    max_accuracy_drop: float | None,
) -> dict[str, float]:
    """What an optimizer is told of a trial's feasibility: kept where all are at or below 0.

    The excesses, one that is not known as a whole limit; the drop's in points.
    """
    found = {
        name: min(excess, 1.0) if math.isinf(excess) else excess
        for name, excess in limits.excesses(trial, report).items()
    }
    if max_accuracy_drop is not None and trial.accuracy is not None:
        found["accuracy_drop"] = (trial.accuracy.drop - max_accuracy_drop) / _DROP_UNIT
    return found


def require_sensors(spec: Mapping[str, Any], devices: Sequence[DeviceRecord]) -> None:
    """Return where each device can measure what the job limits or improves.

    A device of an earlier release does not say whether it measures energy; its first
    measurement will tell (`require_figures`).

    Raises:
        InvalidJob: one cannot; each is named with its reason.
    """
    if not needs_energy(spec):
        return
    without = [d for d in devices if d.description.energy_missing is not None]
    if without:
        listed = "; ".join(f"{d.name}: {d.description.energy_missing}" for d in without)
        raise InvalidJob(
            f"the job asks about energy, which cannot be measured on {listed}. Leave out "
            "max_energy and the objective energy, or name other devices"
        )


def require_figures(spec: Mapping[str, Any], device_name: str, fp32: LatencyReport) -> None:
    """Return where the FP32 model's measurement has every figure that the job asks about.

    Raises:
        InvalidJob: one is missing.
    """
    objectives = spec.get("search", {}).get("objectives", ())
    if needs_energy(spec) and fp32.energy_joules is None:
        why = fp32.energy_source or "its agent gave no reason"
        raise InvalidJob(
            f"the job asks about energy, which device {device_name} did not measure: {why}. Leave "
            "out max_energy and the objective energy, or name another device"
        )
    if (spec.get("max_memory") or "memory" in objectives) and fp32.peak_memory_bytes is None:
        raise InvalidJob(
            f"the job asks about memory, which device {device_name} did not measure. Leave out "
            "max_memory and the objective memory, or name another device"
        )


def needs_energy(spec: Mapping[str, Any]) -> bool:
    """The job limits or improves the energy of an inference."""
    return bool(spec.get("max_energy")) or "energy" in spec.get("search", {}).get("objectives", ())
