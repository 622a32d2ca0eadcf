"""Devices that are not what they were: another runtime, another processor, in the middle of a job.

Owns what follows for a job. A latency is a ratio times the reference's calibrated latency, and
both belong to the runtime that they were measured with; figures of two builds are never ranked
together. The repository opens again what is outdated; `tuning.py` measures it again.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.search.interruption import DeviceAway
from storage.records import DeviceRecord, JobRecord, JobTarget, TrialRecord
from storage.repository import Repository


def forget_outdated(
    repository: Repository, job: JobRecord, devices: Sequence[DeviceRecord]
) -> JobRecord:
    """The job without what was measured on its devices when they had other runtimes.

    `devices` are those of the job's targets, in order; a job without targets has measured
    nothing. The user is told how many trials are measured again, and why.
    """
    trials = repository.list_trials(job.id) if job.targets else []
    for target, device in zip(job.targets, devices, strict=False):
        measured = [trial for trial in trials if trial.on(target.device_id).latency is not None]
        because = _why_outdated(target, device, measured)
        if because is not None:
            repository.fleet.outdate(job.id, target.device_id, because=because)
            message = f"{because}: {len(measured)} trials are measured again there"
            repository.append_event(job.id, "notice", {"message": message})
    return repository.get_job(job.id)


def require_unchanged(repository: Repository, devices: Sequence[DeviceRecord]) -> None:
    """Return where each device is still what these records of the job's start say.

    Raises:
        DeviceAway: one is not; the job begins anew with what it is now.
    """
    for device in devices:
        now = repository.get_device(device.id)
        if now.description.fingerprint != device.description.fingerprint:
            raise DeviceAway(
                f"device {device.name} has other runtimes or another processor by now; the job "
                "goes on with them, and measures again what it measured before"
            )


def _why_outdated(
    target: JobTarget, device: DeviceRecord, measured: Sequence[TrialRecord]
) -> str | None:
    """Why the target's latencies are not of the device as it is; None where they are."""
    versions = {build.name: build.version for build in device.description.runtimes}
    for trial in measured:
        there = trial.on(target.device_id)
        for report in (there.latency, there.confirmed_latency):
            name = report.runtime.runtime if report is not None else ""
            if report is not None and versions.get(name, "") not in ("", report.runtime_version):
                return (
                    f"device {device.name} has {name} {versions[name]} by now, where "
                    f"{report.runtime_version} was measured"
                )
    # The repository took the calibration away when the device changed; these came after.
    if target.reference_latency_ns is None and any(t.proposed_by != "baseline" for t in measured):
        return f"device {device.name} was changed while the job measured there"
    return None
