"""The course of a search: hypervolume over trials and device time, and how long it will take."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from autotune.search.front import hypervolume
from autotune.service.progress import hypervolume_history, proposers, time_left
from autotune.spec import JobSpec, parse_job
from storage.records import JobRecord, JobState, TargetFigures, TrialOutcome, TrialRecord
from tests.unit.records import NOW, latency, trial


def course() -> list[TrialRecord]:
    """FP32, INT8, nothing gained, a failure, a gain; ten seconds apart."""
    figures = [(4.0, 0.95), (3.0, 0.94), (3.5, 0.93), (None, None), (2.0, 0.945)]
    made = [
        trial(i, ms, value, finished_at=NOW + timedelta(seconds=10 * i))
        for i, (ms, value) in enumerate(figures)
    ]
    made[3] = replace(made[3], outcome=TrialOutcome.MEASUREMENT_FAILED)
    return made


def spec(**search: Any) -> JobSpec:
    return parse_job(
        {
            "model": {"source": "onnx:m.onnx"},
            "data": {"evaluation": "npz:e.npz"},
            "search": {"trials": 15, **search},
        }
    )


def job(**changes: Any) -> JobRecord:
    facts: dict[str, Any] = {
        "id": "j-1", "name": "job", "state": JobState.RUNNING, "phase": "search", "reason": None,
        "spec": {}, "cancel_requested": False, "created_at": NOW, "started_at": NOW,
    }  # fmt: skip
    return JobRecord(**{**facts, **changes})


def test_the_history_has_a_point_wherever_the_hypervolume_grew_and_the_last() -> None:
    points = hypervolume_history([*course(), trial(9, 3.9, 0.93, finished_at=NOW.replace(hour=13))])
    assert [p.trials for p in points] == [1, 2, 5, 6]
    assert [p.device_s for p in points] == [1.0, 2.0, 4.0, 5.0], "the failure has no report"
    grown = [p.hypervolume for p in points]
    assert grown == sorted(grown) and grown[-1] == grown[-2]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_point_of_the_history_is_the_hypervolume_of_the_trials_until_then(n: int) -> None:
    trials = course()[:n]
    assert hypervolume_history(trials)[-1].hypervolume == pytest.approx(hypervolume(trials))
    assert hypervolume_history([]) == []


def test_the_order_is_that_in_which_trials_ended() -> None:
    late = replace(course()[1], finished_at=NOW + timedelta(hours=1))
    trials = [course()[0], late, course()[4]]
    assert [p.trials for p in hypervolume_history(trials)] == [1, 2, 3]
    assert hypervolume_history(trials) == hypervolume_history(trials[::-1])


def test_every_devices_time_counts() -> None:
    both = replace(course()[0], further=(TargetFigures(device_id="d", latency=latency(9.0)),))
    assert hypervolume_history([both])[0].device_s == 2.0


def test_proposers_are_counted_with_what_stands_on_the_front() -> None:
    trials = [replace(t, proposed_by="flip" if t.number > 1 else "baseline") for t in course()]
    found = proposers(trials, {"t-0", "t-4"})
    assert list(found) == ["flip", "baseline"], "the most trials first"
    assert (found["flip"].trials, found["flip"].ranked, found["flip"].on_front) == (3, 2, 1)


def left(trials: list[TrialRecord], **search: Any) -> tuple[float | None, float | None]:
    return time_left(job(), trials, spec=spec(**search), elapsed_s=40.0)


def test_time_left_is_the_pace_times_what_is_left_and_confirming() -> None:
    estimate, error = left(course())
    # Ten trials at 10 s; five confirmations of 1 s of screening, four times as long each.
    assert estimate == pytest.approx(10 * 10 + 5 * 4)
    assert error == pytest.approx(0.5 * 20), "an even pace leaves confirming alone unsure"


def test_an_uneven_pace_has_a_wider_interval() -> None:
    uneven = [
        replace(t, finished_at=NOW + timedelta(seconds=s))
        for t, s in zip(course(), (0, 2, 20, 21, 40), strict=True)
    ]
    estimate, error = left(uneven)
    assert estimate == pytest.approx(120)
    assert error is not None and error > 100


def test_nothing_is_foretold_from_two_trials_but_what_the_time_budget_says() -> None:
    assert left(course()[:2]) == (None, None)
    assert left(course()[:2], time_s=100) == (60.0, None)


def test_a_time_budget_ends_the_search_before_its_pace_does() -> None:
    estimate, _ = left(course(), time_s=70)
    assert estimate == pytest.approx(30 + 20)


def test_confirmations_under_way_tell_how_long_the_others_take() -> None:
    trials = course()
    trials[0] = replace(trials[0], confirmed_latency=latency(4.0, wall_s=6.0))
    found = time_left(job(phase="confirming"), trials, spec=spec(), elapsed_s=40.0)
    assert found.estimate_s == pytest.approx(4 * 6.0)
    assert time_left(job(state=JobState.FINISHED), trials, spec=spec(), elapsed_s=1) == (0.0, 0.0)
