"""Frozen records: what the repository returns and accepts.

A record is changed by asking the repository; nothing here knows SQL. Times are
timezone-aware UTC. A missing figure is None, with a reason beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from device_agents.protocol import (
    DeviceDescription,
    LatencyReport,
    MeasurementRequest,
    MeasurementResult,
    Outcome,
)
from search_spaces import Candidate, LayerInventory, SearchSpace
from storage.sensitivity import Sensitivity


class JobState(StrEnum):
    """Where a job is. The last three are final; `resume` brings a job back to QUEUED."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING_FOR_DEVICE = "waiting_for_device"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Nothing more happens without the user."""
        return self in (JobState.FINISHED, JobState.CANCELLED, JobState.FAILED)


class TrialState(StrEnum):
    """PROPOSED and RUNNING trials are taken up again after a restart."""

    PROPOSED = "proposed"
    RUNNING = "running"
    FINISHED = "finished"


class TrialOutcome(StrEnum):
    """How a finished trial ended. Only `OK` can enter the front.

    `UNCONFIRMED` was measured once and could not be measured again. (2026-11-21)
    """

    OK = "ok"
    COMPRESSION_FAILED = "compression_failed"
    ACCURACY_FAILED = "accuracy_failed"
    MEASUREMENT_FAILED = "measurement_failed"
    UNCONFIRMED = "unconfirmed"
    CANCELLED = "cancelled"


class MeasurementState(StrEnum):
    """QUEUED can be leased; LEASED returns to QUEUED when its lease runs out; DONE is final."""

    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"


def queue_topic(device_id: str) -> str:
    """What the repository announces when a measurement is queued for the device.

    A topic per device, so that new work wakes the one agent that can take it and not a fleet.
    """
    return f"queue of {device_id}"


def pool_topic(pool: str, fingerprint: str) -> str:
    """The same for work that any device of a pool with that fingerprint may do."""
    return f"queue of {pool}/{fingerprint}"


class DrainCause(StrEnum):
    """Why a device gets no work: it is off its pool, or two processes use its identity."""

    CANARY = "canary"
    IDENTITY = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRecord:
    """How a device compares with the other members of its pool on one model.

    `latency_ns` is the median of `n` readings, each from a process of its own; `ratio` is that
    over the pool's, with a 95 % interval: above 1 the device is slower than its pool. Stored
    as JSON (2026-11-21).
    """

    artifact_sha256: str
    latency_ns: float
    ratio: float
    ratio_low: float
    ratio_high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CanaryRecord:
        """The record that `to_json` wrote."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyReport:
    """The metric of one artifact on labelled samples; larger is better.

    `value`, `fp32_value`, `drop` and their bounds are fractions from 0 to 1. `drop` is
    `fp32_value - value` on the same samples (positive: worse than FP32), with a paired
    interval. `mean_kl` is the mean KL divergence of the artifact's class probabilities from
    FP32's, in nats; smaller is better; it resolves what top-1 on few samples cannot.
    `stopped_early` says why fewer samples than the split has were evaluated, None where all
    were. Such a report is about all samples nevertheless: of the `n_samples` seen it counts, of
    the others it has what is expected (`autotune/compression/racing.py`), with the error of
    that in the bounds; `drop_error` is one standard deviation of its `drop` from what all
    samples would say, None where all were seen.

    Stored as JSON. 2026-11-21: `stopped_early` added; reports without it saw all samples. Then
    `drop_error`; an early stop without it tells the drop on the samples seen alone.
    """

    metric: str = "top1"
    split: str
    n_samples: int
    value: float
    value_low: float
    value_high: float
    fp32_value: float
    drop: float
    drop_low: float
    drop_high: float
    mean_kl: float
    confidence_level: float = 0.95
    wall_s: float
    stopped_early: str | None = None
    drop_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> AccuracyReport:
        """The report that `to_json` wrote."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTarget:
    """A device that a job measures on, and what holds for the job there.

    `latency_budget_ns` and `reference_latency_ns` (the FP32 model's own calibrated latency) are
    None until the FP32 model was measured there, the budget also where the job has none.
    Stored as JSON (2026-11-21).
    """

    device_id: str
    latency_budget_ns: float | None = None
    reference_latency_ns: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> JobTarget:
        """The target that `to_json` wrote."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job with its state.

    `spec` is the validated job file as JSON. `inventory`, `space`, `device_id`, `source` and
    `latency_budget_ns` are None until the runner has found them. `device_id` and the figures
    beside it are the primary target's; a job on several devices has `further_targets`.
    `reason` says why a job waits or failed, or what its answer means (an impossible budget).
    `result` is the answer: a dictionary whose keys `autotune.api_types.JobResult` documents.
    """

    id: str
    name: str
    state: JobState
    phase: str
    reason: str | None
    spec: Mapping[str, Any]
    cancel_requested: bool
    source: Mapping[str, Any] | None = None
    inventory: LayerInventory | None = None
    space: SearchSpace | None = None
    device_id: str | None = None
    latency_budget_ns: float | None = None
    reference_latency_ns: float | None = None
    further_targets: tuple[JobTarget, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    result: Mapping[str, Any] | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def targets(self) -> tuple[JobTarget, ...]:
        """Every device of the job, the primary one first; empty until they are found."""
        if self.device_id is None:
            return ()
        primary = JobTarget(
            device_id=self.device_id,
            latency_budget_ns=self.latency_budget_ns,
            reference_latency_ns=self.reference_latency_ns,
        )
        return (primary, *self.further_targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFigures:
    """What a trial is on one of its job's further targets; the fields mean what the trial's do.

    The artifact is the one for that device's kernels, so that it and its accuracy may differ
    from the primary target's. Stored as JSON (2026-11-21).
    """

    device_id: str
    outcome: TrialOutcome | None = None
    reason: str | None = None
    artifact_sha256: str | None = None
    artifact_size_bytes: int | None = None
    compression: Mapping[str, Any] | None = None
    accuracy: AccuracyReport | None = None
    latency: LatencyReport | None = None
    held_out_accuracy: AccuracyReport | None = None
    confirmed_latency: LatencyReport | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {
            **asdict(self),
            "latency": self.latency and self.latency.model_dump(mode="json"),
            "confirmed_latency": self.confirmed_latency
            and self.confirmed_latency.model_dump(mode="json"),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TargetFigures:
        """The figures that `to_json` wrote."""
        readers: dict[str, Callable[[Any], Any]] = {
            "outcome": TrialOutcome,
            "accuracy": AccuracyReport.from_json,
            "held_out_accuracy": AccuracyReport.from_json,
            "latency": LatencyReport.model_validate,
            "confirmed_latency": LatencyReport.model_validate,
        }
        read = {
            name: readers[name](document[name])
            for name in readers
            if document.get(name) is not None
        }
        return cls(**{**document, **read})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One candidate with its reports and its outcome.

    `proposed_by` names who had the idea: `baseline`, `sensitivity`, `size`, the model fitted to
    the trials (`program`: an optimum of what it predicts, `flip`: one choice away from that or
    from the front, `random`), `optuna`, `adaround`.
    `latency` comes without its raw samples; they are with the measurement. `artifact` facts
    and `groups` (planned and effective precision, one entry per layer group) are None until
    the file is built. `held_out_*` are filled when the trial is confirmed. All these figures
    are the primary target's; `further` has those of a job's other targets, one entry each.
    """

    id: str
    job_id: str
    number: int
    candidate: Candidate
    proposed_by: str
    state: TrialState
    outcome: TrialOutcome | None = None
    reason: str | None = None
    artifact_sha256: str | None = None
    artifact_size_bytes: int | None = None
    compression: Mapping[str, Any] | None = None
    accuracy: AccuracyReport | None = None
    latency: LatencyReport | None = None
    held_out_accuracy: AccuracyReport | None = None
    confirmed_latency: LatencyReport | None = None
    further: tuple[TargetFigures, ...] = ()
    created_at: datetime
    finished_at: datetime | None = None

    def on(self, device_id: str) -> TrialRecord:
        """The trial as it is on one target, as if the job had no other."""
        for figures in self.further:
            if figures.device_id == device_id:
                there = {f.name: getattr(figures, f.name) for f in fields(figures)}
                del there["device_id"]
                return replace(self, **there, further=())
        return replace(self, further=()) if self.further else self


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRecord:
    """One request to a device and what came of it; `fencing_token` only grows.

    Where `pool` is set any member with that `fingerprint` may take it, except `avoid_device_id`;
    `device_id` is then the one that took it last. `distrusted_because` says why a result is not
    used although it was accepted: its device turned out to be off.
    """

    id: str
    job_id: str
    trial_id: str | None
    device_id: str
    pool: str | None = None
    fingerprint: str | None = None
    avoid_device_id: str | None = None
    is_canary: bool = False
    distrusted_because: str | None = None
    request: MeasurementRequest
    state: MeasurementState
    fencing_token: int
    attempts: int
    lease_id: str | None = None
    leased_by: str | None = None
    lease_expires_at: datetime | None = None
    outcome: Outcome | None = None
    reason: str | None = None
    report: LatencyReport | None = None
    created_at: datetime
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LateResultRecord:
    """A result whose lease was no longer current: kept for audit, never used."""

    result: MeasurementResult
    agent_id: str
    received_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """A device that enrolled; `last_seen_at` moves with every heartbeat of its agent.

    A drained device gets no work (`drained_because`, for people) until it is resumed; one that
    is off its pool still gets canaries. `canary` is the last comparison with its pool, made at
    `canary_at`; `canary_passed_at` is when one last found it in line.
    """

    id: str
    name: str
    pool: str | None
    description: DeviceDescription
    enrolled_at: datetime
    last_seen_at: datetime
    drained_by: DrainCause | None = None
    drained_because: str | None = None
    canary: CanaryRecord | None = None
    canary_at: datetime | None = None
    canary_passed_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStanding:
    """What decides about the work that a device gets."""

    name: str
    pool: str | None
    fingerprint: str
    drained_because: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRecord:
    """The process on a device, known by its key's hash.

    `is_rotation_due`: someone asked for a new key; `key_changed_at` is when it last got one,
    None before the first time.
    """

    id: str
    device_id: str
    key_hash: str
    key_changed_at: datetime | None = None
    is_rotation_due: bool = False
    enrolled_at: datetime
    revoked_at: datetime | None = None
    device: DeviceStanding


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRecord:
    """An artifact that devices of one fingerprint are not given any more with one runtime."""

    artifact_sha256: str
    fingerprint: str
    runtime: str
    reason: str
    job_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRecord:
    """A file by content; the bytes lie in `storage/artifacts.py`."""

    sha256: str
    size_bytes: int
    kind: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """Something that happened in a job, numbered without gaps per database."""

    id: int
    job_id: str
    kind: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime
