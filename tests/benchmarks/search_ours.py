"""The search of a job, on an oracle: what the search benchmark calls ours.

Owns how an oracle's points and runs look to the search: the warm start, the models, the mixture
of a batch and Optuna's share of it are the product's own. Left out are mixtures by layer kind,
which a job's warm start tries between the steps of its ladder: oracles have no kinds. The other
searches are `search_methods.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.search import planner
from autotune.search.drop_model import DropModel, Drops
from autotune.search.front import REFERENCE_DROP, REFERENCE_RATIO
from autotune.search.improvement import TEACHING_RUNS, Landscape, most_promising
from autotune.search.landscape import LONG_BUDGET, Encoding, Fitted, Knowledge, conversion
from autotune.search.proposals import BATCH, OPTUNA_EVERY, optunas_part
from autotune.search.sampler import Sampler
from autotune.search.surrogate import Surrogate
from search_spaces import (
    FP32,
    INT8,
    W2,
    W4,
    W8,
    Candidate,
    LayerInventory,
    RuntimeOptions,
    SearchSpace,
)
from storage.records import TrialRecord
from tests.benchmarks.oracles import Oracle, Run
from tests.unit import records

REFERENCE = (REFERENCE_RATIO, REFERENCE_DROP)

_OPTIONS = (FP32, INT8, W8, W4, W2)
"""What an oracle's options are called where precisions are wanted: the search sees numbers."""

_FP32_MS, _FP32_ACCURACY = 4.0, 0.95
"""Of `records`, which ratios and drops are told against."""


def comparison_runs(oracle: Oracle) -> int:
    """Runs after which searches are compared, baselines included: what a job has as its budget."""
    return 60 if oracle.n_groups > 10 else 20


def model_based(oracle: Oracle, runs: int, seed: int, *, budget: int | None = None) -> np.ndarray:
    """The points that a job of `budget` trials measures; past those it goes on as it is.

    Without one it is that of `comparison_runs`.
    """
    budget = budget or comparison_runs(oracle)
    rng = np.random.default_rng(seed)
    points: list[np.ndarray] = []
    found: list[Run] = []
    batch = [*oracle.baselines(), *warm_start(oracle, budget=budget)]
    while batch := batch[: runs - len(points)]:
        points += batch
        found += [oracle.measure(point, rng) for point in batch]
        is_over = len(points) >= runs
        batch = [] if is_over else next_batch(oracle, points, found, seed, budget=budget)
    return np.array(points)


def warm_start(oracle: Oracle, *, budget: int) -> list[np.ndarray]:
    """The ladder by sensitivity behind uniform INT8, as far as a job's warm start goes."""
    baselines, space = oracle.baselines(), _space([2] * oracle.n_groups)
    damages = zip(space.precisions, oracle.damages(), strict=False)
    damage = {(name, INT8.name): float(own[1]) for name, own in damages}
    steps = []
    for candidate in planner.ladder(space, damage)[1:]:
        steps.append(baselines[1].copy())
        for column, name in enumerate(space.precisions):
            steps[-1][column] *= candidate.precision(name) != FP32
    return steps[: max(BATCH, (budget - len(baselines)) // 4)]


def next_batch(
    oracle: Oracle,
    points: Sequence[np.ndarray],
    found: Sequence[Run],
    seed: int,
    *,
    budget: int,
) -> list[np.ndarray]:
    """A batch of `Proposals.refine`: most of it from the fitted models, the rest Optuna's."""
    n_before = len(points) - len(oracle.baselines()) - len(warm_start(oracle, budget=budget))
    n = BATCH - optunas_part(max(n_before, 0), BATCH, every=OPTUNA_EVERY)
    landscape = fitted(oracle, points, found)
    batch = promising(landscape, points, n, seed, budget=budget)
    encoding = Encoding(space=_space(oracle.sizes), bases=({},))
    trials = [_told(encoding, n, *both) for n, both in enumerate(zip(points, found, strict=True))]
    known = {_candidate(encoding, point).digest for point in (*points, *batch)}
    models = Fitted(
        encoding=encoding,
        knowledge=Knowledge(inventory=LayerInventory(model_digest="", groups=()), damage={}),
        landscape=_OfColumns(landscape.first, landscape.second),
        trials=trials,
        points=np.array(points),
    )
    asked = Sampler(encoding=encoding, seed=seed).propose(
        trials,
        BATCH - len(batch),
        is_unwanted=lambda c: c.digest in known or models.is_hopeless(c),
    )
    rows = [encoding.point(candidate) for candidate in asked]
    return batch + [row[:-2] for row in rows if row is not None]


def promising(
    landscape: Landscape, points: Sequence[np.ndarray], n: int, seed: int, *, budget: int
) -> list[np.ndarray]:
    """The models' part of a batch."""
    promises = most_promising(
        landscape,
        np.array(points),
        reference=REFERENCE,
        n=n,
        rng=np.random.default_rng(seed + len(points)),
        teaching_runs=min(TEACHING_RUNS, budget * TEACHING_RUNS // LONG_BUDGET),
    )
    return [promise.point for promise in promises]


def fitted(oracle: Oracle, points: Sequence[np.ndarray], found: Sequence[Run]) -> Landscape:
    """Both models on what has been measured; the first point is FP32."""
    rows, ratios = np.array(points), np.array([run.ratio for run in found])
    per_nat = conversion([(run.kl, run.drop) for run in found])
    latency, drop = oracle.features(
        per_nat, [run.ratio for run in found[: len(oracle.baselines())]]
    )
    drops = Drops(
        measured=np.array([run.drop for run in found]),
        diverged=per_nat * np.array([run.kl for run in found]),
        errors=np.array([run.drop_error or 0.0 for run in found]),
        n_samples=oracle.n_samples,
        ceiling=REFERENCE_DROP,
    )
    return Landscape(
        Surrogate(latency, rows, ratios, oracle.noise * ratios, base=float(ratios[0])),
        DropModel(drop, rows, drops),
    )


class _OfColumns(Landscape):
    """Asked with an encoding's rows, which end with a base and a runtime."""

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return super().predict(points[:, :-2])


def _space(sizes: Sequence[int]) -> SearchSpace:
    """A group for each column."""
    return SearchSpace(
        precisions={f"column {n:03}": _OPTIONS[:size] for n, size in enumerate(sizes)},
        prune_ratios={},
        runtimes=(RuntimeOptions(),),
    )


def _told(encoding: Encoding, number: int, point: np.ndarray, run: Run) -> TrialRecord:
    """A run as a job keeps it."""
    ms, accuracy = _FP32_MS * run.ratio, _FP32_ACCURACY - run.drop
    return records.trial(number, ms, accuracy, candidate=_candidate(encoding, point))


def _candidate(encoding: Encoding, point: np.ndarray) -> Candidate:
    return encoding.candidate([*point.tolist(), 0, 0])
