"""The messages between the service and an agent, and the version of their format.

Owns every message's shape and nothing else: how a latency is measured lives in
`measurement.py`, how messages travel in `agent.py` and in the service's agent routes.

Rules of the protocol: an agent dials out and never listens; it gets durations, never
wall-clock deadlines; an artifact is data, named by its sha256 and verified before use;
a result is accepted once, while its fencing token is current.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL_VERSION = 2
OLDEST_PROTOCOL_VERSION = 1
SPOKEN_VERSIONS = range(OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION + 1)
"""What a service of this release understands; an agent speaks the newest version it knows."""
# Version 1 (2026-11-21): enrol, heartbeat, lease, artifact download by range and its list of
# segments, result with throttling and energy where a device has them.
# Version 2 (2026-11-21): all below; an agent of version 1 works as before.
# 2026-11-21: `LeaseRequest.request_id`.
# 2026-11-21: `instance` of enrolment and heartbeat, `rotate_key` and `drained_because` of its
# reply, the route that gives a new key; an agent without them works as before.
# 2026-11-21: `MeasurementRequest.profile`; `profile`, `tainted_pairs`, `are_tainted_used` and
# `n_restarts` of `LatencyReport`; `DeviceDescription.kernel_speeds`. A peer that does not know
# them leaves them out.
# 2026-11-21: `Block.sitting`; an agent without it had one sitting.
# 2026-11-21: `graph_level`, `memory_arena` and `spinning` of `RuntimeRequest`, and
# `RuntimeBuild.options`, which names what an agent understands of them: one that names none is
# asked for the usual ones alone, which mean what they did.
# 2026-11-21: the route that takes a `DeviceDescription` anew; a service without it answers 404.
# 2026-11-21: `MeasurementPlan.quantile`; `p90_high_ns` and `p99_high_ns` of `LatencyReport`, which
# the service computes from the samples of an agent that does not; `energy_source` and
# `energy_missing` of `DeviceDescription`, both None where an agent says neither.
# 2026-11-21: bounds of `LatencyReport` are wider where the reference was off its calibrated
# latency; those of an agent without it only say how sure it was in the state that it met.
# 2026-11-21: `REQUEST_HEADER`; an answer of a service without it is taken as it comes.
# 2026-11-22: `p90_low_ns` and `p99_low_ns` of `LatencyReport`, which the service computes from the
# samples of an agent that does not; `process_s`, None from an agent that does not say.
# 2026-11-22: `between` of `LatencyReport`, empty from an agent without it.
# 2026-11-22: the ratio of a `LatencyReport`, `p50_ns` and `reference_p50_ns` are of undisturbed
# blocks, `undisturbed_share` tells of samples; an agent that does not say it took medians of all.
# `MeasurementPlan.is_calibration`; an agent that does not know it stops where it is narrow.
# 2026-11-23: `reference_rest_ns` of `LatencyReport`, None from an agent that does not know; what
# is undisturbed is told by samples and not only by blocks: latencies are shorter by the variance of
# a model's samples over 0.03, some tenths of a percent on a device at rest.

REQUEST_HEADER = "X-Request-ID"
"""Names a request; its answer bears the same name. Behind a line that says things twice, a late
copy of an answer would else be taken for the answer to what was asked next."""

PROBLEM_TYPE = "application/problem+json"
"""What every error of a service is (RFC 9457); one of a portal or a proxy on the way is not."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Quantile = Literal["p50", "p90", "p99"]
"""Of the latencies of single inferences 90 % and 99 % are faster; `p50` is what one takes while
nothing disturbs the device: their median where nothing does, but for some tenths of a percent."""


class Message(BaseModel):
    """Base of all messages: immutable; unknown keys are ignored, so that a newer peer may add."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Outcome(StrEnum):
    """How a measurement ended. Only `OK` ranks; every other one comes with a reason.

    `QUARANTINED` is the service's: the artifact crashed such devices before and was not sent.
    """

    OK = "ok"
    UNSTABLE = "unstable"
    RUNTIME_CRASH = "runtime_crash"
    OOM = "oom"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    ARTIFACT_CORRUPT = "artifact_corrupt"
    ARTIFACT_MISSING = "artifact_missing"
    DEVICE_DISK = "device_disk"
    LOST = "lost"
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"


class RuntimeBuild(Message):
    """A runtime that the device can load, as its probe found it.

    `options` names the fields of `RuntimeRequest` beside provider and threads that it heeds.
    """

    name: str
    version: str
    providers: tuple[str, ...]
    options: tuple[str, ...] = ()


class KernelSpeed(Message):
    """How fast one kind of operator is in one precision, against FP32 in the same runtime.

    `operator` is `conv3x3`, `conv1x1`, `depthwise` or `matmul`. `precision` is a precision's
    short name; one with 8-bit activations names the signs of activations and weights behind a
    slash (`w8a8/u8s8`), because processors are fast with one of them. `ratio` is latency over
    FP32's with its interval, below 1 is faster; where it is None, `missing` says why.
    """

    runtime: str
    operator: str
    precision: str
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    missing: str | None = None


class DeviceDescription(Message):
    """What the device is. `host_id` is equal for processes that share one machine.

    `host_id` is a digest of the machine id, so that a service can tell that an agent measures
    on the very machine its own workers compute on. `cpu_flags` holds only the flags that decide
    about kernels (avx2, avx512_vnni, avx_vnni, asimddp, ...).
    `kernel_speeds` is what the device measured when it enrolled; empty where it did not.
    `energy_source` is what its energy meter covers; without a meter `energy_missing` says why.
    """

    hostname: str
    host_id: str
    architecture: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    logical_cpus: int
    memory_bytes: int
    operating_system: str
    kernel: str
    python: str
    agent_version: str
    runtimes: tuple[RuntimeBuild, ...]
    kernel_speeds: tuple[KernelSpeed, ...] = ()
    energy_source: str | None = None
    energy_missing: str | None = None
    fingerprint: str = Field(description="sha256 over the fields that decide about latency")


class Conditions(Message):
    """The device's state at one moment; what the device does not have is None.

    `throttled_now` and `throttled_since_boot` name the firmware's flags, live and sticky (empty:
    not throttled). `throttle_events` and `involuntary_switches` only grow: the difference of two
    readings says what happened in between; the latter are the reporting process's own.
    """

    load_1m: float | None = None
    cpu_frequency_mhz: float | None = None
    temperature_celsius: float | None = None
    governor: str | None = None
    available_memory_bytes: int | None = None
    steal_fraction: float | None = None
    throttled_now: tuple[str, ...] | None = None
    throttled_since_boot: tuple[str, ...] | None = None
    throttle_events: int | None = None
    involuntary_switches: int | None = None
    missing: dict[str, str] = Field(default_factory=dict, description="field -> why it is None")


class EnrolRequest(Message):
    """An agent introduces its device, with a one-use enrolment token.

    `instance` is random for each process: one whose answer was lost may use its token again.
    """

    protocol_version: int
    token: str
    name: str | None = None
    device: DeviceDescription
    instance: str | None = None


class EnrolReply(Message):
    """The agent's identity; the key is shown once and stored hashed."""

    agent_id: str
    device_id: str
    device_name: str
    agent_key: str
    heartbeat_s: float


class NewKey(Message):
    """An agent's next key; the one before is good until this one was used for the first time."""

    agent_key: str


class Heartbeat(Message):
    """The agent is alive; it renews the lease that it holds.

    Every heartbeat is the agent's whole state, nothing in it is a change: the first one after
    a lost connection, or to a service that was started anew, says all there is. The lease is
    the one that is being measured or whose result is on its way.

    `instance` is random for each process of an agent: two that are heard of in turns share an
    identity that only one of them can have.
    """

    protocol_version: int
    instance: str | None = None
    lease_id: str | None = None
    fencing_token: int | None = None
    conditions: Conditions | None = None


class HeartbeatReply(Message):
    """`drop_lease`: the lease is no longer the agent's; stop that measurement.

    `rotate_key`: ask for a new key now. `drained_because`: why the device gets no work.
    """

    heartbeat_s: float
    drop_lease: bool = False
    reason: str | None = None
    rotate_key: bool = False
    drained_because: str | None = None


class ArtifactReference(Message):
    """A file by content; fetched from `/v1/agent/artifacts/{sha256}`."""

    sha256: Sha256
    size_bytes: int


class ArtifactSegments(Message):
    """The parts of an artifact in order: `(identity, bytes)`; equal bytes have equal identities.

    An agent that holds another artifact with some of these parts fetches the others by range.
    """

    segments: tuple[tuple[str, int], ...]


class RuntimeRequest(Message):
    """The runtime to load and its options.

    `graph_level` is how far onnxruntime rewrites the graph before it runs it: `all`, `layout`,
    `extended`, `basic` or `disabled`. `memory_arena`: freed memory is kept for the next
    inference. `spinning`: threads that wait for work keep their core busy. The defaults are
    what a plain session has, and what a runtime without such an option is asked for.
    """

    runtime: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    threads: int = Field(default=1, ge=1)
    graph_level: str = "all"
    memory_arena: bool = True
    spinning: bool = True

    def text(self, *, version: str = "") -> str:
        """For people, the runtime's version behind its name; of the rest what is not usual."""
        return ", ".join(
            (
                f"{self.runtime} {version}".strip(),
                self.provider,
                f"{self.threads} thread{'s' if self.threads > 1 else ''}",
                *([f"graph level {self.graph_level}"] if self.graph_level != "all" else []),
                *([] if self.memory_arena else ["no memory arena"]),
                *([] if self.spinning else ["no spinning"]),
            )
        )


class MeasurementPlan(Message):
    """How long and how exactly to measure.

    `target_half_width` is the half width of the 95 % interval as a fraction of the ratio to
    the reference at which sampling stops; `time_cap_s` bounds the timed part, up to four times as
    much does while the reference is slower than at rest (`rest.py`). `reference_latency_ns` is
    the reference's own calibrated latency on this device; where it is given, latencies are the
    ratio times it, which cancels the drift of the machine. `is_calibration` takes the whole of
    `time_cap_s`, however soon it is narrow, so that the device comes to rest meanwhile. Sampling
    also goes on until the tail of `quantile` is seen well enough for an upper bound.
    """

    kind: Literal["screening", "confirmation"] = "screening"
    target_half_width: float = Field(default=0.02, gt=0, lt=1)
    time_cap_s: float = Field(default=10.0, gt=0)
    min_blocks: int = Field(default=8, ge=4)
    timeout_s: float = Field(default=120.0, gt=0)
    reference_latency_ns: float | None = None
    is_calibration: bool = False
    quantile: Quantile = "p50"
    seed: int = 0


class MeasurementRequest(Message):
    """One artifact to measure against one reference model, at batch 1.

    `reference_runtime` is pinned for a whole job, so that the ratio of a candidate that runs
    on two threads is still a ratio to the same reference. With `profile` the report also says
    how long each kernel of the candidate takes.
    """

    measurement_id: str
    artifact: ArtifactReference
    reference: ArtifactReference
    runtime: RuntimeRequest
    reference_runtime: RuntimeRequest = RuntimeRequest()
    plan: MeasurementPlan
    profile: bool = False


class LeaseRequest(Message):
    """Ask for work; the service holds the request open for up to `wait_s` seconds.

    `request_id` is random for each answer that the agent wants: sent again, because the answer
    did not arrive, it brings the same lease and not another one.
    """

    protocol_version: int
    wait_s: float = Field(default=20.0, ge=0, le=60)
    request_id: str | None = Field(default=None, max_length=64)


class Lease(Message):
    """The right to measure one artifact for `ttl_s` seconds, renewed by heartbeats."""

    lease_id: str
    fencing_token: int
    ttl_s: float
    request: MeasurementRequest


class Block(Message):
    """Samples taken one after the other: per-call durations in ns, of one of the two models.

    Blocks of the same `sitting` ran in the same two sessions; the next one loaded both anew.
    """

    subject: Literal["candidate", "reference"]
    samples_ns: tuple[int, ...]
    sitting: int = 0


class KernelTime(Message):
    """One kernel that the runtime executed, by the runtime's own names for it.

    `time_ns` is the median over the runs, per inference. `group` is the layer group that it
    computes; the service fills it in, None where it belongs to none (a reordering, a Q or DQ
    between groups).
    """

    name: str
    operator: str
    time_ns: float
    group: str | None = None


class Profile(Message):
    """Where one inference spends its time, in the order of execution.

    Taken in a session of its own, which the notes make slower: it says which part is large, not
    how fast the model is. `inference_ns` is the median of the whole call in that session.
    Without kernels `missing` says why.
    """

    kernels: tuple[KernelTime, ...] = ()
    inference_ns: float | None = None
    n_runs: int = 0
    missing: str | None = None

    def group_ns(self) -> dict[str, float]:
        """Kernel time per layer group, in ns; only the groups that kernels were found for."""
        return self._sums(lambda kernel: kernel.group)

    def other_ns(self) -> dict[str, float]:
        """Kernel time in no group, in ns by operator: what leads from one group to another."""
        return self._sums(lambda kernel: None if kernel.group else kernel.operator)

    def _sums(self, key: Callable[[KernelTime], str | None]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for kernel in self.kernels:
            name = key(kernel)
            if name is not None:
                sums[name] = sums.get(name, 0.0) + kernel.time_ns
        return sums


class LatencyReport(Message):
    """The latency of one artifact on one device at batch 1; smaller is better.

    All `*_ns` are nanoseconds per inference. `ratio` compares with the reference model, which is
    the job's FP32 model: below 1 is faster. Both count as what they take while nothing disturbs
    them (`undisturbed.py`); `undisturbed_share` of the candidate's samples took no more than a
    tenth longer.
    `p50_ns` is `ratio` times the reference's calibrated latency (`reference_latency_ns`); the
    interval at `confidence_level` is the wider of a block bootstrap's and one over the sittings, of
    the ratio, and wider by what is open because the reference (`reference_p50_ns`) was slower than
    on this device at rest, as far as the agent knows that (`reference_rest_ns`; else by how far it
    was from its calibrated latency), which is little where it is the reference itself that is
    measured. `p50_low_ns` and `p50_high_ns` are the ratio's bounds times the lowest of the
    calibrated latency, that at rest and that found here, and times the higher of the former two.
    `p90_ns` and `p99_ns` are quantiles of all of the candidate's samples, disturbed ones too,
    scaled by the same calibration; their bounds (`quantiles.py`) pass for as sure as those of
    `p50_ns` and are None where the samples are too few for one. A sample of a model faster than
    0.1 ms is a mean of some calls.
    `is_steady` is false where the interval is too wide to order anything; what slows both
    models alike cancels. `runtime` is the candidate's. `energy_joules` is what one inference of
    the candidate cost what `energy_source` names, idle share included; where it is None,
    `energy_source` says why. `tainted_pairs` counts by reason the pairs of blocks that were
    measured again because the device was throttled, preempted or changed its clock meanwhile
    (`are_tainted_used`: most were, so they count after all); `n_restarts` is how often a drift
    made everything begin anew. `between` is the device from sitting to sitting, evenly spaced where
    there were many; what it does not have is explained in `before`. `wall_s` is from loading the
    runtime to the figures, `process_s` how long the process that did it lived.
    """

    p50_ns: float
    p50_low_ns: float
    p50_high_ns: float
    p90_ns: float
    p99_ns: float
    p90_low_ns: float | None = None
    p90_high_ns: float | None = None
    p99_low_ns: float | None = None
    p99_high_ns: float | None = None
    ratio: float
    ratio_low: float
    ratio_high: float
    confidence_level: float = 0.95
    reference_p50_ns: float
    reference_latency_ns: float
    reference_rest_ns: float | None = Field(default=None, gt=0)
    n_samples: int
    n_blocks: int
    undisturbed_share: float | None = None
    is_steady: bool
    unsteady_reason: str | None = None
    wall_s: float
    process_s: float | None = None
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None
    energy_source: str | None = None
    runtime: RuntimeRequest
    runtime_version: str
    before: Conditions
    between: tuple[Conditions, ...] = ()
    after: Conditions
    blocks: tuple[Block, ...] = ()
    profile: Profile | None = None
    tainted_pairs: dict[str, int] = Field(default_factory=dict)
    are_tainted_used: bool = False
    n_restarts: int = 0


class MeasurementResult(Message):
    """What came of a lease; `report` is there for `ok` and, where it exists, `unstable`."""

    lease_id: str
    fencing_token: int
    measurement_id: str
    outcome: Outcome
    reason: str | None = None
    report: LatencyReport | None = None
