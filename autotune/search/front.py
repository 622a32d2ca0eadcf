"""The front: which trials are not dominated, and which one answers a budget.

Owns the comparison of trials and nothing else: it measures nothing and stores nothing.
Sense: accuracy larger is better, latency smaller is better. A trial whose figures are
missing, not finite or unsteady never ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from device_agents.protocol import LatencyReport
from search_spaces import LayerInventory
from storage.records import AccuracyReport, TrialOutcome, TrialRecord

REFERENCE_RATIO = 1.05
"""Latency of the hypervolume's reference point, as a fraction of FP32's: 5 % slower."""

REFERENCE_DROP = 0.03
"""Accuracy drop of the hypervolume's reference point: three points lost."""

Verdict = Literal["within_budget", "impossible_budget", "no_budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The trial that answers a question, and why.

    `missed_by_ns` is how far the winner's upper bound lies above the budget when nothing is
    inside it. `misses_drop` says that no trial inside the budget kept the accuracy asked for.
    """

    winner: TrialRecord
    verdict: Verdict
    explanation: str
    missed_by_ns: float | None = None
    misses_drop: bool = False


def latency_of(trial: TrialRecord) -> LatencyReport | None:
    """The trial's best-founded latency: the confirmed one where there is one."""
    return trial.confirmed_latency or trial.latency


def accuracy_drop_of(trial: TrialRecord) -> float | None:
    """The trial's accuracy drop as a fraction: the larger of search and held-out data's.

    The larger, so that a candidate picked because it was lucky on the search data does not
    pass on that luck.
    """
    reports = [r for r in (trial.accuracy, trial.held_out_accuracy) if r is not None]
    return max((r.drop for r in reports), default=None)


def ranks(trial: TrialRecord) -> bool:
    """The trial has everything that a comparison needs."""
    latency = latency_of(trial)
    return (
        trial.outcome is TrialOutcome.OK
        and trial.accuracy is not None
        and math.isfinite(trial.accuracy.value)
        and latency is not None
        and latency.is_steady
        and math.isfinite(latency.p50_ns)
    )


def is_feasible(trial: TrialRecord, budget_ns: float | None) -> bool:
    """The upper bound of the latency interval is inside the budget (any, where it is None)."""
    latency = latency_of(trial)
    if latency is None or not ranks(trial):
        return False
    return budget_ns is None or latency.p50_high_ns <= budget_ns


def counts_size(spec: Mapping[str, Any]) -> bool:
    """The job file names size as an objective."""
    return "size" in spec.get("search", {}).get("objectives", ())


def non_dominated(trials: Sequence[TrialRecord], *, by_size: bool = False) -> list[TrialRecord]:
    """The trials that no other beats in both accuracy and latency, fastest first.

    With `by_size` a trial stays also where each that beats it is a larger file; one whose size
    is not known counts as the largest. Of trials equal in all that counts, the one with the
    lower number stays, so that the order of arrival never matters. An empty input gives an
    empty front.
    """
    ordered = sorted(
        (t for t in trials if ranks(t)),
        key=lambda t: (_p50(t), -_accuracy(t), _size(t) if by_size else 0.0, t.number),
    )
    front: list[TrialRecord] = []
    for trial in ordered:
        if not any(
            _accuracy(kept) >= _accuracy(trial) and not (by_size and _size(kept) > _size(trial))
            for kept in front
        ):
            front.append(trial)
    return front


def hypervolume(trials: Sequence[TrialRecord]) -> float:
    """The share of the reference box that the trials dominate, from 0 to 1; larger is better.

    The box spans (ratio to FP32 latency, accuracy drop) from (0, 0) to (1.05, 0.03); drops
    below zero count as zero, because they are within the noise of the metric.
    """
    points = sorted(
        (
            (latency.ratio, min(max(trial.accuracy.drop, 0.0), REFERENCE_DROP))
            for trial in trials
            if ranks(trial)
            and (latency := latency_of(trial)) is not None
            and trial.accuracy is not None
        ),
        reverse=True,
    )
    # Swept from slow to fast: a point adds the strip between its ratio and the next slower
    # one, as high as the best drop reached by anything at least as fast.
    area = 0.0
    for index, (ratio, _) in enumerate(points):
        right = REFERENCE_RATIO if index == 0 else min(points[index - 1][0], REFERENCE_RATIO)
        drop = min(d for r, d in points[index:])
        area += max(right - ratio, 0.0) * (REFERENCE_DROP - drop)
    return area / (REFERENCE_RATIO * REFERENCE_DROP)


def answer(
    trials: Sequence[TrialRecord],
    *,
    latency_budget_ns: float | None,
    max_accuracy_drop: float | None,
    on_every_device: bool = False,
) -> Answer | None:
    """The trial that answers the question; None only where no trial ranks at all.

    Inside the budget, and within the drop where one is given, the fastest trial wins when a
    drop was given and the most accurate one when it was not. Where nothing is inside the
    budget the fastest trial is the answer, with the distance. Where the drop cannot be kept,
    the most accurate trial inside the budget is. `on_every_device` says that the trials are
    seen as the worst of several devices has them (`targets.py`): budget and distance are then
    told as what they are, shares of each device's budget.

    A trial whose rounding was learned for its candidate alone never wins by itself: it takes
    the winner's place where it is the same candidate and no worse (`is_no_worse`).
    """
    found = _best(
        [t for t in trials if t.candidate.rounding is None and ranks(t)],
        latency_budget_ns,
        max_accuracy_drop,
        on_every_device,
    )
    return found and _with_learned_rounding(found, trials, latency_budget_ns)


def _best(
    ranking: Sequence[TrialRecord],
    latency_budget_ns: float | None,
    max_accuracy_drop: float | None,
    on_every_device: bool,
) -> Answer | None:
    inside = _inside(latency_budget_ns, on_every_device)
    if not ranking:
        return None
    feasible = [t for t in ranking if is_feasible(t, latency_budget_ns)]
    if not feasible:
        return _unreachable(ranking, latency_budget_ns or 0.0, max_accuracy_drop, on_every_device)
    verdict: Verdict = "no_budget" if latency_budget_ns is None else "within_budget"
    if max_accuracy_drop is None:
        winner = min(feasible, key=_least_drop_first)
        return Answer(
            winner=winner,
            verdict=verdict,
            explanation=f"the {_of('most accurate', len(feasible))}{inside}",
        )
    kept = [t for t in feasible if _drop(t) <= max_accuracy_drop]
    if kept:
        winner = min(kept, key=_fastest_first)
        return Answer(
            winner=winner,
            verdict=verdict,
            explanation=(
                f"the {_of('fastest', len(kept))}{inside} that "
                f"{'loses' if len(kept) == 1 else 'lose'} at most "
                f"{_points(max_accuracy_drop)} against FP32"
            ),
        )
    winner = min(feasible, key=_least_drop_first)
    return Answer(
        winner=winner,
        verdict=verdict,
        misses_drop=True,
        explanation=(
            f"no trial{inside} loses at most {_points(max_accuracy_drop)}; "
            f"the one that loses least of {len(feasible)} loses {_points(_drop(winner))}"
        ),
    )


def is_no_worse(learned: TrialRecord, winner: TrialRecord, budget_ns: float | None) -> bool:
    """A learned rounding may take the place of the rounding that it began with.

    Confirmed, within the budget and not certainly slower; and neither on the search data nor
    on the held-out data does it lose more, nor reach its interval higher.
    """
    mine, theirs = latency_of(learned), latency_of(winner)
    pairs = (
        (learned.accuracy, winner.accuracy),
        (learned.held_out_accuracy, winner.held_out_accuracy),
    )
    return (
        learned.confirmed_latency is not None
        and is_feasible(learned, budget_ns)
        and mine is not None
        and theirs is not None
        and mine.p50_low_ns <= theirs.p50_high_ns
        and all(
            a is not None and b is not None and a.drop <= b.drop and a.drop_high <= b.drop_high
            for a, b in pairs
        )
    )


def _with_learned_rounding(
    found: Answer, trials: Sequence[TrialRecord], budget_ns: float | None
) -> Answer:
    for trial in trials:
        origin = replace(trial.candidate, rounding=None)
        if (
            trial.candidate != origin == found.winner.candidate
            and is_no_worse(trial, found.winner, budget_ns)
        ):  # fmt: skip
            why = f"with a rounding of its own, it is no worse than trial {found.winner.number}"
            return replace(found, winner=trial, explanation=f"{found.explanation}; {why}")
    return found


def select(trials: Sequence[TrialRecord], how: str) -> TrialRecord | None:
    """A front member by name: `fastest`, `most-accurate` or `knee`; None if the front is empty.

    The knee is the member farthest from the line between the front's two ends, both axes
    scaled to the front's extent.

    Raises:
        ValueError: `how` is none of the three.
    """
    front = non_dominated(trials)
    if how not in ("fastest", "most-accurate", "knee"):
        raise ValueError(f"{how!r} is not a selection; write knee, fastest or most-accurate")
    if not front:
        return None
    if how == "fastest":
        return front[0]
    if how == "most-accurate":
        return front[-1]
    return _knee(front)


def blocking_groups(trial: TrialRecord, inventory: LayerInventory, *, n: int = 5) -> list[str]:
    """The layer groups that hold the trial's latency up, heaviest first.

    By the device's own profile; without one weighed by multiply-accumulates times the planned
    bits of weights and activations, scaled by what pruning kept.
    """
    profiles = (r.profile for r in (trial.confirmed_latency, trial.latency) if r is not None)
    measured = next((p.group_ns() for p in profiles if p is not None), {})
    if measured:
        return sorted(measured, key=lambda name: -measured[name])[:n]
    weights = {
        group.name: group.macs
        * max(
            trial.candidate.precision(group.name).weight_bits,
            trial.candidate.precision(group.name).activation_bits,
        )
        / 32
        * _kept(trial, [layer.name for layer in group.layers], inventory)
        for group in inventory.groups
    }
    return sorted(weights, key=lambda name: -weights[name])[:n]


def _kept(trial: TrialRecord, layers: Sequence[str], inventory: LayerInventory) -> float:
    ratios = [
        trial.candidate.prune_ratio(group.name)
        for group in inventory.prunable_groups
        if set(group.layers) & set(layers)
    ]
    return 1.0 - max(ratios, default=0.0)


def _unreachable(
    ranking: Sequence[TrialRecord],
    budget_ns: float,
    max_accuracy_drop: float | None,
    on_every_device: bool,
) -> Answer:
    kept = [t for t in ranking if max_accuracy_drop is None or _drop(t) <= max_accuracy_drop]
    winner = min(kept or ranking, key=_fastest_first)
    latency = latency_of(winner)
    missed = (latency.p50_high_ns if latency else math.inf) - budget_ns
    within = ""
    if max_accuracy_drop is not None:
        bound = f"loses at most {_points(max_accuracy_drop)}"
        within = f" that {bound}" if kept else f" (none {bound})"
    distance = f"{missed / budget_ns:.2g} of it" if on_every_device else _ms(missed)
    return Answer(
        winner=winner,
        verdict="impossible_budget",
        missed_by_ns=None if on_every_device else missed,
        misses_drop=not kept,
        explanation=(
            f"no trial is{_inside(budget_ns, on_every_device)}; the fastest one{within} misses it "
            f"by {distance} (upper bound of its interval)"
        ),
    )


def _knee(front: Sequence[TrialRecord]) -> TrialRecord:
    first, last = front[0], front[-1]
    width = _p50(last) - _p50(first)
    height = _accuracy(last) - _accuracy(first)
    if width <= 0 or height <= 0:
        return first
    return max(
        front,
        key=lambda t: (_accuracy(t) - _accuracy(first)) / height - (_p50(t) - _p50(first)) / width,
    )


def _accuracy(trial: TrialRecord) -> float:
    return _report(trial).value


def _drop(trial: TrialRecord) -> float:
    drop = accuracy_drop_of(trial)
    return math.inf if drop is None else drop


def _report(trial: TrialRecord) -> AccuracyReport:
    if trial.accuracy is None:
        raise ValueError(f"trial {trial.number} has no accuracy and cannot rank")
    return trial.accuracy


def _size(trial: TrialRecord) -> float:
    return math.inf if trial.artifact_size_bytes is None else float(trial.artifact_size_bytes)


def _p50(trial: TrialRecord) -> float:
    latency = latency_of(trial)
    return math.inf if latency is None else latency.p50_ns


def _fastest_first(trial: TrialRecord) -> tuple[float, float, int]:
    return (_p50(trial), -_accuracy(trial), trial.number)


def _least_drop_first(trial: TrialRecord) -> tuple[float, float, int]:
    """Most accurate first, by the worse of search and held-out data: luck does not win."""
    return (_drop(trial), _p50(trial), trial.number)


def _of(best: str, n: int) -> str:
    return "only trial" if n == 1 else f"{best} of {n} trials"


def _inside(budget_ns: float | None, on_every_device: bool) -> str:
    if budget_ns is None:
        return ""
    return f" inside {'the budget on every device' if on_every_device else _ms(budget_ns)}"


def _ms(duration_ns: float) -> str:
    return f"{duration_ns / 1e6:.3g} ms"


def _points(fraction: float) -> str:
    number = f"{fraction * 100:.2g}"
    return f"{number} point" if number == "1" else f"{number} points"
