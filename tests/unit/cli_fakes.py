"""API shapes with plausible figures, and a client that answers from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autotune.api_types import (
    Device,
    EnrolmentToken,
    Event,
    Front,
    GroupPrecision,
    Health,
    Interval,
    Job,
    JobResult,
    JobTarget,
    Progress,
    Quarantined,
    Sensitivity,
    Trial,
    Verification,
)
from autotune.errors import JobNotReady, NotFoundError
from autotune.spec import JobSpec

NOW = datetime(2026, 11, 21, 8, 30, tzinfo=UTC)
QUARANTINED = Quarantined(
    artifact_sha256="abcdef" + "0" * 58,
    fingerprint="f" * 64,
    runtime="onnxruntime",
    reason="the artifact crashed pi4 3 times, at last: SIGSEGV",
    job_id="job-1",
    created_at=NOW,
)

JOB_FILE = """
name: digits
model: {source: "onnx:model.onnx"}
data: {evaluation: "npz:evaluation.npz"}
"""
Call = Callable[..., int]
"""The command line with its arguments; the exit code."""


def interval(value: float, half_width: float) -> Interval:
    return Interval(value=value, low=value - half_width, high=value + half_width)


def make_trial(
    number: int, *, latency_ms: float = 2.4, accuracy: float = 0.934, **changes: Any
) -> Trial:
    facts: dict[str, Any] = {
        "id": f"trial-{number}",
        "job_id": "job-1",
        "number": number,
        "state": "finished",
        "outcome": "ok",
        "proposed_by": "optuna",
        "candidate": {"version": 1, "precisions": {"fc": "w8a8"}, "runtime": {"threads": 2}},
        "candidate_digest": f"{number:064d}",
        "artifact_sha256": f"{number:064x}",
        "artifact_size_bytes": 2_345_678,
        "accuracy": interval(accuracy, 0.02),
        "accuracy_drop": interval(0.004, 0.003),
        "accuracy_samples": 360,
        "mean_kl": 0.0123,
        "latency_ns": interval(latency_ms * 1e6, 0.03e6),
        "latency_p90_ns": latency_ms * 1.1e6,
        "latency_samples": 320,
        "fp32_ratio": interval(latency_ms / 4, 0.01),
        "is_steady": True,
        "is_feasible": True,
        "is_on_front": True,
        "groups": [
            GroupPrecision(group="conv1", planned="w8a8", effective="w8a8"),
            GroupPrecision(group="fc", planned="w8a8", effective="fp32", reason="no kernel"),
        ],
        "prune_ratios": {"conv1": 0.25, "conv2": 0.0},
    }
    return Trial(**{**facts, **changes})


def make_job(**changes: Any) -> Job:
    facts: dict[str, Any] = {
        "id": "job-1",
        "name": "digits",
        "state": "running",
        "phase": "search",
        "spec": {"model": {"source": "torchvision:resnet18"}},
        "latency_budget_ns": 2e6,
        "fp32_latency_ns": 4e6,
        "targets": [
            JobTarget(
                device_id="device-1",
                device_name="local",
                latency_budget_ns=2e6,
                fp32_latency_ns=4e6,
            )
        ],
        "progress": Progress(
            phase="search",
            trials_finished=7,
            trials_total=40,
            elapsed_s=65.0,
            time_left_s=130.0,
            front_size=3,
            hypervolume=0.01234,
            best_trial=make_trial(5),
            device_name="local",
            device_online=True,
        ),
        "created_at": NOW,
    }
    return Job(**{**facts, **changes})


def make_result(**changes: Any) -> JobResult:
    facts: dict[str, Any] = {
        "winner": "trial-5",
        "verdict": "within_budget",
        "explanation": "it is the fastest trial within 1 point of FP32.",
        "fp32_trial": "trial-0",
        "int8_trial": "trial-1",
        "stopped_because": "all 40 trials are done",
    }
    return JobResult(**{**facts, **changes})


def make_event(number: int, kind: str = "trial_finished", /, **payload: Any) -> Event:
    return Event(id=number, job_id="job-1", kind=kind, payload=payload, created_at=NOW)


def make_device(**changes: Any) -> Device:
    facts: dict[str, Any] = {
        "id": "device-1",
        "name": "pi4",
        "pool": None,
        "is_online": True,
        "last_seen_s_ago": 1.5,
        "fingerprint": "f" * 64,
        "description": {
            "architecture": "aarch64",
            "cpu_model": "Cortex-A72",
            "cpu_flags": ["asimd", "neon"],
            "logical_cpus": 4,
            "memory_bytes": 4_000_000_000,
            "runtimes": [{"name": "onnxruntime", "version": "1.31.1"}],
        },
    }
    return Device(**{**facts, **changes})


@dataclass
class FakeClient:
    """Answers from lists; a job walks through `states`, one step per question."""

    states: list[Job] = field(default_factory=lambda: [finished_job()])
    trial_list: list[Trial] = field(default_factory=lambda: baseline_trials())
    event_list: list[Event] = field(default_factory=list)
    device_list: list[Device] = field(default_factory=lambda: [make_device()])
    sensitivities: list[Sensitivity] = field(default_factory=list)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    limits: list[dict[str, Any]] = field(default_factory=list)
    submitted: list[JobSpec] = field(default_factory=list)
    url: str = "http://127.0.0.1:8577"

    def submit(self, spec: JobSpec) -> Job:
        self.calls.append(("submit", spec.name))
        self.submitted.append(spec)
        return self.states[0]

    def jobs(self) -> list[Job]:
        return [self.states[0]]

    def job(self, reference: str) -> Job:
        if reference not in (self.states[0].id, self.states[0].name):
            raise NotFoundError(f"no job is called {reference!r}")
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def cancel(self, reference: str) -> Job:
        self.calls.append(("cancel", reference))
        return self.states[0]

    def resume(
        self, reference: str, extra_trials: int | None = None, *, time_s: float | None = None
    ) -> Job:
        self.calls.append(("resume", reference, extra_trials, *([time_s] if time_s else [])))
        return self.states[0]

    def trials(self, reference: str) -> list[Trial]:
        return self.trial_list

    def trial(self, job: str, reference: str) -> Trial:
        self.calls.append(("trial", job, reference))
        return next(t for t in self.trial_list if reference in (str(t.number), t.id))

    def front(
        self,
        reference: str,
        budget: str | None = None,
        max_drop: float | None = None,
        *,
        device: str | None = None,
        **limits: Any,
    ) -> Front:
        max_drop = limits.pop("max_accuracy_drop", max_drop)
        self.limits.append(limits)
        self.calls.append(("front", reference, budget, max_drop, *([device] if device else [])))
        return Front(
            job_id="job-1",
            latency_budget_ns=3e6,
            max_accuracy_drop=max_drop,
            trials=[t for t in self.trial_list if t.is_on_front],
            answer=self.trial_list[-1],
            explanation="the fastest within the drop",
        )

    def events(self, reference: str) -> Iterator[Event]:
        yield from self.event_list

    def export(
        self,
        reference: str,
        path: Path,
        *,
        budget: str | None = None,
        select: str | None = None,
        device: str | None = None,
        **limits: Any,
    ) -> Path:
        self.limits.append(limits)
        named = [device] if device else []
        self.calls.append(("export", reference, str(path), budget, select, *named))
        return path

    def sensitivity(self, reference: str) -> list[Sensitivity]:
        self.calls.append(("sensitivity", reference))
        if not self.sensitivities:
            raise JobNotReady("job job-1 has no sensitivities yet; it is running, baselines")
        return self.sensitivities

    def heat_map(self, reference: str, form: str = "svg") -> bytes:
        self.calls.append(("heat_map", reference, form))
        return b"picture"

    def report(self, reference: str) -> str:
        return "<html>report</html>"

    def verify(
        self, reference: str, model: bytes, *, device: str | None = None, trial: str | None = None
    ) -> Verification:
        self.calls.append(("verify", reference, trial or len(model)))
        return make_verification()

    def devices(self) -> list[Device]:
        return self.device_list

    def device(self, reference: str) -> Device:
        return self.device_list[0]

    def enrolment_token(self, pool: str | None = None) -> EnrolmentToken:
        self.calls.append(("enrolment_token", pool))
        return EnrolmentToken(token="once-only", expires_in_s=900.0)

    def revoke_device(self, reference: str) -> Device:
        self.calls.append(("revoke_device", reference))
        return self.device_list[0]

    def rotate_device_key(self, reference: str) -> Device:
        self.calls.append(("rotate_device_key", reference))
        return self.device_list[0]

    def resume_device(self, reference: str) -> Device:
        self.calls.append(("resume_device", reference))
        return self.device_list[0]

    def quarantine(self) -> list[Quarantined]:
        return [QUARANTINED]

    def clear_quarantine(self, digest: str) -> list[Quarantined]:
        self.calls.append(("clear_quarantine", digest))
        return [QUARANTINED]

    def health(self) -> Health:
        return Health(status="ok", version="0.1.0")


def make_verification(**changes: Any) -> Verification:
    facts: dict[str, Any] = {
        "artifact_sha256": "a" * 64,
        "device_name": "local",
        "outcome": "ok",
        "latency_ns": interval(2.41e6, 0.02e6),
        "fp32_ratio": interval(0.602, 0.005),
        "latency_samples": 900,
        "held_out_accuracy": interval(0.93, 0.02),
        "held_out_accuracy_drop": interval(0.005, 0.004),
        "held_out_samples": 540,
    }
    return Verification(**{**facts, **changes})


def finished_job(**changes: Any) -> Job:
    return make_job(state="finished", phase="done", result=make_result(), **changes)


def baseline_trials() -> list[Trial]:
    return [
        make_trial(0, latency_ms=4.0, accuracy=0.94, proposed_by="baseline", is_on_front=False),
        make_trial(1, latency_ms=2.6, accuracy=0.90, proposed_by="baseline", is_on_front=False),
        make_trial(3, latency_ms=2.0, accuracy=0.91),
        make_trial(5, latency_ms=2.4, accuracy=0.934),
    ]
