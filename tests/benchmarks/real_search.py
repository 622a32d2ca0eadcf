"""Our search against Optuna's on real jobs: `python -m tests.benchmarks.real_search`.

Whole jobs on mobilenet_v2 and mobilenet_v3_small (trained on digits at 64x64 with noise), the
agent on this machine: precisions and pruned bases, ours against TPE and NSGA-II (`rivals.py`)
with the same evaluation, baselines and bases. Every method of a seed is given as many device
seconds as the one that used the fewest: trials are counted in the order in which they were
measured, until those are spent. Keys, per model:

- `MODEL.METHOD_hypervolume` for ours, tpe and nsga2: the share of the reference box (1.05 of
  FP32's latency, 3 points lost on the search data) that the trials' front dominates, the mean
  over seeds; the least and the largest are its bounds, n the seeds. Larger is better;
- `MODEL.device_s`: device seconds that each method of a seed was given, the mean over seeds.

Latencies are those of the search's own measurements, alike for all methods. `--quick` is one
seed of ours and of TPE on the quick job of `main_job`, in a few trials.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from autotune.cli.embedded import EmbeddedService
from autotune.search.front import hypervolume
from autotune.spec import JobSpec, read_job
from storage.records import MeasurementRecord, TrialRecord
from tests.benchmarks import headline, rivals
from tests.benchmarks.harness import CACHE, Benchmark, Figure, start
from tests.benchmarks.main_job import QUICK_MODEL, quick_job, records

MODELS = ("mobilenet_v2", "mobilenet_v3_small")
METHODS, QUICK_METHODS = ("ours", *rivals.SAMPLERS), ("ours", "tpe")
SEEDS, QUICK_SEEDS = 3, 1
TRIALS, QUICK_TRIALS = 60, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The trials of one job in the order in which their figures were there.

    `device_s` are the device seconds from the trial before to each.
    """

    trials: Sequence[TrialRecord]
    device_s: Sequence[float]

    @property
    def spent_s(self) -> list[float]:
        """Device seconds spent when each trial was measured."""
        return list(itertools.accumulate(self.device_s))

    def attained(self, device_s: float) -> float:
        """The hypervolume of what was measured within so many device seconds."""
        ended = zip(self.trials, self.spent_s, strict=True)
        return hypervolume([trial for trial, spent_s in ended if spent_s <= device_s])


def main() -> int:
    benchmark = start(
        "real_search",
        "Our search against Optuna's samplers on whole jobs.",
        models=MODELS,
        quick_models=(QUICK_MODEL,),
    )
    for model in benchmark.models:
        job = quick_job(CACHE / "quick") if benchmark.quick else headline.full_job(model)
        compare(benchmark, model, read_job(job))
        benchmark.save()
    benchmark.report()
    return 0


def compare(benchmark: Benchmark, model: str, spec: JobSpec) -> None:
    """Run every method with every seed; add the keys of the model."""
    found = []
    for seed in range(QUICK_SEEDS if benchmark.quick else SEEDS):
        courses: dict[str, Course] = {}
        for method in QUICK_METHODS if benchmark.quick else METHODS:
            benchmark.say(f"{model}, seed {seed}: {method}")
            folder = CACHE / "real_search" / f"{model}-{seed}-{method}"
            bases = folder.with_name(f"{model}-{seed}-{METHODS[0]}") / "bases"
            trials = QUICK_TRIALS if benchmark.quick else TRIALS
            job = seeded(spec, seed=seed, trials=trials)
            courses[method] = run(job, method, folder, bases, benchmark)
        budget_s = min(course.spent_s[-1] for course in courses.values())
        shares = {name: course.attained(budget_s) for name, course in courses.items()}
        found.append({"device_s": budget_s, **shares})
        benchmark.say(", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    benchmark.raw[model] = found
    for key, figure in figures(found).items():
        benchmark.add(f"{model}.{key}", figure)


def figures(found: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """Means over seeds; the least and the largest as bounds."""
    names = [name for name in found[0] if name != "device_s"]
    return {
        **{f"{name}_hypervolume": _over_seeds([row[name] for row in found]) for name in names},
        "device_s": _over_seeds([row["device_s"] for row in found]),
    }


def seeded(spec: JobSpec, *, seed: int, trials: int) -> JobSpec:
    """The job with another seed; it ends by its trials, because the budget is in device seconds."""
    search = spec.search.model_copy(update={"trials": trials, "time_s": None})
    return spec.model_copy(update={"seed": seed, "search": search})


def run(spec: JobSpec, method: str, folder: Path, bases: Path, benchmark: Benchmark) -> Course:
    """One job from its start to its end, with pruned bases that were trained before.

    Raises:
        SystemExit: it ended without an answer.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if bases.exists():
        shutil.copytree(bases, folder / "bases")
    program = ("autotune.cli", "serve") if method == METHODS[0] else (rivals.__name__, method)
    with EmbeddedService(
        folder, trust_job_code=False, say=benchmark.say, program=("-m", *program)
    ) as service:
        job = service.client.wait(service.client.submit(spec).id)
    if job.result is None:
        raise SystemExit(f"the job with {method} ended as {job.state}: {job.reason}")
    with records(folder) as repository:
        return course_of(repository.list_trials(job.id), repository.list_measurements(job.id))


def course_of(trials: Sequence[TrialRecord], measurements: Sequence[MeasurementRecord]) -> Course:
    """Each trial at the end of its last screening, without what confirming it found out later.

    It costs what the device's screenings took since the trial before it: a screening that was
    repeated, or that ended without a report, counts where it was spent.
    """
    by_id = {trial.id: replace(trial, confirmed_latency=None) for trial in trials}
    ended = sorted(
        ((m.finished_at, m) for m in measurements if m.finished_at is not None),
        key=lambda pair: pair[0],
    )
    screenings: list[tuple[MeasurementRecord, float]] = []
    free_at = datetime.min.replace(tzinfo=UTC)
    for finished_at, m in ended:
        if m.trial_id in by_id and m.request.plan.kind == "screening":
            screenings.append((m, _device_s(m, finished_at, free_at)))
        free_at = finished_at
    last = {m.trial_id: m.id for m, _ in screenings}
    placed, device_s, spent_s = [], [], 0.0
    for m, seconds in screenings:
        spent_s += seconds
        if m.trial_id is not None and last[m.trial_id] == m.id:
            placed.append(by_id[m.trial_id])
            device_s.append(spent_s)
            spent_s = 0.0
    return Course(trials=placed, device_s=device_s)


def _device_s(measurement: MeasurementRecord, finished_at: datetime, free_at: datetime) -> float:
    """As reported; else since it was queued and the one device free, if it got there at all.

    Records do not keep when a lease began.
    """
    if measurement.report is not None:
        return measurement.report.wall_s
    if measurement.attempts == 0:
        return 0.0
    return (finished_at - max(measurement.created_at, free_at)).total_seconds()


def _over_seeds(values: Sequence[float]) -> Figure:
    return Figure(value=sum(values) / len(values), low=min(values), high=max(values), n=len(values))


if __name__ == "__main__":
    sys.exit(main())
