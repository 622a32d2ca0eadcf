"""Is a latency measured during a job the idle machine's? `python -m tests.benchmarks.quiet_window`.

One artifact is measured again and again on the local device, alternating between an idle
machine and one whose workers are busy with another job (it is paused for each idle turn).
Every measurement goes through the service like any other. Keys:

- `quiet_ratio`: latency during a job over the mean of the idle ones before and after it; the
  median over rounds. The system's claim is 1 within 3 %;
- `matched_ratio`: during over idle among turns in which the machine was equally fast, which
  is what the claim is about on a host that its neighbours slow down: least squares of
  log(candidate / reference) on "during" and on log(reference time), as a factor;
- `clock_ratio`: the same as `quiet_ratio` for the plain clock time, in which the reference
  cancels nothing;
- `idle_ratio`: the same for idle against idle, which is the noise of the method;
- `n`: rounds.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from autotune.api_types import Job
from autotune.cli.embedded import EmbeddedService
from autotune.client import FINAL_STATES, Client
from autotune.export.bundle import read_bundle
from autotune.spec import JobSpec, read_job
from device_agents.protocol import LatencyReport
from storage.records import MeasurementRecord
from tests.benchmarks.harness import CACHE, Benchmark, Figure, median_figure, start
from tests.benchmarks.main_job import QUICK_MODEL, full_job, quick_job, records

ROUNDS, QUICK_ROUNDS = 20, 1
RESAMPLES = 2000
TURN_TIMEOUT_S = 300.0
BUSY_TRIALS = 2000  # more than any run of this benchmark gets through


def main() -> int:
    benchmark = start("quiet_window", "Latency during a job against the idle machine's.")
    rounds = QUICK_ROUNDS if benchmark.quick else ROUNDS
    job = quick_job(CACHE / "quick") if benchmark.quick else full_job(QUICK_MODEL, CACHE / "digits")
    with tempfile.TemporaryDirectory(prefix="quiet-window-") as folder:
        data_dir = Path(folder)
        with EmbeddedService(data_dir, trust_job_code=False, say=benchmark.say) as service:
            measured = alternate(service.client, read_job(job), data_dir, rounds, benchmark)
        reports = verifications(data_dir, measured)
    idle, during = reports[0::2], reports[1::2]
    benchmark.raw["idle"] = [report.model_dump(mode="json") for report in idle]
    benchmark.raw["during"] = [report.model_dump(mode="json") for report in during]
    for key, ratios in {
        "quiet_ratio": neighbour_ratios([r.p50_ns for r in idle], [r.p50_ns for r in during]),
        "clock_ratio": neighbour_ratios([clock_ns(r) for r in idle], [clock_ns(r) for r in during]),
        "idle_ratio": successive_ratios([r.p50_ns for r in idle]),
    }.items():
        benchmark.raw[f"{key}s"] = ratios
        benchmark.add(key, median_figure(ratios))
    benchmark.add("matched_ratio", matched_ratio(idle, during))
    benchmark.add("n", Figure(value=len(during)))
    benchmark.report()
    return 0


def alternate(
    client: Client, spec: JobSpec, data_dir: Path, rounds: int, benchmark: Benchmark
) -> Job:
    """Measure idle, during, idle, ... during, idle; returns the job that was measured for."""
    finished = client.wait(client.submit(first_job(spec)).id)
    if finished.result is None:
        raise SystemExit(f"the first job ended as {finished.state}: {finished.reason}")
    model = read_bundle(client.export(finished.id, data_dir / "winner.zip")).model
    benchmark.say("idle: measuring")
    client.verify(finished.id, model)
    busy = client.submit(busy_job(spec))
    for turn in range(1, rounds + 1):
        if turn > 1:
            client.resume(busy.id)
        until(lambda: makes_progress(client, busy.id), f"job {busy.id} computes")
        benchmark.say(f"round {turn} of {rounds}: measuring while the other job computes")
        client.verify(finished.id, model)
        client.cancel(busy.id)
        until(lambda: client.job(busy.id).state in FINAL_STATES, f"job {busy.id} pauses")
        benchmark.say(f"round {turn} of {rounds}: measuring on the idle machine")
        client.verify(finished.id, model)
    return finished


def first_job(spec: JobSpec) -> JobSpec:
    """The shortest job that has a winner: the baselines and one more."""
    search = spec.search.model_copy(update={"trials": 3, "prune_ratios": (0.0,)})
    return spec.model_copy(update={"name": "measured", "search": search})


def busy_job(spec: JobSpec) -> JobSpec:
    """A job that keeps the workers busy for as long as it is let."""
    search = spec.search.model_copy(update={"trials": BUSY_TRIALS})
    return spec.model_copy(update={"name": "busy", "search": search})


def makes_progress(client: Client, job_id: str) -> bool:
    """The job's workers are up and at work: its trials move."""
    job = client.job(job_id)
    if job.state in FINAL_STATES and job.state != "cancelled":
        raise SystemExit(f"the busy job ended as {job.state}: {job.reason}")
    trials = client.trials(job_id)
    return job.state == "running" and any(trial.state == "running" for trial in trials)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for the condition.

    Raises:
        SystemExit: it did not come true in time.
    """
    deadline = time.monotonic() + TURN_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {TURN_TIMEOUT_S:.0f} s: {what}")
        time.sleep(0.2)


def verifications(data_dir: Path, job: Job) -> list[LatencyReport]:
    """The reports of all measurements made for the job after it had finished, in their order."""
    with records(data_dir) as repository:
        found = repository.list_measurements(job.id)
    later = [r for r in found if job.finished_at is not None and r.created_at > job.finished_at]
    return [required_report(record) for record in sorted(later, key=lambda r: r.created_at)]


def required_report(record: MeasurementRecord) -> LatencyReport:
    """The record's report.

    Raises:
        SystemExit: the measurement failed, so that the alternation has a hole.
    """
    if record.report is None:
        raise SystemExit(f"a measurement ended as {record.outcome}: {record.reason}")
    return record.report.model_copy(update={"blocks": ()})


def clock_ns(report: LatencyReport) -> float:
    """The artifact's latency by the clock: its ratio times what the reference took just then."""
    return report.ratio * report.reference_p50_ns


def neighbour_ratios(idle: Sequence[float], during: Sequence[float]) -> list[float]:
    """Each value during a job over the mean of the idle ones around it."""
    pairs = itertools.pairwise(idle)
    return [value / ((a + b) / 2) for value, (a, b) in zip(during, pairs, strict=True)]


def matched_ratio(idle: Sequence[LatencyReport], during: Sequence[LatencyReport]) -> Figure:
    """During over idle at equal speed of the machine, with a bootstrap interval over turns.

    Analysis of covariance: log ratio = a + b * during + c * log(reference time); exp(b).
    """
    rng = np.random.default_rng(0)
    drawn = [
        _during_effect(
            [idle[i] for i in rng.integers(len(idle), size=len(idle))],
            [during[i] for i in rng.integers(len(during), size=len(during))],
        )
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = _during_effect(idle, during)
    return Figure(value=value, low=float(low), high=float(high), n=len(during))


def _during_effect(idle: Sequence[LatencyReport], during: Sequence[LatencyReport]) -> float:
    reports = [*idle, *during]
    is_during = [0.0] * len(idle) + [1.0] * len(during)
    speed = np.log([r.reference_p50_ns for r in reports])
    design = np.column_stack([np.ones(len(reports)), is_during, speed - speed.mean()])
    effect = np.linalg.lstsq(design, np.log([r.ratio for r in reports]), rcond=None)[0]
    return float(np.exp(effect[1]))


def successive_ratios(values: Sequence[float]) -> list[float]:
    """Each value over the one before it."""
    return [after / before for before, after in itertools.pairwise(values)]


if __name__ == "__main__":
    sys.exit(main())
