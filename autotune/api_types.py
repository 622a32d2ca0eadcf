"""The shapes of the HTTP API: what `/v1` returns, and what the client and the CLI read.

Owns the wire format of the user's side. The agent's side is `device_agents/protocol.py`.
All latencies are nanoseconds at batch 1, smaller is better; accuracies are fractions from
0 to 1, larger is better.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

API_VERSION = 1
# Version 1 (2026-11-21): jobs, trials, front, events, export, verification, devices, uploads,
# sensitivities.


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

    `stored_bits` is what a weight takes in the file; None in trials of earlier releases.
    `kernel_ns` is what its kernels take by the trial's profile; None without one.
    """

    group: str
    planned: str
    effective: str
    reason: str | None = None
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


class Trial(Shape):
    """One candidate with what is known about it. Figures that do not exist are None."""

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
        default=None, description="why `accuracy` is about fewer samples than the search data has"
    )
    latency_ns: Interval | None = None
    latency_p90_ns: float | None = None
    fp32_ratio: Interval | None = Field(
        default=None, description="latency over the FP32 model's; below 1 is faster"
    )
    latency_samples: int | None = None
    is_steady: bool | None = None
    is_feasible: bool | None = Field(
        default=None, description="the interval's upper bound is inside the latency budget"
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
    pruned_base: dict[str, Any] | None = Field(
        default=None,
        description="the pruned model under the artifact: how channels were ranked and rounded, "
        "how many stayed, what the recovery did and cost",
    )


class Progress(Shape):
    """What the live panel shows."""

    phase: str
    trials_finished: int
    trials_total: int
    elapsed_s: float
    time_left_s: float | None = None
    front_size: int = 0
    hypervolume: float | None = Field(
        default=None,
        description="of (FP32 ratio, accuracy drop) against the reference point (1.05, 0.03)",
    )
    best_trial: Trial | None = None
    device_name: str | None = None
    device_online: bool | None = None


class TargetResult(Shape):
    """The answer on one device of a job on several: the best trial if it were the only device."""

    device_id: str
    winner: str
    verdict: Literal["within_budget", "impossible_budget", "no_budget"]
    explanation: str
    missed_by_ns: float | None = None
    latency_budget_ns: float | None = None
    fp32_latency_ns: float | None = None


class JobResult(Shape):
    """The answer of a finished job: never empty.

    `winner` is a trial id. `verdict` is `within_budget` or `impossible_budget`; for the
    latter `missed_by_ns` says by how much and `blocking_groups` which groups hold it back,
    slowest first. `beats_baseline` is False where FP32 or uniform INT8 is itself the answer.
    `explanation` is for people. Of a job on several devices `winner` is the best on the worst
    of them (it misses a budget by a share, so that `missed_by_ns` is None), and `targets` has
    the winner on each; it is empty for a job on one.
    """

    winner: str
    verdict: Literal["within_budget", "impossible_budget", "no_budget"]
    explanation: str
    missed_by_ns: float | None = None
    blocking_groups: list[str] = []
    fp32_trial: str | None = None
    int8_trial: str | None = None
    beats_baseline: bool = True
    stopped_because: str = ""
    targets: list[TargetResult] = []


class Job(Shape):
    """A job with its state and progress."""

    id: str
    name: str
    state: str
    phase: str
    reason: str | None = None
    spec: dict[str, Any]
    device_id: str | None = None
    latency_budget_ns: float | None = None
    fp32_latency_ns: float | None = None
    progress: Progress
    result: JobResult | None = None
    notices: list[str] = []
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Front(Shape):
    """The non-dominated trials, fastest first, and the one that answers the question asked."""

    job_id: str
    latency_budget_ns: float | None
    max_accuracy_drop: float | None
    trials: list[Trial]
    answer: Trial | None
    explanation: str


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
