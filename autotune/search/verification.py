"""A bundle's model measured again: the very bytes a user holds, on the device and held-out data.

That is what a confirmation is, too: a trial that has none on that device keeps the figures.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from autotune.compression.layer_times import by_group
from autotune.errors import BundleError, DeviceUnavailable, JobNotReady
from autotune.search.best_baseline import BASELINE
from autotune.search.confirmation import contradicted
from autotune.search.evaluation import measurement_plan
from autotune.search.fleet import Fleet, MeasurementOrder, QuietWindow
from autotune.search.interruption import DeviceAway
from autotune.spec import parse_job, resolve_uploads
from device_agents.protocol import ArtifactReference, Outcome
from storage.artifacts import ArtifactStore
from storage.records import (
    AccuracyReport,
    DeviceRecord,
    JobRecord,
    MeasurementRecord,
    TrialOutcome,
    TrialRecord,
)
from storage.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationOutcome:
    """What the second look found; the measurement says its own outcome."""

    artifact_sha256: str
    device: DeviceRecord
    measurement: MeasurementRecord
    held_out: AccuracyReport


def verify(
    job: JobRecord,
    model: bytes,
    *,
    trial: str | None = None,
    repository: Repository,
    artifacts: ArtifactStore,
    fleet: Fleet,
    window: QuietWindow,
    trust_job_code: bool,
    should_stop: Callable[[], bool],
) -> VerificationOutcome:
    """Measure `model` on the job's device in a fresh process, and on the held-out data.

    `trial` says whose artifact it is, where several have it (with other runtime options).

    Raises:
        BundleError: the bytes are not one of this job's artifacts, or not that trial's.
        JobNotReady: the job has not measured anything yet.
        DeviceUnavailable: the device is offline.
    """
    from autotune.compression.accuracy import AccuracyEvaluator
    from autotune.compression.data import split_data

    digest = hashlib.sha256(model).hexdigest()
    made = _trial_of(job, digest, repository, asked=trial)
    if made is None:
        raise BundleError(
            f"the model ({digest[:12]}) is not one that job {job.id} made; it was changed, or it "
            "belongs to another job. Export it again"
        )
    if job.source is None or job.device_id is None or job.space is None:
        raise JobNotReady(f"job {job.id} has measured nothing yet (it is {job.state.value})")
    reference = ArtifactReference(
        sha256=job.source["artifact_sha256"], size_bytes=job.source["artifact_size_bytes"]
    )
    device = repository.get_device(job.device_id)
    away = fleet.absence(job, None, device)
    if away is not None:
        raise DeviceUnavailable(f"{away}; then repeat the call")
    spec = resolve_uploads(parse_job(job.spec), artifacts.verified_path)
    with window.computing():
        splits = split_data(spec.data, seed=spec.seed, trust_job_code=trust_job_code)
        evaluator = AccuracyEvaluator(
            artifacts.read(reference.sha256), splits.held_out, split="held_out", threads=1
        )
        held_out = evaluator.evaluate(model, runtime=made.candidate.runtime.runtime)
    plan = measurement_plan(
        spec.measurement,
        confirmation=True,
        reference_latency_ns=job.reference_latency_ns,
        # A new seed each time makes it a new request: looking again really measures again.
        seed=secrets.randbelow(2**31),
        quantile=spec.latency_at,
    )
    try:
        measurement = fleet.measure(
            job,
            device,
            MeasurementOrder(
                trial_id=made.id,
                artifact=ArtifactReference(sha256=digest, size_bytes=len(model)),
                reference=reference,
                runtime=made.candidate.runtime,
                reference_runtime=job.space.runtimes[0],
                plan=plan,
                profile=True,
            ),
            should_stop=should_stop,
        )
    except DeviceAway as away:
        raise DeviceUnavailable(str(away)) from away
    if measurement.report is not None and job.inventory is not None:
        report = by_group(measurement.report, lambda: model, job.inventory.groups)
        measurement = replace(measurement, report=report)
    keep_confirmation(repository, job, made, measurement, held_out)
    return VerificationOutcome(
        artifact_sha256=digest, device=device, measurement=measurement, held_out=held_out
    )


def keep_confirmation(
    repository: Repository,
    job: JobRecord,
    trial: TrialRecord,
    measurement: MeasurementRecord,
    held_out: AccuracyReport,
) -> None:
    """Confirm a trial that was measured well and has no confirmation on the job's device.

    As at the end of a job: one that held-out data contradict is `UNCONFIRMED` and leaves the
    front.
    """
    report = measurement.report
    if (
        trial.outcome is not TrialOutcome.OK
        or trial.confirmed_latency is not None
        or measurement.outcome is not Outcome.OK
        or report is None
        or not report.is_steady
    ):
        return
    is_primary = repository.get_job(job.id).device_id == job.device_id
    on = None if is_primary else job.device_id
    reason = contradicted(replace(trial, held_out_accuracy=held_out))
    if reason is not None and trial.proposed_by != BASELINE:
        refused = {"outcome": TrialOutcome.UNCONFIRMED, "reason": reason}
        repository.update_trial(trial.id, on=on, held_out_accuracy=held_out, **refused)
        return
    repository.update_trial(trial.id, on=on, confirmed_latency=report, held_out_accuracy=held_out)
    payload = {"trial": trial.id, "number": trial.number}
    repository.append_event(job.id, "trial_confirmed", payload)


def _trial_of(
    job: JobRecord, digest: str, repository: Repository, *, asked: str | None
) -> TrialRecord | None:
    """The trial that made these bytes; the winner where several did and none is asked for."""
    trials = [t.on(job.device_id or "") for t in repository.list_trials(job.id)]
    made = [t for t in trials if t.artifact_sha256 == digest]
    if asked is not None:
        wanted = repository.find_trial(job.id, asked).id
        return next((t for t in made if t.id == wanted), None)
    winner = (job.result or {}).get("winner")
    return next((t for t in made if t.id == winner), made[0] if made else None)
