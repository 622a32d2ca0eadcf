"""The child side of a measurement: load both models, have them timed, write the report.

Runs as `python -m device_agents.measurement_child JOB.json REPORT.json` in a process that may
crash, hang or run out of memory; `measurement.py` supervises it, `sampling.py` holds the timed
loop. Nothing of the protocol is imported here: start-up is a third of a short measurement, and
pydantic would double it. Sets nothing that a user's own deployment would not have: no pinning,
no priority, no session option that was not asked for. Each model has its own options: the
reference's are pinned for a job, whatever a candidate runs with.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from device_agents.conditions import cpu_ticks, read_conditions
from device_agents.energy import ACCELERATED, EnergyMeter, NoEnergySensor, open_meter
from device_agents.errors import RuntimeUnavailable
from device_agents.feeds import make_feeds
from device_agents.files import NO_ROOM, NO_ROOM_EXIT
from device_agents.isolation import die_with_parent, leave_network
from device_agents.latency import energy_per_inference, summarize
from device_agents.profile import profile
from device_agents.quantiles import tail_bounds
from device_agents.runtimes import (
    InvalidArtifact,
    Runtime,
    RuntimeOptions,
    UnsupportedModel,
    load_runtime,
)
from device_agents.sampling import Call, SamplingPlan, Subject, sample
from device_agents.watch import DeviceWatch

LARGEST_FILE_BYTES = 2**30
"""What a runtime may write to one file: compiled kernels and profiles are far smaller."""
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory", "MemoryError")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildJob:
    """What the parent asks for; the fields mean what `protocol.MeasurementRequest` says.

    `rest_ns` and `rest_cap_s` are `rest.Rest`. `memory_limit_bytes` bounds the private writable
    memory of the process, None leaves it; `cpu_limit_s` is CPU time over all threads.
    """

    candidate_path: str
    reference_path: str
    runtime: str
    options: RuntimeOptions
    reference_runtime: str
    reference_options: RuntimeOptions
    target_half_width: float
    time_cap_s: float
    rest_ns: float | None
    rest_cap_s: float | None
    is_calibration: bool
    min_blocks: int
    seed: int
    reference_latency_ns: float | None
    memory_limit_bytes: int | None
    cpu_limit_s: int
    parent_pid: int
    profile: bool
    quantile: str = "p50"

    @property
    def is_reference(self) -> bool:
        """The candidate is the reference's file, run the same way."""
        candidate = (self.candidate_path, self.runtime, self.options)
        return candidate == (self.reference_path, self.reference_runtime, self.reference_options)

    @classmethod
    def read(cls, path: Path) -> ChildJob:
        """The job that the parent wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        for name in ("options", "reference_options"):
            fields[name] = RuntimeOptions(**fields[name])
        return cls(**fields)


def main(arguments: Sequence[str]) -> int:
    """Measure as the job file says and write the report; 0 also for a refused model.

    `NO_ROOM_EXIT` where there is no room for the report: that is the device's, not the model's.
    """
    job_path, report_path = (Path(argument) for argument in arguments)
    job = ChildJob.read(job_path)
    confine(job)
    document = attempt(job)
    part = report_path.with_suffix(".part")
    try:
        part.write_text(json.dumps(document), encoding="utf-8")
        part.replace(report_path)
    except OSError as error:
        if error.errno in NO_ROOM:
            return NO_ROOM_EXIT
        raise
    return 0


def confine(job: ChildJob) -> None:
    """Die with the parent; stay within the limits; be the first whom the kernel kills."""
    with contextlib.suppress(OSError):  # not Linux, or not permitted: the kernel chooses
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    leave_network()  # before the next line: a new user namespace takes that signal back
    die_with_parent()
    if os.getppid() != job.parent_pid:
        raise SystemExit("the agent that started this measurement is gone")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower_limit(resource.RLIMIT_FSIZE, LARGEST_FILE_BYTES)
    _lower_limit(resource.RLIMIT_CPU, job.cpu_limit_s)
    if job.memory_limit_bytes is not None:
        # What a model really needs; the address space would count every mapped file too.
        _lower_limit(resource.RLIMIT_DATA, job.memory_limit_bytes)


def attempt(job: ChildJob) -> dict[str, Any]:
    """`measure`, with everything that it raises turned into an outcome and a reason."""
    try:
        return measure(job)
    except InvalidArtifact as error:
        return {"outcome": "artifact_corrupt", "reason": str(error)}
    except (UnsupportedModel, RuntimeUnavailable) as error:
        return {"outcome": "unsupported", "reason": str(error)}
    except MemoryError as error:
        return {"outcome": "oom", "reason": f"out of memory: {error or 'allocation refused'}"}
    except Exception as error:  # noqa: BLE001 - whatever else a runtime raises is its crash
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        is_memory = any(sign in first_line for sign in OUT_OF_MEMORY)
        return {"outcome": "oom" if is_memory else "runtime_crash", "reason": first_line}


def measure(job: ChildJob) -> dict[str, Any]:
    """The whole measurement in this process.

    Returns:
        `outcome`, `reason` and `report`, the latter with the keys of `protocol.LatencyReport`
        except `runtime`, which the parent knows.

    Raises:
        InvalidArtifact: one of the files is not a model.
        UnsupportedModel: one of the models cannot run here.
        RuntimeUnavailable: the runtime is not there.
        MemoryError: there is not enough memory.
        InvalidDuration: the clock cannot be trusted.
    """
    started_s = time.monotonic()
    conditions = ConditionsLog()
    runtime = load_runtime(job.runtime)
    models = Models(runtime, job)
    plan = SamplingPlan(
        target_half_width=job.target_half_width,
        time_cap_s=job.time_cap_s,
        min_blocks=job.min_blocks,
        quantile=job.quantile,
        seed=job.seed,
        rest_ns=job.rest_ns,
        rest_cap_s=job.rest_cap_s,
        is_calibration=job.is_calibration,
    )
    before, ticks = conditions.read(), cpu_ticks()
    gc.collect()
    gc.disable()  # a collection in the middle of a sample is Python's time, not the model's
    meter, source = find_meter(job.options.provider)
    watch = runtime.watch or DeviceWatch()
    sampled = sample(
        models.load,
        plan,
        runtime.clock,
        watch=watch,
        meter=meter,
        observe=lambda: conditions.read() | {"missing": {}},
    )
    blocks = sampled.blocks
    gc.enable()
    joules = energy_per_inference(blocks)
    if joules is None:
        source = sampled.energy_missing or source
    after = read_conditions(since=ticks)
    summary = summarize(
        blocks,
        seed=job.seed,
        reference_latency_ns=job.reference_latency_ns,
        reference_rest_ns=job.rest_ns,
        is_reference=job.is_reference,
    )
    if sampled.drift is not None:
        summary = replace(summary, is_steady=False, unsteady_reason=sampled.drift)
    return {
        "outcome": "ok" if summary.is_steady else "unstable",
        "reason": summary.unsteady_reason,
        "report": asdict(summary)
        | tail_bounds(
            blocks,
            reference_latency_ns=job.reference_latency_ns,
            reference_rest_ns=job.rest_ns,
        )
        | {
            "blocks": [asdict(block) for block in blocks],
            "before": before,
            "between": list(sampled.between),
            "after": after,
            "peak_memory_bytes": models.peak_memory_bytes,
            "energy_joules": joules,
            "energy_source": source,
            "tainted_pairs": dict(sampled.tainted_pairs),
            "are_tainted_used": sampled.are_tainted_used,
            "n_restarts": sampled.n_restarts,
            "profile": profile_of(runtime, job) if job.profile else None,
            "runtime_version": runtime.version,
            "wall_s": time.monotonic() - started_s,
        },
    }


class ConditionsLog:
    """Readings of the device, each with the time stolen since the one before."""

    def __init__(self) -> None:
        self._ticks = cpu_ticks()

    def read(self) -> dict[str, Any]:
        """The device now."""
        found = read_conditions(since=self._ticks)
        self._ticks = cpu_ticks()
        return found


def profile_of(runtime: Runtime, job: ChildJob) -> dict[str, Any]:
    """The candidate's profile."""
    return profile(runtime, Path(job.candidate_path), job.options, seed=job.seed)


def find_meter(provider: str) -> tuple[EnergyMeter | None, str]:
    """The energy meter and what it covers; without one, why there is none."""
    try:
        meter = open_meter(on_gpu=provider.startswith(ACCELERATED))
    except NoEnergySensor as error:
        return None, str(error)
    return meter, meter.covers


class Models:
    """Candidate and reference, loaded together as often as is asked.

    `peak_memory_bytes` is that of the process with the candidate loaded and run for the first
    time, which is one that serves it alone.
    """

    def __init__(self, runtime: Runtime, job: ChildJob) -> None:
        self._job = job
        # One runtime where both have the same: a simulated one has its own clock.
        is_shared = job.reference_runtime == job.runtime
        beside = runtime if is_shared else load_runtime(job.reference_runtime)
        self._runtimes: dict[Subject, Runtime] = {"candidate": runtime, "reference": beside}
        self._order: tuple[Subject, Subject] = ("candidate", "reference")
        self.peak_memory_bytes = 0

    def load(self) -> dict[Subject, Call]:
        """Both in new sessions, the other first than the last time: the place counts."""
        calls = {subject: self._load(subject) for subject in self._order}
        self._order = (self._order[1], self._order[0])
        return calls

    def _load(self, subject: Subject) -> Call:
        job, runtime = self._job, self._runtimes[subject]
        if subject == "reference":
            return _load(runtime, job.reference_path, job.reference_options, seed=job.seed)
        call = _load(runtime, job.candidate_path, job.options, seed=job.seed)
        if not self.peak_memory_bytes:
            call()
            self.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return call


def _load(runtime: Runtime, path: str, options: RuntimeOptions, *, seed: int) -> Call:
    session = runtime.load(Path(path), options)
    # One seed for both: where the input shapes agree, the inputs are the same numbers.
    return session.bind(make_feeds(session.inputs, seed=seed))


def _lower_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
