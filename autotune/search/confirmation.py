"""Which trials are measured again before a job ends, in what order, and what counts as confirmed.

Owns the choice and the verdict on held-out data: the winner, then the front members whose
latencies cannot be told apart, then the fastest. The front is looked at anew after each of
them, so that the place of a member that left is taken by the next. Measuring again is
`evaluation.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import pairwise

from autotune.search.front import latency_of
from storage.records import JobRecord, TrialOutcome, TrialRecord, TrialState
from storage.repository import Repository

ALWAYS_CONFIRMED = 3
"""The fastest front members that are confirmed although no interval overlaps theirs."""

MOST_CONFIRMED = 6
"""Attempts beside baselines and winners: one takes up to the confirmation's time cap, 15 s, or
four times that while the device is slower than at rest."""


def next_to_confirm(
    winners: Sequence[TrialRecord], front: Sequence[TrialRecord], *, tried: Set[str]
) -> TrialRecord | None:
    """The trial to measure again next; None when enough are confirmed.

    `winners` answer the job's question now, on all its devices and on each; `front` is the front
    now, fastest first; `tried` are the ids of trials that were measured again in this run.
    """
    for winner in winners:
        if winner.confirmed_latency is None and winner.id not in tried:
            return winner
    unclear = overlapping(front)
    due = [*unclear, *front[:ALWAYS_CONFIRMED]]
    return next((t for t in due if t.confirmed_latency is None and t.id not in tried), None)


def reopen_unconfirmed(repository: Repository, job: JobRecord) -> None:
    """What an earlier run could not measure again may be confirmed in this one."""
    for trial in repository.list_trials(job.id):
        for target in job.targets:
            if trial.on(target.device_id).outcome is TrialOutcome.UNCONFIRMED:
                there = None if target.device_id == job.device_id else target.device_id
                repository.update_trial(trial.id, on=there, outcome=TrialOutcome.OK, reason=None)


def contradicted(trial: TrialRecord) -> str | None:
    """Why held-out data do not confirm the accuracy that the search saw; None where they may.

    They contradict it where the drop there is larger whatever the noise: the two intervals do
    not meet. A larger drop alone is what choosing the best of many makes of noise.
    """
    seen, there = trial.accuracy, trial.held_out_accuracy
    if seen is None or there is None or there.drop_low <= seen.drop_high:
        return None
    return (
        f"on held-out data it loses {100 * there.drop:.2f} points "
        f"({100 * there.drop_low:.2f} at least), on the search's "
        f"{100 * seen.drop:.2f} ({100 * seen.drop_high:.2f} at most)"
    )


def reopen_fp32(repository: Repository, fp32: TrialRecord | None) -> None:
    """A job that failed for want of its FP32 latency tries again when it is resumed."""
    if fp32 is not None and fp32.outcome not in (None, TrialOutcome.OK):
        repository.update_trial(
            fp32.id, state=TrialState.PROPOSED, outcome=None, reason=None, further=()
        )


def overlapping(front: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The members of a front, fastest first, whose latency interval overlaps a neighbour's."""
    found: dict[str, TrialRecord] = {}
    for faster, slower in pairwise(front):
        a, b = latency_of(faster), latency_of(slower)
        if a is not None and b is not None and a.p50_high_ns >= b.p50_low_ns:
            found |= {faster.id: faster, slower.id: slower}
    return list(found.values())
