"""The front of jobs that name size as an objective, against its definition."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from autotune.search.front import further_objectives, non_dominated
from storage.records import TrialRecord
from tests.unit.records import latency, trial

points = st.lists(
    st.tuples(
        st.sampled_from([1.0, 2.0, 3.0]),
        st.sampled_from([0.80, 0.90, 0.95]),
        st.sampled_from([None, 10, 20, 40]),
    ),
    max_size=20,
)


def figures_of(one: TrialRecord) -> tuple[float, float, float]:
    """Smaller is better in all three."""
    assert one.latency
    assert one.accuracy
    size = math.inf if one.artifact_size_bytes is None else one.artifact_size_bytes
    return one.latency.p50_ns, -one.accuracy.value, size


def dominates(a: TrialRecord, b: TrialRecord) -> bool:
    left, right = figures_of(a), figures_of(b)
    return left != right and all(x <= y for x, y in zip(left, right, strict=True))


@given(points)
def test_nothing_on_the_front_is_beaten_in_all_three(
    figures: list[tuple[float, float, int | None]],
) -> None:
    trials = [
        trial(n, ms, value, artifact_size_bytes=size) for n, (ms, value, size) in enumerate(figures)
    ]
    naive = {figures_of(t) for t in trials if not any(dominates(other, t) for other in trials)}
    front = non_dominated(trials, beside=("size",))
    assert {figures_of(t) for t in front} == naive
    assert len(front) == len(naive), "of equal ones the first stays"


figures = st.one_of(st.none(), st.just(math.nan), st.sampled_from([1.0, 2.0, 3.0]))
everything = st.lists(
    st.tuples(
        st.sampled_from([1.0, 2.0, math.nan]),
        st.sampled_from([0.80, 0.90, math.nan]),
        figures,
        figures,
    ),
    max_size=12,
)


@given(everything, st.integers(0, 1000))
def test_neither_order_nor_what_is_missing_changes_a_front_in_four_objectives(
    points: list[tuple[float, float, float | None, float | None]], seed: int
) -> None:
    made = [
        trial(
            n,
            ms,
            value,
            latency=latency(ms, peak_memory_bytes=None, energy_joules=joules),
            artifact_size_bytes=None if size is None or math.isnan(size) else int(size),
        )
        for n, (ms, value, size, joules) in enumerate(points)
    ]
    front = non_dominated(made, beside=("size", "memory", "energy"))
    shuffled = random.Random(seed).sample(made, len(made))
    assert non_dominated(shuffled, beside=("size", "memory", "energy")) == front
    assert all(math.isfinite(points[t.number][0] + points[t.number][1]) for t in front)
    assert bool(front) == any(math.isfinite(ms + value) for ms, value, *_ in points)


def test_a_small_file_that_is_slower_stays_only_where_size_counts() -> None:
    fast = trial(0, 1.0, 0.95, artifact_size_bytes=40)
    small = trial(1, 2.0, 0.94, artifact_size_bytes=10)
    assert non_dominated([fast, small]) == [fast]
    assert non_dominated([fast, small], beside=("size",)) == [fast, small]


def test_size_counts_where_the_job_says_so() -> None:
    named = ["energy", "accuracy", "latency", "size"]
    assert further_objectives({"search": {"objectives": named}}) == ("size", "energy")
    assert further_objectives({"search": {"objectives": ["accuracy", "latency"]}}) == ()
    assert further_objectives({"search": {}}) == further_objectives({}) == ()
