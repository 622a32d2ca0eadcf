"""A trial on several devices, seen as one: the view that the search, the front and people share.

Owns what "worst" means. A job on one device sees its trials as they are; on several there is
one view per device (`TrialRecord.on`) and the worst-device view made here, and the rules of
`front.py` hold in each of them alike. Measuring on each device is `evaluation.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.errors import DeviceUnavailable, InvalidJob, NotFoundError
from autotune.search.best_baseline import best_baseline, held_to_baselines
from autotune.search.feasibility import Limits, limits_of, require_figures
from autotune.search.front import Answer, answer, latency_of
from autotune.spec import JobSpec
from device_agents.protocol import LatencyReport
from storage.records import (
    AccuracyReport,
    DeviceRecord,
    JobRecord,
    JobTarget,
    TrialOutcome,
    TrialRecord,
)


def on_worst_target(job: JobRecord, trial: TrialRecord) -> TrialRecord:
    """The trial as the worst of its job's devices has it; itself where there is one device.

    Accuracy is the lowest over the kernel classes, size the largest file. Latency is relative:
    to the device's budget, or to its FP32 model where the job has no budget. The largest share
    over the devices, in units of the primary target's budget (or FP32 latency), stands for the
    latency in ns: it lies within the primary's budget exactly where the trial is within the
    budget on every device. Of the intervals each bound is the largest, so that the upper one
    holds for all devices at once. `ratio` is the largest ratio to FP32.

    The outcome is `OK` where it is on all devices; a figure that one device lacks is None.
    """
    if not trial.further or not job.further_targets:
        return trial
    views = [(target, trial.on(target.device_id)) for target in job.targets]
    failed = next((v for _, v in views if v.outcome not in (None, TrialOutcome.OK)), None)
    sizes = [v.artifact_size_bytes for _, v in views if v.artifact_size_bytes is not None]
    return replace(
        trial,
        further=(),
        outcome=failed.outcome if failed else trial.outcome,
        reason=failed.reason if failed else trial.reason,
        artifact_size_bytes=max(sizes) if len(sizes) == len(views) else None,
        accuracy=_least([v.accuracy for _, v in views]),
        held_out_accuracy=_least([v.held_out_accuracy for _, v in views]),
        latency=_slowest([(t, v.latency) for t, v in views]),
        confirmed_latency=_slowest([(t, v.confirmed_latency) for t, v in views]),
    )


def worst_target(job: JobRecord, trial: TrialRecord) -> JobTarget | None:
    """The target where the trial's latency is the largest share; None where one lacks it."""
    found = [(target, latency_of(trial.on(target.device_id))) for target in job.targets]
    shares = [(share_of(report, target), target) for target, report in found if report is not None]
    if not shares or len(shares) < len(found):
        return None
    return max(shares, key=lambda pair: pair[0])[1]


def share_of(report: LatencyReport, target: JobTarget) -> float:
    """The latency as a share of the target's budget, or of FP32's without one; below 1 is in."""
    if target.latency_budget_ns is None:
        return report.ratio
    return report.p50_ns / target.latency_budget_ns


def as_searched(job: JobRecord, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials in the view that the job's objective is about."""
    return [on_worst_target(job, trial) for trial in trials]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A job's trials as one of its devices has them, or as the worst of several does.

    `target` is None in the latter. The latency of `limits` is in the units of the trials: for
    the worst device the primary's.
    """

    target: JobTarget | None
    limits: Limits
    trials: list[TrialRecord]
    is_of_worst: bool = False

    @property
    def latency_budget_ns(self) -> float | None:
        """What the latency may be, in the units of the trials."""
        return self.limits.latency_ns

    def answer(self, *, max_accuracy_drop: float | None) -> Answer | None:
        """The trial that answers the job's question in this view; None where none ranks.

        Never one that is worse than the best baseline (`best_baseline.py`).
        """
        found = answer(
            self.trials,
            limits=self.limits,
            max_accuracy_drop=max_accuracy_drop,
            on_every_device=self.is_of_worst,
        )
        return found and held_to_baselines(
            found,
            self.trials,
            limits=self.limits,
            max_accuracy_drop=max_accuracy_drop,
            on_every_device=self.is_of_worst,
        )

    def best_baseline(self, max_accuracy_drop: float | None) -> TrialRecord | None:
        """The baseline that would be the answer if nothing had been searched."""
        return best_baseline(
            self.trials,
            limits=self.limits,
            max_accuracy_drop=max_accuracy_drop,
            on_every_device=self.is_of_worst,
        )


def own_view(job: JobRecord, trials: Sequence[TrialRecord]) -> View:
    """The view that the job's objective is about."""
    return View(
        target=None,
        limits=limits_of(job),
        trials=as_searched(job, trials),
        is_of_worst=bool(job.further_targets),
    )


def views(job: JobRecord, trials: Sequence[TrialRecord]) -> list[View]:
    """`own_view` first; on several devices each one's follows."""
    own = own_view(job, trials)
    if not job.further_targets:
        return [own]
    on_each = [
        View(
            target=target,
            limits=replace(own.limits, latency_ns=target.latency_budget_ns),
            trials=[trial.on(target.device_id) for trial in trials],
        )
        for target in job.targets
    ]
    return [own, *on_each]


def target_on(job: JobRecord, device_id: str) -> JobTarget:
    """The job's target that is this device.

    Raises:
        NotFoundError: the job does not measure there.
    """
    for target in job.targets:
        if target.device_id == device_id:
            return target
    raise NotFoundError(f"job {job.id} does not measure on device {device_id}")


def job_on(job: JobRecord, device_id: str) -> JobRecord:
    """The job as if that target were its only one, with its own answer.

    Raises:
        NotFoundError: the job does not measure there.
    """
    target = target_on(job, device_id)
    if not job.further_targets:
        return job
    result = job.result or {}
    there = next((t for t in result.get("targets", ()) if t["device_id"] == device_id), None)
    return replace(
        job,
        device_id=device_id,
        latency_budget_ns=target.latency_budget_ns,
        reference_latency_ns=target.reference_latency_ns,
        further_targets=(),
        result=there and {**result, "blocking_groups": [], **there, "targets": []},
    )


def chosen(job: JobRecord, devices: Sequence[DeviceRecord]) -> dict[str, Any]:
    """The devices as the targets of a job, the primary one first, as changes of the job.

    Nothing where it has targets: what an earlier run found out about them is kept.
    """
    if job.targets:
        return {}
    primary, *further = (device.id for device in devices)
    targets = tuple(JobTarget(device_id=device_id) for device_id in further)
    return {"device_id": primary, "further_targets": targets}


def require_different(devices: Sequence[DeviceRecord], named: Sequence[str | None]) -> None:
    """Return where no device was named twice, by its name and by its pool for example.

    Raises:
        InvalidJob: one was.
    """
    ids = [device.id for device in devices]
    for device in devices:
        if ids.count(device.id) > 1:
            listed = ", ".join(str(name) for name in named)
            raise InvalidJob(f"of the devices {listed} two are {device.name}; name it once")


def calibrated(job: JobRecord, spec: JobSpec, fp32: TrialRecord) -> dict[str, Any]:
    """What the FP32 model's trial says of each target, as changes of the job.

    What the job knows of a target stays: an earlier trial's, or a pool's (`canary.py`).

    Raises:
        DeviceUnavailable: it could not be measured on one of them.
        InvalidJob: one of them did not measure what the job limits.
    """
    found = []
    for target, named in zip(job.targets, spec.targets, strict=True):
        there = fp32.on(target.device_id)
        if there.latency is None or there.outcome is not TrialOutcome.OK:
            where = f" on device {named}" if job.further_targets else ""
            raise DeviceUnavailable(
                f"the FP32 model itself could not be measured{where}, so there is nothing to "
                f"compare with: {there.reason or there.outcome}"
            )
        require_figures(job.spec, named or target.device_id, there.latency)
        budget, p50_ns = spec.budget_on(named), there.latency.p50_ns
        found.append(
            replace(
                target,
                reference_latency_ns=target.reference_latency_ns or there.latency.reference_p50_ns,
                latency_budget_ns=target.latency_budget_ns
                or (budget.nanoseconds(fp32_latency_ns=p50_ns) if budget else None),
            )
        )
    primary, *further = found
    return {
        "reference_latency_ns": primary.reference_latency_ns,
        "latency_budget_ns": primary.latency_budget_ns,
        "further_targets": tuple(further),
    }


def _least(reports: Sequence[AccuracyReport | None]) -> AccuracyReport | None:
    """The report with the largest drop; the samples are the same for all."""
    known = [report for report in reports if report is not None]
    return max(known, key=lambda r: r.drop) if len(known) == len(reports) else None


def _slowest(
    reports: Sequence[tuple[JobTarget, LatencyReport | None]],
) -> LatencyReport | None:
    """The report of the slowest device, with the shares of all in units of the first."""
    known = [(target, report) for target, report in reports if report is not None]
    if len(known) < len(reports):
        return None

    first, own = known[0]
    unit_ns = _unit_ns(first, own)

    def largest(figure: Callable[[LatencyReport], float | None]) -> float | None:
        shares = [(figure(report), _unit_ns(target, report)) for target, report in known]
        return _largest([None if ns is None else unit_ns * (ns / unit) for ns, unit in shares])

    _, worst = max(known, key=lambda pair: share_of(pair[1], pair[0]))
    unsteady = next((report for _, report in known if not report.is_steady), None)
    return worst.model_copy(
        update={
            "p50_ns": largest(lambda r: r.p50_ns),
            "p50_low_ns": largest(lambda r: r.p50_low_ns),
            "p50_high_ns": largest(lambda r: r.p50_high_ns),
            "p90_ns": largest(lambda r: r.p90_ns),
            "p90_low_ns": largest(lambda r: r.p90_low_ns),
            "p90_high_ns": largest(lambda r: r.p90_high_ns),
            "p99_ns": largest(lambda r: r.p99_ns),
            "p99_low_ns": largest(lambda r: r.p99_low_ns),
            "p99_high_ns": largest(lambda r: r.p99_high_ns),
            "peak_memory_bytes": _largest([r.peak_memory_bytes for _, r in known]),
            "energy_joules": _largest([r.energy_joules for _, r in known]),
            "ratio": max(report.ratio for _, report in known),
            "ratio_low": max(report.ratio_low for _, report in known),
            "ratio_high": max(report.ratio_high for _, report in known),
            "is_steady": unsteady is None,
            "unsteady_reason": unsteady and unsteady.unsteady_reason,
        }
    )


def _unit_ns(target: JobTarget, report: LatencyReport) -> float:
    return target.latency_budget_ns or report.reference_latency_ns


def _largest(figures: Sequence[float | None]) -> float | None:
    """The largest; None where one is not known."""
    known = [figure for figure in figures if figure is not None]
    return max(known) if len(known) == len(figures) else None
