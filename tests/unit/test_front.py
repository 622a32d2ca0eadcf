"""The front against its definition, and the answer against what a user asked."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.search.feasibility import Limits
from autotune.search.front import (
    REFERENCE_DROP,
    REFERENCE_RATIO,
    answer,
    hypervolume,
    is_feasible,
    latency_of,
    non_dominated,
    select,
)
from storage.records import TrialOutcome, TrialRecord
from tests.unit.records import accuracy, latency, trial

points = st.lists(
    st.tuples(st.floats(0.1, 8.0), st.sampled_from([0.80, 0.90, 0.93, 0.94, 0.95])), max_size=25
)


def _dominates(a: TrialRecord, b: TrialRecord) -> bool:
    assert a.latency and b.latency and a.accuracy and b.accuracy
    no_worse = a.latency.p50_ns <= b.latency.p50_ns and a.accuracy.value >= b.accuracy.value
    better = a.latency.p50_ns < b.latency.p50_ns or a.accuracy.value > b.accuracy.value
    return no_worse and better


@given(points)
def test_the_front_holds_exactly_the_trials_that_nothing_dominates(
    figures: list[tuple[float, float]],
) -> None:
    trials = [trial(n, ms, value) for n, (ms, value) in enumerate(figures)]
    front = non_dominated(trials)
    naive = {
        (t.latency.p50_ns, t.accuracy.value)
        for t in trials
        if t.latency and t.accuracy and not any(_dominates(other, t) for other in trials)
    }
    assert {
        (t.latency.p50_ns, t.accuracy.value) for t in front if t.latency and t.accuracy
    } == naive


@given(points, st.integers(0, 1000))
def test_the_order_of_arrival_does_not_matter(
    figures: list[tuple[float, float]], seed: int
) -> None:
    trials = [trial(n, ms, value) for n, (ms, value) in enumerate(figures)]
    shuffled = random.Random(seed).sample(trials, len(trials))
    assert non_dominated(shuffled) == non_dominated(trials)


@pytest.mark.parametrize(
    "broken",
    [
        trial(9, None, 0.99),
        trial(9, 0.1, None),
        trial(9, 0.1, math.nan),
        trial(9, 0.1, 0.99, outcome=TrialOutcome.MEASUREMENT_FAILED),
        trial(9, 0.1, 0.99, latency=latency(0.1, is_steady=False, unsteady_reason="drift")),
        trial(9, 0.1, 0.99, latency=latency(math.nan)),
    ],
)
def test_a_trial_with_missing_or_unsteady_figures_never_ranks(broken: TrialRecord) -> None:
    good = trial(0, 2.0, 0.9)
    assert non_dominated([broken, good]) == [good]


@given(points)
def test_the_hypervolume_equals_a_grid_count(figures: list[tuple[float, float]]) -> None:
    trials = [trial(n, ms, value) for n, (ms, value) in enumerate(figures)]
    n = 60
    covered = sum(
        any(
            t.latency.ratio <= (x + 0.5) / n * REFERENCE_RATIO
            and max(t.accuracy.drop, 0.0) <= (y + 0.5) / n * REFERENCE_DROP
            for t in trials
            if t.latency and t.accuracy
        )
        for x, y in itertools.product(range(n), repeat=2)
    )
    assert hypervolume(trials) == pytest.approx(covered / n**2, abs=2.5 / n)


def test_an_empty_set_has_no_front_no_volume_and_no_answer() -> None:
    assert non_dominated([]) == []
    assert hypervolume([]) == 0.0
    assert answer([], limits=Limits(latency_ns=1e6), max_accuracy_drop=None) is None


def test_feasible_asks_the_upper_bound_of_the_interval() -> None:
    wide = trial(0, 0.99, 0.9, half_width=0.05)
    assert not is_feasible(wide, Limits(latency_ns=1e6))
    assert is_feasible(trial(0, 0.94, 0.9, half_width=0.05), Limits(latency_ns=1e6))


def test_a_confirmed_latency_replaces_the_screened_one() -> None:
    lucky = trial(0, 0.9, 0.9, confirmed_latency=latency(1.1))
    assert latency_of(lucky) == lucky.confirmed_latency
    assert not is_feasible(lucky, Limits(latency_ns=1e6))


def test_with_a_drop_the_fastest_trial_inside_both_wins() -> None:
    trials = [trial(0, 4.0, 0.95), trial(1, 1.0, 0.945), trial(2, 0.5, 0.90)]
    found = answer(trials, limits=Limits(latency_ns=2e6), max_accuracy_drop=0.01)
    assert found is not None
    assert (found.winner.number, found.verdict) == (1, "within_budget")


def test_without_a_drop_the_most_accurate_trial_inside_wins() -> None:
    trials = [trial(0, 4.0, 0.95), trial(1, 1.9, 0.94), trial(2, 1.0, 0.93)]
    found = answer(trials, limits=Limits(latency_ns=2e6), max_accuracy_drop=None)
    assert found is not None
    assert found.winner.number == 1


def test_an_impossible_budget_is_answered_with_the_fastest_and_the_distance() -> None:
    trials = [trial(0, 4.0, 0.95), trial(1, 1.0, 0.945)]
    found = answer(trials, limits=Limits(latency_ns=0.5e6), max_accuracy_drop=0.01)
    assert found is not None
    assert (found.winner.number, found.verdict) == (1, "impossible_budget")
    assert found.missed_by_ns == pytest.approx(1.01e6 - 0.5e6)


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        (0.01, "the fastest one that loses at most 1 point misses it"),
        (0.0, "the fastest one (none loses at most 0 points) misses it"),
        (None, "the fastest one misses it"),
    ],
)
def test_an_impossible_budget_says_which_drop_was_kept(drop: float | None, words: str) -> None:
    trials = [trial(0, 4.0, 0.945), trial(1, 1.0, 0.945)]
    found = answer(trials, limits=Limits(latency_ns=0.5e6), max_accuracy_drop=drop)
    assert found is not None
    assert words in found.explanation


def test_a_drop_that_nothing_keeps_is_said() -> None:
    found = answer([trial(0, 1.0, 0.80)], limits=Limits(latency_ns=2e6), max_accuracy_drop=0.01)
    assert found is not None
    assert found.misses_drop


def test_luck_on_the_search_data_does_not_survive_the_held_out_data() -> None:
    lucky = trial(0, 0.5, 0.95, held_out_accuracy=accuracy(0.90, split="held_out"))
    solid = trial(1, 1.0, 0.945)
    found = answer([lucky, solid], limits=Limits(latency_ns=2e6), max_accuracy_drop=0.01)
    assert found is not None
    assert found.winner is solid


def test_without_a_drop_luck_on_the_search_data_does_not_win_either() -> None:
    lucky = trial(0, 2.9, 0.96, held_out_accuracy=accuracy(0.94, split="held_out"))
    solid = trial(1, 1.6, 0.955, held_out_accuracy=accuracy(0.955, split="held_out"))
    found = answer([lucky, solid], limits=Limits(latency_ns=3e6), max_accuracy_drop=None)
    assert found is not None
    assert found.winner is solid


def test_the_knee_is_the_bend_of_the_front() -> None:
    front = [trial(0, 1.0, 0.80), trial(1, 1.2, 0.94), trial(2, 4.0, 0.95)]
    knee = select(front, "knee")
    assert knee is not None
    assert knee.number == 1
    with pytest.raises(ValueError, match="knee, fastest or most-accurate"):
        select(front, "best")
