"""Images evaluated per second, and how few of them a race needs. Keys:

- `throughput_ratio`: images per second that all workers of a real pool evaluate together, over
  (workers x a plain onnxruntime loop's), median of alternating rounds. Both sides end with
  accuracies. The pool starts from a file in the artifact store, which each evaluation reads and
  verifies, as in a job; the loop has the bytes. It runs on one thread, in batches of 16, in a
  process of its own, and does nothing but load the model, run it and count. At least 0.9;
- `racing_error_rate`: the share of simulated candidates whose drop on all samples lies outside
  the bounds that their races ended with, in the worst of the scenarios: shifts of margins of
  several distributions (also heavier ones than races reckon with) and sizes, so that drops lie
  below, at and beyond the limit; without an auxiliary, with one that shifts the same samples,
  and with some that have nothing in common with them. A wrong verdict is outside, too. At most
  `alpha`;
- `broken_class_error_rate`: the same where one class of ten is shifted and the others are not,
  which is not what races expect of samples that they have not seen;
- `images_ratio`: images that random mixed candidates of a model trained on digits use in their
  races, over all of them; a third of the candidates each on the FP32 base, which race by uniform
  INT8, and on the job's pruned ones. `raw` holds each race and whether all images say the same.
  `--quick` has no pruned bases and too few images for a race to end before its last one.

Two more put the first one into its place: `contention_ratio` is as many plain loops as workers
at once over (workers x one alone), which is what the machine itself loses, and `loops_ratio`
the pool over as many plain loops at once, which is what the evaluator and Ray lose.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from autotune.compression.accuracy import ONNXRUNTIME
from autotune.compression.racing import ALPHA, Race, Racing, Shown
from autotune.search.conclusion import build_space
from autotune.search.pruned_bases import Ladder
from autotune.search.races import race_of
from autotune.search.workers import Call, CallFailed, WorkerPool, start_ray, stop_ray
from autotune.spec import JobSpec, read_job
from search_spaces import INT8, Candidate, LayerInventory, SearchSpace
from storage.artifacts import ArtifactFile, ArtifactStore
from storage.records import AccuracyReport
from tests.benchmarks.harness import CACHE, ROOT, Benchmark, Figure, median_figure, start
from tests.benchmarks.main_job import QUICK_MODEL, full_job, quick_job

ROUNDS, QUICK_ROUNDS = 20, 5
SIMULATED, QUICK_SIMULATED = 2_000, 100
CANDIDATES, QUICK_CANDIDATES = 45, 6
BATCH = 16
LEAST_WORK_S, QUICK_LEAST_WORK_S = 3.0, 0.3
"""Evaluations per round are repeated until a plain loop would take about this long: when a round
ends a worker may wait for the other's last evaluation, 0.07 s, which a job has once a batch."""

SIZES: tuple[tuple[int, float, float], ...] = (
    # samples, limit, share of samples that FP32 gets wrong
    (300, 0.03, 0.07),
    (450, 0.01, 0.1),
    (900, 0.01, 0.02),
)
SPREADS = (0.1, 0.3, 0.6, 1.0)
"""Of shifts: FP32's margins go up to 7, as those of a model trained on digits."""

SHIFTS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]] = {
    # from margins' sizes `(n, total)` and spreads `(total,)` to how far each goes to the other side
    "normal": lambda rng, sizes, spread: rng.normal(0, spread, sizes.shape),
    "laplace": lambda rng, sizes, spread: rng.laplace(0, spread / 2**0.5, sizes.shape),
    "t3": lambda rng, sizes, spread: rng.standard_t(3, sizes.shape) * spread / 3**0.5,
    "shrinking": lambda rng, sizes, spread: rng.normal(0.3 * sizes, spread),
    "growing": lambda rng, sizes, spread: rng.normal(0, spread * (0.5 + sizes / 7)),
}
BROKEN_CLASS = "broken class"

DRAWS = 20
"""Of FP32's and the auxiliary's margins, in each scenario: the candidates of one are lucky or
unlucky with the same samples."""

NO_AUXILIARY, ALIKE = "none", "alike"
AUXILIARIES = (NO_AUXILIARY, ALIKE, "unrelated", "shrinking", "collapsed")
"""What races know beforehand: nothing, or the margins of a candidate whose shifts are partly those
of the others and large where theirs are, or of one that tells nothing of them: its shifts are
independent, or take a part of every margin, or it answers the same class whatever it is shown."""


def main() -> int:
    benchmark = start("accuracy_per_image", "Evaluation speed, and the races of candidates.")
    quick = benchmark.quick
    job = quick_job(CACHE / "quick") if quick else full_job(QUICK_MODEL, CACHE / "digits")
    n = QUICK_SIMULATED if quick else SIMULATED
    benchmark.say(f"racing {n} simulated candidates in each scenario")
    benchmark.add("racing_error_rate", error_rate(benchmark, tuple(SHIFTS), n))
    benchmark.add("broken_class_error_rate", error_rate(benchmark, (BROKEN_CLASS,), n))
    with workers(read_job(job)) as (pool, spec, splits, store, n_workers):
        inspection = call(pool, Call(method="inspect"))
        pool.share_source()
        candidate = Candidate(precisions={g.name: INT8 for g in inspection.inventory.groups})
        uniform = call(pool, Call(method="build", arguments=(candidate,)))
        benchmark.say(f"{n_workers} workers against a plain loop")
        kept = kept_in(store, uniform.artifact)
        measure_throughput(benchmark, pool, kept, splits.search, n_workers)
        benchmark.say("races of real candidates")
        space = build_space(spec, inspection.inventory)
        bases = [] if quick else pruned_bases(pool, spec, space, inspection.inventory)
        candidates = mixed(space, [{}, *bases], QUICK_CANDIDATES if quick else CANDIDATES)
        race = race_of(max_accuracy_drop=spec.max_accuracy_drop, seed=spec.seed)
        race = replace(race, auxiliary=uniform.shown)
        race_candidates(benchmark, pool, race, store, candidates)
    benchmark.report()
    return 0


# -- the error rate ------------------------------------------------------------------------


def error_rate(benchmark: Benchmark, kinds: Sequence[str], n: int) -> Figure:
    """The largest share of wrong bounds over the scenarios, with its 95 % interval."""
    from autotune.compression.accuracy import wilson_interval

    rows: list[dict[str, Any]] = []
    for kind, (total, limit, wrong), spread, known in itertools.product(
        kinds, SIZES, SPREADS, AUXILIARIES
    ):
        draws = []
        for seed in range(DRAWS):
            margins, candidates, auxiliary = simulated(
                total, wrong=wrong, kind=kind, spread=spread, n=n // DRAWS, known=known, seed=seed
            )
            race = Race(limit=limit, auxiliary=by(auxiliary))
            draws.append(raced(race, margins, candidates))
        ended = together(draws)
        rows.append(
            {"shifts": kind, "spread": spread, "auxiliary": known}
            | {"samples": total, "limit": limit, "candidates": n}
            | {"mean_drop": float(ended.drop.mean()), "worse": float(ended.is_worse.mean())}
            | {"wrong_worse": int((ended.is_worse & (ended.drop <= limit)).sum())}
            | {"errors": int(ended.is_outside.sum()), "images_ratio": float(ended.used.mean())}
        )
    benchmark.raw.setdefault("simulated", []).extend(rows)
    benchmark.raw["alpha"] = ALPHA
    most = max(int(row["errors"]) for row in rows)
    low, high = wilson_interval(most, n)
    return Figure(value=most / n, low=low, high=high, n=n)


def together(draws: Sequence[Raced]) -> Raced:
    """All of them, one behind the other."""
    parts = {
        field.name: np.concatenate([getattr(draw, field.name) for draw in draws])
        for field in fields(Raced)
    }
    return Raced(**parts)


def simulated(
    total: int,
    *,
    wrong: float,
    kind: str,
    spread: float,
    n: int,
    known: str = NO_AUXILIARY,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """FP32's margins, `(total,)`, those of `n` candidates, `(n, total)`, and an auxiliary's."""
    rng = np.random.default_rng(seed)
    margins = rng.uniform(0, 7, total)
    is_wrong = rng.permutation(total) < round(wrong * total)
    margins[is_wrong] = -rng.uniform(0, 3, int(is_wrong.sum()))
    sizes = np.tile(np.abs(margins), (n, 1))
    ease = rng.lognormal(0, 0.5, total) if known == ALIKE else np.ones(total)
    if kind == BROKEN_CLASS:
        in_class = np.arange(total) % 10 == 0
        shifts = rng.normal(in_class * 3 * spread, np.where(in_class, 1.0, 0.2) * ease, sizes.shape)
    else:
        shifts = SHIFTS[kind](rng, sizes, spread * ease)
    if known == NO_AUXILIARY:
        return margins, _shifted(margins, shifts), None
    # Twice as far as the candidates, as uniform INT8 is beside mixtures.
    own = rng.normal(0, 2 * spread * ease)
    if known == "shrinking":
        own = rng.normal(0.7 * np.abs(margins), spread)
    if known == "collapsed":
        # Nine labels of ten lose by much, the tenth is always right.
        is_answer = np.arange(total) % 10 == 3
        answers = np.abs(rng.normal(5, 1, total)) * np.where(is_answer, 1, -1)
        return margins, _shifted(margins, shifts), answers
    if known == ALIKE:
        shifts = shifts + rng.uniform(0, 0.5, (n, 1)) * own
    return margins, _shifted(margins, shifts), _shifted(margins, own)


def by(margins: np.ndarray | None) -> Shown | None:
    """An auxiliary of which no more is known."""
    return None if margins is None else Shown(margins=margins, divergences=np.zeros(len(margins)))


def _shifted(margins: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Margins moved towards the side where their samples are not."""
    found: np.ndarray = np.where(margins > 0, margins - shifts, margins + shifts)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Raced:
    """How races ended, arrays `(n_candidates,)`; those that saw every sample say nothing wrong.

    `used` is the share of samples seen, `drop` that on all of them; `is_outside` where it is not
    between the bounds that the race ended with, `estimate` what it expected.
    """

    is_worse: np.ndarray
    used: np.ndarray
    drop: np.ndarray
    estimate: np.ndarray
    is_outside: np.ndarray


def raced(race: Race, margins: np.ndarray, candidates: np.ndarray) -> Raced:
    """Races of candidates with these margins, `(n_candidates, total)`, against FP32's."""
    n, total = candidates.shape
    lost = ((margins > 0) & (candidates <= 0)).sum(axis=1)
    drop = (lost - ((margins <= 0) & (candidates > 0)).sum(axis=1)) / total
    racing = Racing(race, margins, n_candidates=n)
    candidates = candidates[:, racing.order]
    is_worse, used, estimate = np.zeros(n, bool), np.ones(n), drop.copy()
    low, high = drop.copy(), drop.copy()
    for stop in range(race.block, total, race.block):
        now = racing.see(candidates[:, stop - race.block : stop])
        new = (now.is_worse | now.is_known) & (used == 1)
        used[new], low[new], high[new] = stop / total, now.low[new], now.high[new]
        estimate[new] = now.drop[new]
        is_worse |= new & now.is_worse
    outside = (drop < low - 1e-9) | (drop > high + 1e-9)
    return Raced(is_worse=is_worse, used=used, drop=drop, estimate=estimate, is_outside=outside)


# -- throughput ----------------------------------------------------------------------------


@contextmanager
def workers(spec: JobSpec) -> Iterator[tuple[WorkerPool, JobSpec, Any, ArtifactStore, int]]:
    """The pool that a service on this machine would run for the job, its data and its store."""
    from autotune.compression.data import split_data

    n_workers = os.cpu_count() or 1
    os.environ["PYTHONPATH"] = str(ROOT)
    splits = split_data(spec.data, seed=spec.seed, trust_job_code=False)
    with tempfile.TemporaryDirectory(prefix="accuracy-per-image-") as folder:
        start_ray(n_workers=n_workers)
        try:
            pool = WorkerPool(
                spec, splits, cache_dir=Path(folder), n_workers=n_workers, trust=False
            )
            yield pool, spec, splits, ArtifactStore(Path(folder) / "artifacts"), n_workers
            pool.close()
        finally:
            stop_ray()


def call(pool: WorkerPool, what: Call) -> Any:
    """One call's result."""
    (result,) = results(pool, [what])
    return result


def kept_in(store: ArtifactStore, artifact: bytes) -> ArtifactFile:
    """The artifact as a job's workers get it."""
    return ArtifactFile(store=store, sha256=store.put(artifact).sha256)


def measure_throughput(
    benchmark: Benchmark, pool: WorkerPool, kept: ArtifactFile, data: Any, n_workers: int
) -> None:
    """Alternate the pool, one plain loop and a plain loop per worker; adds the ratios."""
    artifact = kept.read()
    evaluate = Call(method="search_accuracy", arguments=(kept, ONNXRUNTIME))
    results(pool, [evaluate] * 4 * n_workers)  # every worker evaluates FP32 first
    context = get_context("spawn")
    with ProcessPoolExecutor(
        n_workers, mp_context=context, initializer=hold, initargs=(data.x, data.y)
    ) as loops:
        list(loops.map(plain_loop, [artifact] * 2 * n_workers, [1] * 2 * n_workers))
        least_s = QUICK_LEAST_WORK_S if benchmark.quick else LEAST_WORK_S
        repeats = max(1, round(least_s / loops.submit(plain_loop, artifact, 1).result()))
        rounds = []
        for _ in range(QUICK_ROUNDS if benchmark.quick else ROUNDS):
            alone = len(data) * repeats / loops.submit(plain_loop, artifact, repeats).result()
            started = time.perf_counter()
            results(pool, [evaluate] * repeats * n_workers)
            together = len(data) * repeats * n_workers / (time.perf_counter() - started)
            times = loops.map(plain_loop, [artifact] * n_workers, [repeats] * n_workers)
            side_by_side = sum(len(data) * repeats / seconds for seconds in times)
            rounds.append({"loop": alone, "pool": together, "loops": side_by_side})
    benchmark.raw["images_per_s"] = rounds
    benchmark.raw["workers"] = n_workers
    benchmark.add(
        "throughput_ratio", median_figure([r["pool"] / (n_workers * r["loop"]) for r in rounds])
    )
    benchmark.add("loops_ratio", median_figure([r["pool"] / r["loops"] for r in rounds]))
    benchmark.add(
        "contention_ratio", median_figure([r["loops"] / (n_workers * r["loop"]) for r in rounds])
    )


_held: dict[str, np.ndarray] = {}


def hold(x: np.ndarray, y: np.ndarray) -> None:
    """Keep the data in the loop's process, as workers keep theirs."""
    _held.update(x=x, y=y)


def plain_loop(model: bytes, repeats: int) -> float:
    """Seconds for `repeats` evaluations the shortest way: load, run in batches, count."""
    import onnxruntime

    x, y = _held["x"], _held["y"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    started = time.perf_counter()
    for _ in range(repeats):
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        answers = [
            session.run(None, {name: x[i : i + BATCH]})[0].argmax(axis=1)
            for i in range(0, len(x), BATCH)
        ]
        (np.concatenate(answers) == y).mean()
    return time.perf_counter() - started


# -- races of real candidates --------------------------------------------------------------


def pruned_bases(
    pool: WorkerPool, spec: JobSpec, space: SearchSpace, inventory: LayerInventory
) -> list[dict[str, float]]:
    """The pruned bases that the job would search, made."""
    ladder = Ladder(space=space, inventory=inventory)
    wanted = [ladder.at(level) for level in range(ladder.top, 0, -1)]
    wanted = wanted[: spec.search.max_pruned_bases]
    results(pool, [Call(method="prepare_base", arguments=(base,)) for base in wanted])
    return wanted


def race_candidates(
    benchmark: Benchmark,
    pool: WorkerPool,
    race: Race,
    store: ArtifactStore,
    candidates: Sequence[Candidate],
) -> None:
    """Race random candidates, then show each one every image; adds `images_ratio`."""
    built = results(pool, [Call(method="build", arguments=(c, race)) for c in candidates])
    built = [b for b in built if b.accuracy is not None]
    full = results(
        pool,
        [
            Call(method="search_accuracy", arguments=(kept_in(store, b.artifact), ONNXRUNTIME))
            for b in built
        ],
    )
    total = max(whole.n_samples for whole in full)
    rows = [
        {
            "images": b.accuracy.n_samples,
            "drop": b.accuracy.drop,
            "stopped_early": b.accuracy.stopped_early,
            "full_drop": whole.drop,
            "agrees": agrees(b.accuracy, whole.drop, race.limit),
        }
        for b, whole in zip(built, full, strict=True)
    ]
    benchmark.raw["races"] = {"limit": race.limit, "images": total, "candidates": rows}
    wrong = sum(not row["agrees"] for row in rows)
    benchmark.say(f"{len(rows)} races, {wrong} against what all images say")
    used = np.array([row["images"] / total for row in rows])
    low, high = np.percentile(
        np.random.default_rng(0).choice(used, size=(2000, len(used))).mean(axis=1), [2.5, 97.5]
    )
    benchmark.add(
        "images_ratio",
        Figure(value=float(used.mean()), low=float(low), high=float(high), n=len(used)),
    )


def agrees(report: AccuracyReport, full_drop: float, limit: float) -> bool:
    """The drop on all images is in the race's interval, and beyond the limit if it said so.

    A race run to its end says nothing.
    """
    if report.stopped_early is None:
        return True
    is_inside = report.drop_low <= full_drop <= report.drop_high
    return is_inside and (full_drop > limit or "exceeds" not in report.stopped_early)


def mixed(
    space: SearchSpace, bases: Sequence[Mapping[str, float]], n: int, *, seed: int = 0
) -> list[Candidate]:
    """Random precisions on each base in turn, no two candidates the same."""
    rng = random.Random(seed)
    found: dict[str, Candidate] = {}
    while len(found) < n:
        precisions = {group: rng.choice(offered) for group, offered in space.precisions.items()}
        base = bases[len(found) % len(bases)]
        candidate = Candidate(precisions=precisions, prune_ratios=base)
        found[candidate.digest] = candidate
    return list(found.values())


def results(pool: WorkerPool, calls: Sequence[Call]) -> list[Any]:
    """What the calls return, in their order.

    Raises:
        RuntimeError: a call failed: what came back at once is no speed.
    """
    found = [result for _, result in sorted(pool.run(calls), key=lambda pair: pair[0])]
    failed = [result.error for result in found if isinstance(result, CallFailed)]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(calls)} calls failed, first: {failed[0]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
