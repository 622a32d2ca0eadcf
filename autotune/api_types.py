"""The shapes of the HTTP API: what `/v1` returns, and what the client and the CLI read.

Owns the wire format of the user's side. The agent's side is `device_agents/protocol.py`.
All latencies are nanoseconds at batch 1, smaller is better; accuracies are fractions from
0 to 1, larger is better.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

API_VERSION = 1
# Version 1 (2026-11-21): jobs, trials, front, events, export, verification, devices, uploads,
# sensitivities; jobs on several devices: their targets, fronts by device, portability.
# 2026-11-21: when a trial was created and finished.
# 2026-11-21: blocking groups with what they cost, where they were names; the progress of a
# search: device seconds, hypervolume, model error, proposers; explanations of trials.
# 2026-11-21: a device says why it is drained and how its last canary went; the quarantine.
# 2026-11-22: a group's `effective` is null where nobody saw it; `seen_in` says where it was seen.

Verdict = Literal["within_budget", "impossible_budget", "no_budget"]


class Shape(BaseModel):
    """Base of every shape; unknown keys are ignored, so that a newer service may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Interval(Shape):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class GroupPrecision(Shape):
    """What one layer group was asked to be and what the runtime really executes.

    `effective` is None where nobody saw it, `seen_in` where it was seen. `stored_bits` is what
    a weight takes in the file; None in trials of earlier releases. `kernel_ns` is what its
    kernels take by the trial's profile; None without one.
    """

    group: str
    planned: str
    effective: str | None
    reason: str | None = None
    seen_in: str | None = None
    stored_bits: int | None = None
    kernel_ns: float | None = None


class TrialProfile(Shape):
    """Where one inference spends its time, measured apart from the latency in a slower session.

    The groups' times are with the groups; `other_ns` has by operator those of kernels between
    and outside groups. `inference_ns` is the whole call. Without kernels `missing` says why.
    """

    inference_ns: float | None = None
    n_runs: int = 0
    other_ns: dict[str, float] = {}
    missing: str | None = None


class TrialOnTarget(Shape):
    """A trial on one device of a job on several; the fields mean what the trial's do there."""

    device_id: str
    outcome: str | None = None
    reason: str | None = None
    artifact_sha256: str | None = None
    artifact_size_bytes: int | None = None
    kernels: str | None = Field(
        default=None, description="the kernel class that the artifact is written for"
    )
    accuracy: Interval | None = None
    accuracy_drop: Interval | None = None
    latency_ns: Interval | None = None
    fp32_ratio: Interval | None = None
    latency_samples: int | None = None
    is_steady: bool | None = None
    is_feasible: bool | None = None
    held_out_accuracy: Interval | None = None
    held_out_accuracy_drop: Interval | None = None
    confirmed_latency_ns: Interval | None = None
    confirmed_fp32_ratio: Interval | None = None


class Trial(Shape):
    """One candidate with what is known about it. Figures that do not exist are None.

    In a job on several devices the accuracy is the lowest over their kernel classes, the
    latency that of `device_id`, the device where it is the largest share of the budget (of
    FP32's without one); `is_feasible` and `is_on_front` are about all of them. `targets` has
    the figures on each; it is empty in a job on one device.
    """

    id: str
    job_id: str
    number: int
    state: str
    outcome: str | None = None
    reason: str | None = None
    proposed_by: str
    candidate: dict[str, Any]
    candidate_digest: str
    artifact_sha256: str | None = None
    artifact_size_bytes: int | None = None
    accuracy: Interval | None = None
    accuracy_drop: Interval | None = None
    mean_kl: float | None = None
    accuracy_samples: int | None = None
    accuracy_stopped_early: str | None = Field(
        default=None, description="why `accuracy` rests on fewer samples than the search data has"
    )
    latency_ns: Interval | None = None
    latency_p90_ns: float | None = Field(
        default=None, description="of the confirmed measurement where there is one"
    )
    latency_p90_high_ns: float | None = Field(
        default=None, description="what p90 does not pass; None where the samples are too few"
    )
    latency_p99_ns: float | None = None
    latency_p99_high_ns: float | None = None
    peak_memory_bytes: int | None = Field(
        default=None, description="of a process that serves the artifact"
    )
    energy_joules: float | None = Field(
        default=None, description="of one inference, idle share included"
    )
    fp32_ratio: Interval | None = Field(
        default=None, description="latency over the FP32 model's; below 1 is faster"
    )
    latency_samples: int | None = None
    is_steady: bool | None = None
    is_feasible: bool | None = Field(
        default=None,
        description="every limit is kept; the latency's by its upper bound at the asked quantile",
    )
    is_on_front: bool = False
    held_out_accuracy: Interval | None = None
    held_out_accuracy_drop: Interval | None = None
    held_out_samples: int | None = None
    confirmed_latency_ns: Interval | None = None
    confirmed_latency_samples: int | None = None
    confirmed_fp32_ratio: Interval | None = None
    groups: list[GroupPrecision] = []
    profile: TrialProfile | None = None
    prune_ratios: dict[str, float] = {}
    recovery_s: float | None = None
    device_id: str | None = None
    targets: list[TrialOnTarget] = []
    created_at: datetime | None = None
    finished_at: datetime | None = None
    pruned_base: dict[str, Any] | None = Field(
        default=None,
        description="the pruned model under the artifact: how channels were ranked and rounded, "
        "how many stayed, what the recovery did and cost",
    )


class ModelError(Shape):
    """How well the model predicts a trial that it was not fitted to: each left out in turn.

    Over `n` trials, FP32 itself not among them. `latency` is the mean of the absolute error as
    a share of the measured latency, `drop` that of the accuracy drop, a fraction;
    `latency_covered` is the share of trials inside the 95 % interval predicted for them.
    """

    n: int
    latency: float
    latency_covered: float
    drop: float


class HypervolumePoint(Shape):
    """The front's hypervolume once so many trials were finished, and what they had cost.

    `device_s` is the time that devices measured for them; confirming is not in it.
    """

    trials: int
    device_s: float
    hypervolume: float


class Proposer(Shape):
    """What one proposer contributed: its trials, those that rank, those on the front now."""

    trials: int
    ranked: int
    on_front: int


class Progress(Shape):
    """What the live panel shows.

    `time_left_s` follows the pace of the last trials and what confirming will take;
    `time_left_error_s` is the half width of its 95 % interval, None where there is no estimate.
    `device_s` is what devices have measured for the job, confirmations included.
    `hypervolume_history` has a point wherever the hypervolume grew, and the last trial.
    `model_error` is of the model that the last proposals came from; None before there is one.
    """

    phase: str
    trials_finished: int
    trials_total: int
    elapsed_s: float
    time_left_s: float | None = None
    time_left_error_s: float | None = None
    device_s: float = 0.0
    front_size: int = 0
    hypervolume: float | None = Field(
        default=None,
        description="of (FP32 ratio, accuracy drop) against the reference point (1.05, 0.03)",
    )
    hypervolume_history: list[HypervolumePoint] = []
    model_error: ModelError | None = None
    proposers: dict[str, Proposer] = {}
    best_trial: Trial | None = None
    device_name: str | None = None
    device_online: bool | None = None


class BlockingGroup(Shape):
    """A layer group that keeps a trial from its budget, and what it costs in that trial.

    `cost_ns` is the group's share of the trial's latency, by the device's own profile
    of it; `is_profiled` false: by the work planned for the group, for want of a profile. Both are
    None in results of earlier releases.
    """

    group: str
    cost_ns: float | None = None
    share: float | None = None
    is_profiled: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, document: Any) -> Any:
        """Results stored before 2026-11-21 have the group's name alone."""
        return {"group": document} if isinstance(document, str) else document


class TargetResult(Shape):
    """The answer on one device of a job on several: the best trial if it were the only device."""

    device_id: str
    winner: str
    verdict: Verdict
    explanation: str
    missed_by_ns: float | None = None
    latency_budget_ns: float | None = None
    fp32_latency_ns: float | None = None
    beats_baseline: bool = True
    best_baseline: str | None = None
    blocking_groups: list[BlockingGroup] = []


class JobResult(Shape):
    """The answer of a finished job: never empty.

    `winner` is a trial id. `verdict` is `within_budget` or `impossible_budget`; for the
    latter `missed_by_ns` says by how much and `blocking_groups` which groups hold it back,
    slowest first. `beats_baseline` is False where FP32 or uniform INT8 is itself the answer,
    because nothing that was searched is better than it or the best of it is not certainly so;
    `best_baseline` is the trial that would be the answer if nothing had been searched.
    `explanation` is for people. Of a job on several devices `winner` is the best on the worst
    of them (it misses a budget by a share, so that `missed_by_ns` is None), and `targets` has
    the winner on each; it is empty for a job on one.
    """

    winner: str
    verdict: Verdict
    explanation: str
    missed_by_ns: float | None = None
    missed: dict[str, float] = Field(
        default={}, description="by what fraction of each limit the winner is past it"
    )
    blocking_groups: list[BlockingGroup] = []
    best_baseline: str | None = None
    fp32_trial: str | None = None
    int8_trial: str | None = None
    beats_baseline: bool = True
    stopped_because: str = ""
    targets: list[TargetResult] = []


class JobTarget(Shape):
    """A device that a job measures on; the budget and FP32's latency hold there."""

    device_id: str
    device_name: str
    latency_budget_ns: float | None = None
    fp32_latency_ns: float | None = None


class Job(Shape):
    """A job with its state and progress.

    `targets` are its devices, the primary one first: `device_id`, `latency_budget_ns` and
    `fp32_latency_ns` are that one's. It is empty until the devices are found.
    """

    id: str
    name: str
    state: str
    phase: str
    reason: str | None = None
    spec: dict[str, Any]
    device_id: str | None = None
    latency_budget_ns: float | None = None
    fp32_latency_ns: float | None = None
    targets: list[JobTarget] = []
    progress: Progress
    result: JobResult | None = None
    notices: list[str] = []
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Front(Shape):
    """The non-dominated trials, fastest first, and the one that answers the question asked.

    The limits are those that the answer was held to. `verdict`, `missed_by_ns`, `missed` and
    `blocking_groups` mean what they mean in a job's result.
    `device_id` is the device asked about; None in a job on several means the worst of them.
    `answer_is_confirmed`: it was measured again in a fresh process, and judged on held-out data.
    """

    job_id: str
    device_id: str | None = None
    answer_is_confirmed: bool | None = None
    latency_budget_ns: float | None
    latency_at: str = "p50"
    max_accuracy_drop: float | None
    max_size_bytes: float | None = None
    max_memory_bytes: float | None = None
    max_energy_joules: float | None = None
    trials: list[Trial]
    answer: Trial | None
    explanation: str
    verdict: Verdict | None = None
    missed_by_ns: float | None = None
    missed: dict[str, float] = {}
    blocking_groups: list[BlockingGroup] = []


class PortabilityCell(Shape):
    """What a winner is on one device.

    `over_own_winner` is its latency over that of the device's own winner: 1 where it is that
    one, above 1 slower. Figures that do not exist are None; `reason` says why.
    """

    device_id: str
    latency_ns: Interval | None = None
    fp32_ratio: Interval | None = None
    over_own_winner: Interval | None = None
    accuracy_drop: Interval | None = None
    is_feasible: bool | None = None
    is_confirmed: bool = False
    reason: str | None = None


class PortabilityRow(Shape):
    """The winner of one device, on every device of the job; `winner` is a trial id."""

    device_id: str
    winner: str
    number: int
    cells: list[PortabilityCell]


class Portability(Shape):
    """What wins on one device costs on another: a row per winner, a column per device."""

    job_id: str
    targets: list[JobTarget]
    rows: list[PortabilityRow]


class Sensitivity(Shape):
    """What one choice for one group does while all else stays FP32.

    Either `precision` or `prune_ratio` (a fraction of channels) is set. `mean_kl` is in nats
    against FP32's outputs, smaller is better, None where it is not known (yet); an estimate
    follows from cheaper figures and other entries, and has no `accuracy_drop`. `sqnr_db`:
    signal to quantization noise at the group's own output, larger is better. `removed_share`:
    the fraction of the group's squared weights that the prune ratio removes.
    """

    group: str
    precision: str | None = None
    prune_ratio: float | None = None
    mean_kl: float | None = None
    is_estimate: bool = False
    accuracy_drop: float | None = None
    samples: int = 0
    sqnr_db: float | None = None
    removed_share: float | None = None
    wall_s: float = 0.0


class Device(Shape):
    """A device that enrolled."""

    id: str
    name: str
    pool: str | None
    is_online: bool
    last_seen_s_ago: float
    fingerprint: str
    description: dict[str, Any]
    drained_because: str | None = Field(
        default=None, description="why the device gets no work; None where it does"
    )
    canary_ratio: Interval | None = Field(
        default=None,
        description="latency of one model over that of the device's pool; above 1 is slower",
    )
    canary_s_ago: float | None = None


class Quarantined(Shape):
    """An artifact that devices of one fingerprint are not given any more with one runtime."""

    artifact_sha256: str
    fingerprint: str
    runtime: str
    reason: str
    job_id: str
    created_at: datetime


class EnrolmentToken(Shape):
    """A one-use token for one agent, valid for `expires_in_s`."""

    token: str
    expires_in_s: float


class Event(Shape):
    """Something that happened in a job; also the data of one server-sent event."""

    id: int
    job_id: str
    kind: str
    payload: dict[str, Any]
    created_at: datetime


class Verification(Shape):
    """A bundle's model measured again: fresh process on the device, held-out data."""

    artifact_sha256: str
    device_name: str
    outcome: str
    reason: str | None = None
    latency_ns: Interval | None = None
    fp32_ratio: Interval | None = None
    latency_samples: int | None = None
    held_out_accuracy: Interval
    held_out_accuracy_drop: Interval
    held_out_samples: int


class Upload(Shape):
    """A file that the service now has; refer to it as `sha256:HEX` in a job."""

    sha256: str
    size_bytes: int


class Health(Shape):
    """The service answers; `status` is `ok`."""

    status: str
    version: str


class Problem(Shape):
    """Problem details (RFC 9457), with the error's name so that a client can raise it again."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    error: str
    extra: dict[str, Any] = {}
