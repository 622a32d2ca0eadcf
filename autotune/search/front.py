"""The front: which trials are not dominated, and which one answers a budget.

Owns the comparison of trials and nothing else: it measures nothing and stores nothing.
Sense: accuracy larger is better, latency smaller is better. A trial whose figures are
missing, not finite or unsteady never ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autotune.api_types import Verdict
from autotune.limits import ms_text
from autotune.search.feasibility import Limits, at_quantile
from device_agents.protocol import LatencyReport, Profile, Quantile
from storage.records import AccuracyReport, TrialOutcome, TrialRecord

REFERENCE_RATIO = 1.05
"""Latency of the hypervolume's reference point, as a fraction of FP32's: 5 % slower."""

REFERENCE_DROP = 0.03
"""Accuracy drop of the hypervolume's reference point: three points lost."""

_LIMIT_SHARE = 2 / 3
"""Where a job's limit on the drop lies in its own box, at most: in the usual box a limit of two
points does, and what lies at the limit itself has to count for something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The trial that answers a question, and why.

    Where no trial keeps all limits the winner is the nearest: `missed` says by what fraction of
    each limit it is past those that it does not keep, `missed_by_ns` how far its latency's upper
    bound lies above the budget; what is not known is left out. `misses_drop` says that no trial
    inside the limits kept the accuracy asked for.
    """

    winner: TrialRecord
    verdict: Verdict
    explanation: str
    missed_by_ns: float | None = None
    missed: Mapping[str, float] = field(default_factory=dict)
    misses_drop: bool = False


def latency_of(trial: TrialRecord) -> LatencyReport | None:
    """The trial's best-founded latency: the confirmed one where there is one."""
    return trial.confirmed_latency or trial.latency


def profile_of(trial: TrialRecord) -> Profile | None:
    """The newest kernel profile that has times of layer groups; None without one."""
    reports = (trial.confirmed_latency, trial.latency)
    profiles = (report.profile for report in reports if report is not None)
    return next((p for p in profiles if p is not None and p.group_ns()), None)


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


def is_feasible(trial: TrialRecord, limits: Limits) -> bool:
    """The trial ranks and keeps every limit; of its latency the upper bound does."""
    excesses = limits.excesses(trial, latency_of(trial))
    return ranks(trial) and all(excess <= 0 for excess in excesses.values())


def is_certainly_faster(report: LatencyReport, other: LatencyReport, at: Quantile) -> bool:
    """Its interval at that quantile lies wholly below the other's; not where an end is missing."""
    high, low = at_quantile(report, at).high_ns, at_quantile(other, at).low_ns
    return high is not None and low is not None and high < low


def further_objectives(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """What the job file names as objectives beside accuracy and latency."""
    named = spec.get("search", {}).get("objectives", ())
    return tuple(name for name in FURTHER_OBJECTIVES if name in named)


def non_dominated(
    trials: Sequence[TrialRecord], *, beside: Sequence[str] = ()
) -> list[TrialRecord]:
    """The trials that no other beats in both accuracy and latency, fastest first.

    With objectives `beside` them a trial stays also where each that beats it is worse in one of
    these; a figure that is not known counts as the worst. Of trials equal in all that counts,
    the one with the lower number stays, so that the order of arrival never matters. An empty
    input gives an empty front.
    """

    def losses(trial: TrialRecord) -> tuple[float, ...]:
        return (-_accuracy(trial), *(FURTHER_OBJECTIVES[name](trial) for name in beside))

    ranked = [(trial, losses(trial)) for trial in trials if ranks(trial)]
    ranked.sort(key=lambda pair: (_p50(pair[0]), pair[1], pair[0].number))
    front: list[tuple[TrialRecord, tuple[float, ...]]] = []
    for trial, own in ranked:
        if not any(all(a <= b for a, b in zip(kept, own, strict=True)) for _, kept in front):
            front.append((trial, own))
    return [trial for trial, _ in front]


def reference_drop(max_accuracy_drop: float | None) -> float:
    """The drop, as a fraction, past which nothing counts in a job with that limit.

    >>> [round(reference_drop(limit), 3) for limit in (None, 0.01, 0.1)]
    [0.03, 0.03, 0.15]
    """
    return max(REFERENCE_DROP, (max_accuracy_drop or 0.0) / _LIMIT_SHARE)


def hypervolume(trials: Sequence[TrialRecord], *, largest_drop: float = REFERENCE_DROP) -> float:
    """The share of the reference box that the trials dominate, from 0 to 1; larger is better.

    The box spans (ratio to FP32 latency, accuracy drop) from (0, 0) to (1.05, `largest_drop`);
    drops below zero count as zero, because they are within the noise of the metric.
    """
    points = sorted(
        (
            (latency.ratio, min(max(trial.accuracy.drop, 0.0), largest_drop))
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
        area += max(right - ratio, 0.0) * (largest_drop - drop)
    return area / (REFERENCE_RATIO * largest_drop)


def answer(
    trials: Sequence[TrialRecord],
    *,
    limits: Limits,
    max_accuracy_drop: float | None,
    on_every_device: bool = False,
) -> Answer | None:
    """The trial that answers the question; None only where no trial ranks at all.

    Inside the limits, and within the drop where one is given, the fastest trial wins when a
    drop was given and the most accurate one when it was not. Fastest is by the quantile that the
    limits are about, with a budget or without. Where nothing is inside the limits the nearest
    trial is the answer, with the distance: the one whose largest excess is least, in parts of its
    limit; of a latency budget alone that is the fastest. Where the drop cannot be kept, the most
    accurate trial inside the limits is. `on_every_device` says that the trials are seen as the
    worst of several devices has them (`targets.py`): budget and distance are then told as what
    they are, shares of each device's budget.

    A trial whose rounding was learned for its candidate alone never wins by itself: it takes
    the winner's place where it is the same candidate and no worse (`is_no_worse`).
    """
    found = _best(
        [t for t in trials if t.candidate.rounding is None and ranks(t)],
        limits,
        max_accuracy_drop,
        on_every_device,
    )
    return found and _with_learned_rounding(found, trials, limits)


def _best(
    ranking: Sequence[TrialRecord],
    limits: Limits,
    max_accuracy_drop: float | None,
    on_every_device: bool,
) -> Answer | None:
    words = limits.in_words(on_every_device=on_every_device)
    inside = f" inside {words}" if words else ""
    if not ranking:
        return None
    feasible = [t for t in ranking if is_feasible(t, limits)]
    if not feasible:
        return _unreachable(ranking, limits, max_accuracy_drop, on_every_device)
    verdict: Verdict = "within_budget" if words else "no_budget"
    if max_accuracy_drop is None:
        winner = min(feasible, key=lambda t: _least_drop_first(t, limits.at))
        return Answer(
            winner=winner,
            verdict=verdict,
            explanation=f"the {_of('most accurate', len(feasible))}{inside}",
        )
    kept = [t for t in feasible if _drop(t) <= max_accuracy_drop]
    if kept:
        winner = min(kept, key=lambda t: _fastest_first(t, limits.at))
        return Answer(
            winner=winner,
            verdict=verdict,
            explanation=(
                f"the {_of('fastest', len(kept))}{inside} that "
                f"{'loses' if len(kept) == 1 else 'lose'} at most "
                f"{_points(max_accuracy_drop)} against FP32"
            ),
        )
    winner = min(feasible, key=lambda t: _least_drop_first(t, limits.at))
    return Answer(
        winner=winner,
        verdict=verdict,
        misses_drop=True,
        explanation=(
            f"no trial{inside} loses at most {_points(max_accuracy_drop)}; "
            f"the one that loses least of {len(feasible)} loses {_points(_drop(winner))}"
        ),
    )


def is_no_worse(learned: TrialRecord, winner: TrialRecord, limits: Limits) -> bool:
    """A learned rounding may take the place of the rounding that it began with.

    Confirmed, within the limits and not certainly slower; and neither on the search data nor
    on the held-out data does it lose more, nor reach its interval higher.
    """
    mine, theirs = latency_of(learned), latency_of(winner)
    pairs = (
        (learned.accuracy, winner.accuracy),
        (learned.held_out_accuracy, winner.held_out_accuracy),
    )
    return (
        learned.confirmed_latency is not None
        and is_feasible(learned, limits)
        and mine is not None
        and theirs is not None
        and not is_certainly_faster(theirs, mine, limits.at)
        and all(
            a is not None and b is not None and a.drop <= b.drop and a.drop_high <= b.drop_high
            for a, b in pairs
        )
    )


def _with_learned_rounding(found: Answer, trials: Sequence[TrialRecord], limits: Limits) -> Answer:
    for trial in trials:
        origin = replace(trial.candidate, rounding=None)
        if (
            trial.candidate != origin == found.winner.candidate
            and is_no_worse(trial, found.winner, limits)
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


def _unreachable(
    ranking: Sequence[TrialRecord],
    limits: Limits,
    max_accuracy_drop: float | None,
    on_every_device: bool,
) -> Answer:
    kept = [t for t in ranking if max_accuracy_drop is None or _drop(t) <= max_accuracy_drop]

    def distance(trial: TrialRecord) -> tuple[float, ...]:
        excesses = limits.excesses(trial, latency_of(trial)).values()
        known = [excess for excess in excesses if math.isfinite(excess)]
        return (max(excesses), max(known, default=0.0), *_fastest_first(trial, limits.at))

    winner = min(kept or ranking, key=distance)
    missed = {
        name: excess
        for name, excess in limits.excesses(winner, latency_of(winner)).items()
        if excess > 0
    }
    within = ""
    if max_accuracy_drop is not None:
        bound = f"loses at most {_points(max_accuracy_drop)}"
        within = f" that {bound}" if kept else f" (none {bound})"
    texts = limits.texts(on_every_device=on_every_device)
    only = "fastest" if [*texts] == ["latency"] else "nearest"
    misses = [
        _miss(name, excess, limits, texts, on_every_device) for name, excess in missed.items()
    ]
    known = {name: excess for name, excess in missed.items() if math.isfinite(excess)}
    by_ns = None
    if "latency" in known and limits.latency_ns is not None and not on_every_device:
        by_ns = known["latency"] * limits.latency_ns
    return Answer(
        winner=winner,
        verdict="impossible_budget",
        missed_by_ns=by_ns,
        missed=known,
        misses_drop=not kept,
        explanation=(
            f"no trial is inside {limits.in_words(on_every_device=on_every_device)}; the {only} "
            f"one{within} {' and '.join(misses)}{_alone(ranking, limits, texts)}"
        ),
    )


def _miss(
    name: str, excess: float, limits: Limits, texts: Mapping[str, str], on_every_device: bool
) -> str:
    """By how much one limit is missed, in words."""
    several = len(texts) > 1
    what = texts[name] if several else "it"
    if math.isinf(excess) and name == "latency":
        return f"has too few samples for an upper bound at {limits.at}"
    if math.isinf(excess):
        return f"has no figure for {what}" if several else f"has no figure of its {name}"
    if name != "latency":
        return f"misses {what} by {excess:.2g} of it"
    by = f"{excess:.2g} of it" if on_every_device else ms_text(excess * (limits.latency_ns or 0.0))
    return f"misses {what} by {by} (upper bound of its interval)"


def _alone(ranking: Sequence[TrialRecord], limits: Limits, texts: Mapping[str, str]) -> str:
    """Which of several limits no trial keeps, whatever else it does."""
    if len(texts) < 2:
        return ""
    kept = {
        name
        for trial in ranking
        for name, excess in limits.excesses(trial, latency_of(trial)).items()
        if excess <= 0
    }
    never = [text for name, text in texts.items() if name not in kept]
    if not never:
        return "; each limit alone is kept by some trial"
    return f"; no trial at all is inside {' or '.join(never)}"


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
    return _known(trial.artifact_size_bytes)


def _memory(trial: TrialRecord) -> float:
    latency = latency_of(trial)
    return _known(None if latency is None else latency.peak_memory_bytes)


def _energy(trial: TrialRecord) -> float:
    latency = latency_of(trial)
    return _known(None if latency is None else latency.energy_joules)


def _known(figure: float | None) -> float:
    return math.inf if figure is None or math.isnan(figure) else float(figure)


FURTHER_OBJECTIVES: Mapping[str, Callable[[TrialRecord], float]] = {
    "size": _size,
    "memory": _memory,
    "energy": _energy,
}
"""What may count beside accuracy and latency: bytes of the file, peak bytes of the process that
serves it, joules of an inference. Smaller is better; infinite where it is not known."""


def _p50(trial: TrialRecord) -> float:
    return _latency_ns(trial, "p50")


def _latency_ns(trial: TrialRecord, at: Quantile) -> float:
    latency = latency_of(trial)
    return math.inf if latency is None else at_quantile(latency, at).ns


def _fastest_first(trial: TrialRecord, at: Quantile) -> tuple[float, float, int]:
    return (_latency_ns(trial, at), -_accuracy(trial), trial.number)


def _least_drop_first(trial: TrialRecord, at: Quantile) -> tuple[float, float, int]:
    """Most accurate first, by the worse of search and held-out data: luck does not win."""
    return (_drop(trial), _latency_ns(trial, at), trial.number)


def _of(best: str, n: int) -> str:
    return "only trial" if n == 1 else f"{best} of {n} trials"


def _points(fraction: float) -> str:
    number = f"{fraction * 100:.2g}"
    return f"{number} point" if number == "1" else f"{number} points"
