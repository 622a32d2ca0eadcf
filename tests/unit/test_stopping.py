"""When a search ends: trials, time, and what is left to gain."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from autotune.search.front import (
    REFERENCE_DROP,
    REFERENCE_RATIO,
    hypervolume,
    reference_drop,
)
from autotune.search.planner import Proposal
from autotune.search.stopping import Stopping, gain_per_minute
from autotune.spec import SearchSpec
from search_spaces import Candidate
from storage.records import TrialRecord, TrialState
from tests.unit.records import latency, trial
from tests.unit.spaces import space


def stopping(*, seconds_ago: float = 0.0, **search: object) -> Stopping:
    started = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    return Stopping(SearchSpec.model_validate(search), started)


def measured() -> list[TrialRecord]:
    """FP32 and uniform INT8, each measured in six seconds."""
    made = [
        trial(0, 4.0, 0.95, candidate=space().fp32()),
        trial(1, 2.0, 0.94, candidate=space().uniform_int8()),
    ]
    reports = [latency(4.0, wall_s=6.0), latency(2.0, wall_s=6.0)]
    return [replace(t, latency=report) for t, report in zip(made, reports, strict=True)]


def promising(share: float) -> Proposal:
    """A candidate that is expected to add that share of what the trials have."""
    gain = share * hypervolume(measured()) * REFERENCE_RATIO * REFERENCE_DROP
    return Proposal(candidate=Candidate(), proposed_by="flip", gain=gain)


def test_finished_trials_alone_count_toward_the_budget() -> None:
    budget = stopping(trials=3)
    under_way = replace(trial(2, 3.0, 0.9), state=TrialState.RUNNING)
    assert budget.trials_left([*measured(), under_way]) == 1
    assert budget.is_spent([*measured(), under_way]) is None
    assert budget.is_spent([*measured(), trial(2, 3.0, 0.9)]) == "all 3 trials are done"


def test_the_time_counts_from_the_start_and_without_a_limit_never_ends() -> None:
    assert (
        stopping(time_s=60, seconds_ago=61).is_spent([]) == "the 60 s of the time budget are spent"
    )
    assert stopping(time_s=60, seconds_ago=30).time_spent == pytest.approx(0.5, abs=0.01)
    assert stopping(seconds_ago=1e6).is_spent([]) is None


def test_a_job_that_may_lose_more_gains_from_what_lies_beyond_three_points() -> None:
    # Three times as fast at 8 points lost: worthless up to 3 points, not up to 15.
    lossy = trial(2, 1.0, 0.87, candidate=space().uniform_int8())
    trials = [*measured(), lossy]
    assert reference_drop(0.1) == pytest.approx(0.15)
    assert hypervolume(trials) == hypervolume(measured())
    wide = [hypervolume(own, largest_drop=reference_drop(0.1)) for own in (trials, measured())]
    assert wide[0] > 1.05 * wide[1]
    gains = [gain_per_minute([promising(0.01)], measured(), largest_drop=d) for d in (0.03, 0.15)]
    assert gains[1] < gains[0]  # the same gain is a smaller share of the larger box


def test_a_gain_is_a_share_of_the_hypervolume_per_minute_of_the_device() -> None:
    # Two trials of six seconds that promise 1 % each: 2 % in a fifth of a minute.
    batch = [promising(0.01), promising(0.01)]
    assert gain_per_minute(batch, measured()) == pytest.approx(0.1)


def test_the_search_ends_when_the_batch_promises_less_than_asked_for() -> None:
    batch = [promising(0.001)]
    assert stopping(least_gain_per_minute=0.009).is_idle(batch, measured()) is None
    why = stopping(least_gain_per_minute=0.02).is_idle(batch, measured())
    assert why is not None and "promise 1.00% more hypervolume per minute" in why
    assert stopping().is_idle(batch, measured()) is None


def test_what_nothing_is_predicted_of_is_worth_measuring() -> None:
    unknown = [Proposal(candidate=Candidate(), proposed_by="optuna")]
    assert gain_per_minute(unknown, measured()) is None
    assert gain_per_minute([promising(0.1)], []) is None
    assert stopping(least_gain_per_minute=1e9).is_idle(unknown, measured()) is None
