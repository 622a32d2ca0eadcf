"""The tables, one class each; a row's attributes carry the names of its record's fields.

Owns the schema only. Rows never leave this package: the modules named after the nouns
(`jobs.py`, `trials.py`, ...) turn them into the records of `records.py`. A change here needs
a migration in `migrations/versions`; a test compares a migrated schema with this one.

`serial` is the order of arrival; ids are the names that everyone else uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from device_agents.protocol import DeviceDescription, LatencyReport, MeasurementRequest, Outcome
from search_spaces import Candidate, LayerInventory, SearchSpace
from storage.columns import (
    CleanText,
    Document,
    Documents,
    Json,
    Message,
    Serial,
    UtcDateTime,
    enum_column,
    text_column,
)
from storage.latency_model import LatencyModel
from storage.records import (
    AccuracyReport,
    CanaryRecord,
    DrainCause,
    JobState,
    JobTarget,
    MeasurementState,
    TargetFigures,
    TrialOutcome,
    TrialState,
    pool_topic,
    queue_topic,
)
from storage.sensitivity import Sensitivity


class Base(DeclarativeBase):
    """Base of all rows; `topics` is what listeners are told when one of them changes."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: text_column(),
        datetime: UtcDateTime(),
        float: Double(),
        int: Integer(),
        bool: Boolean(),
    }
    topic: ClassVar[str | None] = None

    def topics(self) -> tuple[str, ...]:
        """Of the kind of row; more where a row matters to somebody of its own."""
        return () if self.topic is None else (self.topic,)


class JobRow(Base):
    """A job."""

    __tablename__ = "jobs"
    topic = "jobs"

    serial: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(CleanText, index=True)
    state: Mapped[JobState] = mapped_column(enum_column(JobState))
    phase: Mapped[str]
    reason: Mapped[str | None] = mapped_column(CleanText)
    spec: Mapped[Mapping[str, Any]] = mapped_column(Json)
    cancel_requested: Mapped[bool]
    source: Mapped[Mapping[str, Any] | None] = mapped_column(Json)
    inventory: Mapped[LayerInventory | None] = mapped_column(Document(LayerInventory))
    space: Mapped[SearchSpace | None] = mapped_column(Document(SearchSpace))
    device_id: Mapped[str | None] = mapped_column(ForeignKey("devices.id"))
    latency_budget_ns: Mapped[float | None]
    reference_latency_ns: Mapped[float | None]
    further_targets: Mapped[tuple[JobTarget, ...]] = mapped_column(
        Documents(JobTarget), nullable=True
    )
    sensitivity: Mapped[tuple[Sensitivity, ...]] = mapped_column(Documents(Sensitivity))
    result: Mapped[Mapping[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class TrialRow(Base):
    """One candidate of a job; a job holds each candidate once."""

    __tablename__ = "trials"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        UniqueConstraint("job_id", "candidate_digest"),
    )
    topic = "trials"

    serial: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    candidate: Mapped[Candidate] = mapped_column(Document(Candidate))
    candidate_digest: Mapped[str]
    proposed_by: Mapped[str]
    state: Mapped[TrialState] = mapped_column(enum_column(TrialState))
    outcome: Mapped[TrialOutcome | None] = mapped_column(enum_column(TrialOutcome))
    reason: Mapped[str | None] = mapped_column(CleanText)
    artifact_sha256: Mapped[str | None]
    artifact_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    compression: Mapped[Mapping[str, Any] | None] = mapped_column(Json)
    accuracy: Mapped[AccuracyReport | None] = mapped_column(Document(AccuracyReport))
    latency: Mapped[LatencyReport | None] = mapped_column(Message(LatencyReport))
    held_out_accuracy: Mapped[AccuracyReport | None] = mapped_column(Document(AccuracyReport))
    confirmed_latency: Mapped[LatencyReport | None] = mapped_column(Message(LatencyReport))
    further: Mapped[tuple[TargetFigures, ...]] = mapped_column(
        Documents(TargetFigures), nullable=True
    )
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class MeasurementRow(Base):
    """One request to a device; `report` lies here without its raw samples."""

    __tablename__ = "measurements"
    __table_args__ = (
        Index(None, "device_id", "state", "serial"),
        Index(None, "pool", "fingerprint", "state", "serial"),
        Index(None, "state", "lease_expires_at"),
    )
    topic = "measurements"

    serial: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    trial_id: Mapped[str | None] = mapped_column(ForeignKey("trials.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    pool: Mapped[str | None] = mapped_column(CleanText)
    fingerprint: Mapped[str | None] = mapped_column(CleanText)
    avoid_device_id: Mapped[str | None]
    is_canary: Mapped[bool] = mapped_column(server_default=false())
    distrusted_because: Mapped[str | None] = mapped_column(CleanText)
    request: Mapped[MeasurementRequest] = mapped_column(Message(MeasurementRequest))
    state: Mapped[MeasurementState] = mapped_column(enum_column(MeasurementState))
    fencing_token: Mapped[int] = mapped_column(BigInteger)
    attempts: Mapped[int]
    lease_id: Mapped[str | None] = mapped_column(index=True)
    leased_by: Mapped[str | None] = mapped_column(index=True)
    lease_expires_at: Mapped[datetime | None]
    outcome: Mapped[Outcome | None] = mapped_column(enum_column(Outcome))
    reason: Mapped[str | None] = mapped_column(CleanText)
    report: Mapped[LatencyReport | None] = mapped_column(Message(LatencyReport))
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]

    def topics(self) -> tuple[str, ...]:
        """A queued measurement is news for the agents that may take it, too."""
        if self.state is not MeasurementState.QUEUED:
            return ("measurements",)
        if self.pool is not None and self.fingerprint is not None:
            return ("measurements", pool_topic(self.pool, self.fingerprint))
        return ("measurements", queue_topic(self.device_id))


class SamplesRow(Base):
    """The raw samples of a measurement, compressed; see `samples.py` for the format."""

    __tablename__ = "measurement_samples"

    measurement_id: Mapped[str] = mapped_column(ForeignKey("measurements.id"), primary_key=True)
    encoded: Mapped[bytes] = mapped_column(LargeBinary)


class LateResultRow(Base):
    """A result whose lease was no longer current: kept for audit, never used."""

    __tablename__ = "late_results"
    __table_args__ = (UniqueConstraint("measurement_id", "lease_id", "fencing_token"),)

    serial: Mapped[int] = mapped_column(Serial, primary_key=True)
    measurement_id: Mapped[str] = mapped_column(ForeignKey("measurements.id"))
    lease_id: Mapped[str] = mapped_column(CleanText)
    fencing_token: Mapped[int] = mapped_column(BigInteger)
    agent_id: Mapped[str]
    outcome: Mapped[Outcome] = mapped_column(enum_column(Outcome))
    reason: Mapped[str | None] = mapped_column(CleanText)
    report: Mapped[LatencyReport | None] = mapped_column(Message(LatencyReport))
    encoded: Mapped[bytes | None] = mapped_column(LargeBinary)
    received_at: Mapped[datetime]


class DeviceRow(Base):
    """A device."""

    __tablename__ = "devices"
    topic = "devices"

    serial: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(CleanText, unique=True)
    pool: Mapped[str | None] = mapped_column(CleanText)
    fingerprint: Mapped[str] = mapped_column(CleanText, index=True)
    enrolled_as: Mapped[str] = mapped_column(CleanText)
    description: Mapped[DeviceDescription] = mapped_column(Message(DeviceDescription))
    enrolled_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    drained_by: Mapped[DrainCause | None] = mapped_column(enum_column(DrainCause))
    drained_because: Mapped[str | None] = mapped_column(CleanText)
    canary: Mapped[CanaryRecord | None] = mapped_column(Document(CanaryRecord))
    canary_at: Mapped[datetime | None]
    canary_passed_at: Mapped[datetime | None]


class LatencyModelRow(Base):
    """What the device's latency was thought to be made of when the job had learnt last."""

    __tablename__ = "latency_models"

    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    models: Mapped[tuple[LatencyModel, ...]] = mapped_column(Documents(LatencyModel))
    updated_at: Mapped[datetime]


class AgentRow(Base):
    """An agent; at most one per device is not revoked.

    `next_key_hash` is a key that was handed out and not used yet, `previous_key_hash` the one
    that it replaced at `key_changed_at`.
    """

    __tablename__ = "agents"
    __table_args__ = (
        Index(None, "next_key_hash", unique=True),
        Index(None, "previous_key_hash", unique=True),
    )
    topic = "devices"

    serial: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), index=True)
    key_hash: Mapped[str] = mapped_column(unique=True)
    next_key_hash: Mapped[str | None]
    previous_key_hash: Mapped[str | None]
    key_changed_at: Mapped[datetime | None]
    is_rotation_due: Mapped[bool] = mapped_column(server_default=false())
    enrolled_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class CrashRow(Base):
    """A measurement that killed the process it ran in."""

    __tablename__ = "crashes"
    __table_args__ = (
        UniqueConstraint("measurement_id", "fencing_token"),
        Index(None, "artifact_sha256", "fingerprint", "runtime"),
    )

    serial: Mapped[int] = mapped_column(Serial, primary_key=True)
    measurement_id: Mapped[str] = mapped_column(ForeignKey("measurements.id"))
    fencing_token: Mapped[int] = mapped_column(BigInteger)
    artifact_sha256: Mapped[str]
    fingerprint: Mapped[str] = mapped_column(CleanText)
    runtime: Mapped[str] = mapped_column(CleanText)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    reason: Mapped[str | None] = mapped_column(CleanText)
    created_at: Mapped[datetime]


class QuarantineRow(Base):
    """An artifact that devices of a fingerprint are not given any more with that runtime."""

    __tablename__ = "quarantine"
    topic = "devices"

    artifact_sha256: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(CleanText, primary_key=True)
    runtime: Mapped[str] = mapped_column(CleanText, primary_key=True)
    reason: Mapped[str] = mapped_column(CleanText)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime]


class EnrolmentTokenRow(Base):
    """A one-use token for enrolling, hashed; `used_by` is the process that used it."""

    __tablename__ = "enrolment_tokens"

    token_hash: Mapped[str] = mapped_column(primary_key=True)
    pool: Mapped[str | None] = mapped_column(CleanText)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    used_by: Mapped[str | None] = mapped_column(CleanText)


class UserTokenRow(Base):
    """A user's bearer token, hashed."""

    __tablename__ = "user_tokens"

    token_hash: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(CleanText)
    created_at: Mapped[datetime]


class ArtifactRow(Base):
    """A file by content; its bytes lie in the artifact store."""

    __tablename__ = "artifacts"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    kind: Mapped[str]
    created_at: Mapped[datetime]


class EventRow(Base):
    """Something that happened in a job; ids count up without gaps, in order of commit."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "job_id", "id"),)
    topic = "events"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    kind: Mapped[str]
    payload: Mapped[Mapping[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime]
