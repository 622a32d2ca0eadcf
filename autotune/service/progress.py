"""The progress of a search in figures that no record holds: what was gained, and time left.

Owns how trials become a course over time, and the two estimates of time. Shapes are
`autotune.api_types`'; ranking is `autotune.search.front`'s. Everything follows from stored
records, so that a job shows the same progress after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np

from autotune.api_types import HypervolumePoint, Proposer
from autotune.search import improvement
from autotune.search.front import REFERENCE_DROP, REFERENCE_RATIO, latency_of, ranks
from autotune.spec import JobSpec
from storage.records import JobRecord, TrialRecord, TrialState

_PACE_TRIALS = 8
"""The pace is that of the last trials: baselines and warm-up say little about the rest."""

_FEWEST_GAPS = 2

# Student's t, 97.5 %, for 1 to 7 degrees of freedom: as many as the gaps of `_PACE_TRIALS` have.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)

_CONFIRMATIONS = 5
"""Trials measured again at the end: two baselines and three members of the front."""

_CONFIRMING_ERROR = 0.5
"""Half width of the time of confirming, as a share of it, before it is under way. A choice."""


class TimeLeft(NamedTuple):
    """Seconds, and the half width of their 95 % interval; None where it is not known."""

    estimate_s: float | None
    error_s: float | None


def hypervolume_history(trials: Sequence[TrialRecord]) -> list[HypervolumePoint]:
    """How the hypervolume grew with the finished trials, in the order in which they ended.

    `trials` as the job's objective sees them. Each counts with the best-founded figures that it
    has now, so that the last point is the hypervolume of today's front. A point where it grew,
    and the last one; empty before the first trial.
    """
    area = REFERENCE_RATIO * REFERENCE_DROP
    front, spent_s, found = np.empty((0, 2)), 0.0, 0.0
    points: list[HypervolumePoint] = []
    finished = _in_order(trials)
    for number, trial in enumerate(finished, start=1):
        spent_s += screening_s(trial)
        latency, grown = latency_of(trial), found
        if ranks(trial) and latency is not None and trial.accuracy is not None:
            drop = min(max(trial.accuracy.drop, 0.0), REFERENCE_DROP)
            front = improvement.front_of(np.vstack([front, (latency.ratio, drop)]))
            grown = improvement.hypervolume(front, (REFERENCE_RATIO, REFERENCE_DROP)) / area
        if grown > found or number == len(finished):
            points.append(HypervolumePoint(trials=number, device_s=spent_s, hypervolume=grown))
        found = grown
    return points


def screening_s(trial: TrialRecord) -> float:
    """Seconds for which devices measured the trial during the search; reports say how long."""
    reports = [trial.latency, *(figures.latency for figures in trial.further)]
    return sum(report.wall_s for report in reports if report is not None)


def confirming_s(trial: TrialRecord) -> float:
    """Seconds for which devices measured it again to confirm it."""
    reports = [trial.confirmed_latency, *(figures.confirmed_latency for figures in trial.further)]
    return sum(report.wall_s for report in reports if report is not None)


def proposers(trials: Sequence[TrialRecord], front: Collection[str]) -> Mapping[str, Proposer]:
    """What each proposer contributed, the most trials first; `front` holds ids of its members."""
    found: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        found.setdefault(trial.proposed_by, []).append(trial)
    return {
        name: Proposer(
            trials=len(own),
            ranked=sum(ranks(trial) for trial in own),
            on_front=sum(trial.id in front for trial in own),
        )
        for name, own in sorted(found.items(), key=lambda entry: -len(entry[1]))
    }


def time_left(
    job: JobRecord, trials: Sequence[TrialRecord], *, spec: JobSpec, elapsed_s: float
) -> TimeLeft:
    """What the search and the confirming take from now on.

    The search from the pace of the last trials, at most what the time budget leaves; its error
    is that of a sum of gaps like the last ones (a prediction interval: mean and each new gap
    vary). Confirming from the time that screening took: a half as wide interval takes four
    times as long.
    """
    if job.state.is_final:
        return TimeLeft(0.0, 0.0)
    finished = _in_order(trials)
    left = max(spec.search.trials - len(finished), 0)
    if job.phase == "confirming":
        left = 0
    search = _search_left(finished, left)
    if spec.search.time_s is not None and job.started_at is not None:
        limit_s = max(spec.search.time_s - elapsed_s, 0.0)
        if search.estimate_s is None:
            return TimeLeft(limit_s, None)
        if limit_s < search.estimate_s:
            search = TimeLeft(limit_s, 0.0)
    if search.estimate_s is None:
        return search
    confirm_s = _confirming_left(trials, spec)
    if search.error_s is None or confirm_s is None:
        return search
    error_s = math.hypot(search.error_s, _CONFIRMING_ERROR * confirm_s)
    return TimeLeft(search.estimate_s + confirm_s, error_s)


def _search_left(finished: Sequence[TrialRecord], left: int) -> TimeLeft:
    ends = [trial.finished_at for trial in finished if trial.finished_at is not None]
    gaps = np.diff([end.timestamp() for end in ends[-_PACE_TRIALS:]])
    if left == 0:
        return TimeLeft(0.0, 0.0)
    if len(gaps) < _FEWEST_GAPS:
        return TimeLeft(None, None)
    spread = float(np.std(gaps, ddof=1)) * math.sqrt(left + left**2 / len(gaps))
    return TimeLeft(left * float(np.mean(gaps)), _T95[len(gaps) - 2] * spread)


def _confirming_left(trials: Sequence[TrialRecord], spec: JobSpec) -> float | None:
    """Seconds of measuring again what is still to be confirmed; None before any screening."""
    again = [s for s in map(confirming_s, trials) if s > 0]
    once = [s for s in map(screening_s, trials) if s > 0]
    left = max(_CONFIRMATIONS - len(again), 0)
    plan = spec.measurement
    if again:
        return left * float(np.mean(again))
    if not once:
        return None
    longer = (plan.target_half_width / plan.confirmation_half_width) ** 2
    cap_s = plan.confirmation_time_cap_s * max(len(spec.targets), 1)
    return left * min(float(np.mean(once)) * longer, cap_s)


def _in_order(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The finished trials by when they ended."""

    def ended(trial: TrialRecord) -> tuple[datetime, int]:
        return trial.finished_at or trial.created_at, trial.number

    return sorted((t for t in trials if t.state is TrialState.FINISHED), key=ended)
