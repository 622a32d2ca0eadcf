"""Never worse: what was searched wins over a baseline only where it is better beyond the noise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.search.best_baseline import best_baseline, comparison, held_to_baselines, is_better
from autotune.search.feasibility import Limits
from autotune.search.front import Answer, answer
from storage.records import TrialRecord
from tests.unit.records import accuracy, latency, trial

FP32 = trial(0, 4.0, 0.950, proposed_by="baseline")
INT8 = trial(1, 2.0, 0.948, proposed_by="baseline")
WITHIN_3_MS = Limits(latency_ns=3e6)


def answered(
    *searched: TrialRecord,
    int8: TrialRecord = INT8,
    limits: Limits = WITHIN_3_MS,
    max_drop: float | None = 0.01,
) -> Answer:
    trials = [FP32, int8, *searched]
    found = answer(trials, limits=limits, max_accuracy_drop=max_drop)
    assert found is not None
    return held_to_baselines(found, trials, limits=limits, max_accuracy_drop=max_drop)


def test_what_is_certainly_faster_within_the_drop_wins() -> None:
    assert answered(trial(2, 1.0, 0.941)).winner.number == 2


def test_a_lucky_hair_of_speed_that_costs_accuracy_loses_to_the_baseline() -> None:
    lucky = trial(2, 1.99, 0.941)
    found = answered(lucky)
    assert found.winner.id == INT8.id
    assert "trial 2 was the fastest of 2 trials" in found.explanation
    assert "neither certainly faster nor certainly more accurate than this" in found.explanation
    assert "1.99 [1.97, 2.01] against 2 [1.98, 2.02] ms" in found.explanation
    assert "0.90 [-0.10, 1.90] against 0.20 [-0.80, 1.20] points" in found.explanation


def test_a_lucky_sample_of_accuracy_that_costs_speed_loses_to_the_baseline() -> None:
    lucky = trial(2, 2.9, 0.951)
    assert answered(lucky, max_drop=None).winner.id == INT8.id


def test_certainly_more_accurate_wins_however_slow_inside_the_budget() -> None:
    bad_int8 = trial(1, 2.0, 0.90, proposed_by="baseline")
    better = trial(2, 2.9, 0.945)
    trials = [FP32, bad_int8, better]
    question = {"limits": WITHIN_3_MS, "max_accuracy_drop": None}
    found = answer(trials, **question)
    assert found is not None and held_to_baselines(found, trials, **question).winner.id == "t-2"


def test_no_worse_in_both_figures_is_enough_noise_or_not() -> None:
    assert answered(trial(2, 1.99, 0.949)).winner.number == 2


def test_a_baseline_outside_the_limits_takes_nobodys_place() -> None:
    slow = trial(2, 2.95, 0.941)
    assert answered(slow, limits=Limits(latency_ns=2.99e6), max_drop=0.0095).winner.id == INT8.id
    trials = [FP32, slow]
    found = answer(trials, limits=WITHIN_3_MS, max_accuracy_drop=None)
    assert found is not None
    kept = held_to_baselines(found, trials, limits=WITHIN_3_MS, max_accuracy_drop=None)
    assert kept.winner.number == 2, "FP32 takes 4 ms"


def test_a_baseline_that_loses_more_than_allowed_takes_no_place_of_one_that_does_not() -> None:
    lossy = trial(1, 2.0, 0.92, proposed_by="baseline")
    tied = trial(2, 2.01, 0.942)
    trials = [FP32, lossy, tied]
    found = answer(trials, limits=WITHIN_3_MS, max_accuracy_drop=0.01)
    assert found is not None
    kept = held_to_baselines(found, trials, limits=WITHIN_3_MS, max_accuracy_drop=0.01)
    assert kept.winner.number == 2


def test_held_out_figures_decide_where_both_have_them() -> None:
    """On search data trial 2 is the better one, on data that nobody chose it by it is not."""
    lucky = replace(trial(2, 1.99, 0.955), held_out_accuracy=accuracy(0.942, split="held_out"))
    int8 = replace(INT8, held_out_accuracy=accuracy(0.949, split="held_out"))
    assert is_better(lucky, INT8) and not is_better(lucky, int8)


def test_a_tail_that_is_worse_loses_to_the_baseline_where_the_job_asks_about_the_tail() -> None:
    """Trial 2's median is certainly faster, its slowest tenth is not."""
    tail = {"p90_low_ns": 2.3e6, "p90_ns": 2.4e6, "p90_high_ns": 2.5e6}
    spiky = trial(2, 1.5, 0.945, latency=latency(1.5, **tail))
    even = {"p90_low_ns": 2.0e6, "p90_ns": 2.1e6, "p90_high_ns": 2.2e6}
    int8 = replace(INT8, latency=latency(2.0, **even))
    at_p90 = Limits(latency_ns=3e6, at="p90")
    assert answered(spiky, int8=int8).winner.number == 2
    assert answered(spiky, int8=int8, limits=at_p90).winner.id == INT8.id
    assert is_better(spiky, int8) and not is_better(spiky, int8, at="p90")


def test_a_tail_counts_with_its_interval_and_one_without_ends_is_never_certain() -> None:
    """Trial 2 loses more, so that only certainty lets it win."""
    faster = trial(2, 1.0, 0.941, latency=latency(1.0, p90_high_ns=1.2e6))
    known, unknown = latency(2.0, p90_low_ns=1.9e6, p90_high_ns=2.2e6), latency(2.0)
    assert is_better(faster, replace(INT8, latency=known), at="p90")
    assert not is_better(faster, replace(INT8, latency=unknown), at="p90")
    near = latency(2.0, p90_low_ns=1.1e6, p90_high_ns=2.2e6)
    assert not is_better(faster, replace(INT8, latency=near), at="p90")


def test_the_best_baseline_is_the_fastest_at_the_quantile_that_was_asked_for() -> None:
    even = replace(FP32, accuracy=accuracy(0.948), latency=latency(2.1, p90_ns=2.2e6))
    spiky = replace(INT8, latency=latency(2.0, p90_ns=2.9e6))
    at_p50, at_p90 = (
        best_baseline([even, spiky], limits=Limits(at=at), max_accuracy_drop=None)
        for at in ("p50", "p90")
    )
    assert at_p50 is not None and at_p90 is not None
    assert (at_p50.number, at_p90.number) == (1, 0)
    text = comparison(trial(2, 1.0, 0.941), even, at="p90")
    assert "0.477 of its latency at p90 (1.05 [unknown, unknown] against 2.2" in text


def test_an_impossible_budget_is_still_answered_by_the_nearest() -> None:
    assert answered(trial(2, 1.99, 0.941), limits=Limits(latency_ns=1.0)).winner.number == 2


@pytest.mark.parametrize(("max_drop", "number"), [(None, 1), (0.01, 1), (0.001, 1)])
def test_the_best_baseline_answers_the_same_question(max_drop: float | None, number: int) -> None:
    found = best_baseline([FP32, INT8], limits=WITHIN_3_MS, max_accuracy_drop=max_drop)
    assert found is not None and found.number == number
    anything = best_baseline([FP32, INT8], limits=Limits(), max_accuracy_drop=0.0)
    assert anything is not None and anything.number == 0
    assert best_baseline([trial(2, 1.0, 0.9)], limits=Limits(), max_accuracy_drop=None) is None


def test_a_winner_is_set_beside_the_best_baseline_with_both_intervals() -> None:
    text = comparison(trial(2, 1.0, 0.941), INT8)
    assert text.startswith("the best baseline is trial 1: the winner takes 0.5 of its latency")
    assert "1 [0.99, 1.01] against 2 [1.98, 2.02] ms, 0.90 [-0.10, 1.90] against 0.20" in text
