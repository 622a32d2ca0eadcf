"""The winner held against the baselines: what was searched wins only where it is better.

Owns that comparison. Points alone would let a lucky measurement beat a baseline that is as
good; so whatever is not certainly better in latency or in accuracy must at least be no worse
in both. Latencies are compared at the quantile that the job asks about. Which trial answers a
question is `front.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autotune.search.feasibility import Limits, at_quantile
from autotune.search.front import (
    Answer,
    accuracy_drop_of,
    answer,
    is_certainly_faster,
    is_feasible,
    latency_of,
)
from device_agents.protocol import LatencyReport, Quantile
from storage.records import AccuracyReport, TrialRecord

BASELINE = "baseline"
"""What `proposed_by` says of FP32 and uniform INT8, on each runtime that is searched."""


def best_baseline(
    trials: Sequence[TrialRecord],
    *,
    limits: Limits,
    max_accuracy_drop: float | None,
    on_every_device: bool = False,
) -> TrialRecord | None:
    """The baseline that would be the answer if nothing had been searched; None before any."""
    found = answer(
        [trial for trial in trials if trial.proposed_by == BASELINE],
        limits=limits,
        max_accuracy_drop=max_accuracy_drop,
        on_every_device=on_every_device,
    )
    return None if found is None else found.winner


def held_to_baselines(
    found: Answer,
    trials: Sequence[TrialRecord],
    *,
    limits: Limits,
    max_accuracy_drop: float | None,
    on_every_device: bool = False,
) -> Answer:
    """The answer; a baseline's where the winner is no better than it beyond the noise.

    Only baselines that keep the limits, and the drop where the winner does, may take its place.
    An impossible budget's answer stays the nearest trial.
    """
    winner = found.winner
    if winner.proposed_by == BASELINE or found.verdict == "impossible_budget":
        return found
    ahead = [
        trial
        for trial in trials
        if trial.proposed_by == BASELINE
        # The baseline itself with a rounding of its own has been held to it (`is_no_worse`).
        and trial.candidate != replace(winner.candidate, rounding=None)
        and is_feasible(trial, limits)
        and (found.misses_drop or _keeps(trial, max_accuracy_drop))
        and not is_better(winner, trial, at=limits.at)
    ]
    instead = best_baseline(
        ahead,
        limits=limits,
        max_accuracy_drop=max_accuracy_drop,
        on_every_device=on_every_device,
    )
    if instead is None:
        return found
    why = (
        f"trial {winner.number} was {found.explanation}, but it is neither certainly faster nor "
        f"certainly more accurate than this baseline "
        f"({_compared(winner, instead, at=limits.at, shares=on_every_device)})"
    )
    return replace(found, winner=instead, explanation=why)


def is_better(trial: TrialRecord, baseline: TrialRecord, *, at: Quantile = "p50") -> bool:
    """The trial may win over the baseline.

    Its interval of latency at that quantile, or of accuracy drop, lies wholly on the better side
    of the baseline's; or neither figure is worse, noise or not.
    """
    mine, theirs = latency_of(trial), latency_of(baseline)
    pair = _same_samples(trial, baseline)
    if mine is None or theirs is None or pair is None:
        return False
    own, other = pair
    if is_certainly_faster(mine, theirs, at) or own.drop_high < other.drop_low:
        return True
    is_no_slower = at_quantile(mine, at).ns <= at_quantile(theirs, at).ns
    return is_no_slower and own.drop <= other.drop


def _same_samples(
    trial: TrialRecord, baseline: TrialRecord
) -> tuple[AccuracyReport, AccuracyReport] | None:
    """Both accuracies on held-out data where both have one, else on search data."""
    held_out = (trial.held_out_accuracy, baseline.held_out_accuracy)
    for one, two in (held_out, (trial.accuracy, baseline.accuracy)):
        if one is not None and two is not None:
            return one, two
    return None


def _keeps(trial: TrialRecord, max_accuracy_drop: float | None) -> bool:
    drop = accuracy_drop_of(trial)
    return max_accuracy_drop is None or (drop is not None and drop <= max_accuracy_drop)


def comparison(
    trial: TrialRecord,
    baseline: TrialRecord,
    *,
    at: Quantile = "p50",
    shares: bool = False,
) -> str:
    """The trial against the best baseline, for people; empty where a figure is missing.

    `shares` leaves out the milliseconds: on the worst of several devices they are none.
    """
    mine, theirs = latency_of(trial), latency_of(baseline)
    if mine is None or theirs is None or _same_samples(trial, baseline) is None:
        return ""
    share = at_quantile(mine, at).ns / at_quantile(theirs, at).ns
    return (
        f"the best baseline is trial {baseline.number}: the winner takes {share:.3g} of its "
        f"latency{_where(at)} ({_compared(trial, baseline, at=at, shares=shares)})"
    )


def _where(at: Quantile) -> str:
    return "" if at == "p50" else f" at {at}"


def _compared(
    trial: TrialRecord, baseline: TrialRecord, *, at: Quantile, shares: bool = False
) -> str:
    reports = [r for r in (latency_of(trial), latency_of(baseline)) if r is not None]
    ms = [_interval_ms(report, at) for report in reports]
    points = [
        f"{100 * r.drop:.2f} [{100 * r.drop_low:.2f}, {100 * r.drop_high:.2f}]"
        for r in _same_samples(trial, baseline) or ()
    ]
    latencies = "" if shares else f"{' against '.join(ms)} ms{_where(at)}, "
    return f"{latencies}{' against '.join(points)} points lost"


def _interval_ms(report: LatencyReport, at: Quantile) -> str:
    ns, *ends = at_quantile(report, at)
    low, high = ("unknown" if end is None else f"{end / 1e6:.4g}" for end in ends)
    return f"{ns / 1e6:.4g} [{low}, {high}]"
