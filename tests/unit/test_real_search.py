"""What the benchmark on real jobs counts, and how it lets Optuna's samplers propose."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest

from autotune.search.front import hypervolume
from search_spaces import Candidate
from storage.records import MeasurementRecord, MeasurementState, TrialRecord
from tests import running_service
from tests.benchmarks import real_search, rivals
from tests.benchmarks.real_search import Course
from tests.unit.records import NOW, latency, trial
from tests.unit.spaces import inventory, space

BASE = {"stem": 0.5, "body": 0.5}


def measured(candidates: Sequence[Candidate]) -> list[TrialRecord]:
    """Each candidate quantized further is faster and less accurate."""
    n_int8 = [len(c.precisions) for c in candidates]
    return [
        trial(i, 4.0 - 0.5 * n, 0.95 - 0.002 * n, candidate=c)
        for i, (c, n) in enumerate(zip(candidates, n_int8, strict=True))
    ]


def rival(method: str, seed: int = 0) -> rivals.Rival:
    return rivals.Rival(
        space=space(),
        inventory=inventory(),
        bases=[BASE],
        damage={},
        seed=seed,
        sampler=rivals.SAMPLERS[method],
    )


@pytest.mark.parametrize("method", list(rivals.SAMPLERS))
def test_a_rival_proposes_new_points_of_the_space_from_what_was_measured(method: str) -> None:
    made = rival(method)
    trials = measured([space().fp32(), space().uniform_int8()])
    for _ in range(5):
        asked = [p.candidate for p in made.refine(trials, size=4)]
        for candidate in asked:
            space().require(candidate)
        assert not {c.digest for c in asked} & {t.candidate.digest for t in trials}
        trials = measured([*(t.candidate for t in trials), *asked])
    assert len({t.candidate.digest for t in trials}) == 22


def test_a_rival_is_told_the_baselines_and_every_trial_that_ranks() -> None:
    made = rival("tpe")
    trials = measured([space().fp32(), space().uniform_int8()])
    asked = [p.candidate for p in made.refine(trials, size=2)]
    made.refine(measured([*(t.candidate for t in trials), *asked]), size=1)
    (conversation,) = made.conversations
    complete = [t for t in conversation.study.trials if t.values is not None]
    told = {tuple(t.params.values()): t.values for t in complete}
    assert len(told) == 4
    assert [list(v) for v in conversation.told.values()] == list(told.values())


def test_a_course_counts_what_fits_into_the_device_seconds() -> None:
    trials = measured([space().fp32(), space().uniform_int8()])
    course = Course(trials=trials, device_s=[2.0, 1.5])
    assert course.spent_s == [2.0, 3.5]
    assert course.attained(1.0) == 0.0
    assert course.attained(2.0) == hypervolume(trials[:1])
    assert course.attained(3.5) == hypervolume(trials) > course.attained(3.0)


def screening(
    trial_id: str, queued_s: float, ended_s: float, wall_s: float | None, *, attempts: int = 1
) -> MeasurementRecord:
    """One that ended; without a report where it has no `wall_s`."""
    return MeasurementRecord(
        id=f"m-{trial_id}-{ended_s}",
        job_id="j-1",
        trial_id=trial_id,
        device_id="d-1",
        request=running_service.request(),
        state=MeasurementState.DONE,
        fencing_token=attempts,
        attempts=attempts,
        report=None if wall_s is None else latency(4.0, wall_s=wall_s),
        created_at=NOW + timedelta(seconds=queued_s),
        finished_at=NOW + timedelta(seconds=ended_s),
    )


def test_a_repeated_trial_is_placed_at_its_last_screening_and_its_seconds_where_they_were() -> None:
    trials = measured([space().fp32(), space().uniform_int8()])
    course = real_search.course_of(
        trials,
        [screening("t-0", 0, 3, 2.0), screening("t-1", 3, 6, 2.5), screening("t-0", 3, 9, 1.0)],
    )
    assert [t.id for t in course.trials] == ["t-1", "t-0"]
    assert course.device_s == [4.5, 1.0]


def test_a_screening_without_a_report_costs_the_seconds_that_it_held_the_device() -> None:
    trials = measured([space().fp32(), space().uniform_int8()])
    failed = [screening("t-1", 1, 13, None), screening("t-1", 13, 20, None, attempts=0)]
    course = real_search.course_of(trials, [screening("t-0", 0, 3, 2.0), *failed])
    assert course.device_s == [2.0, 13 - 3]


def test_the_figures_are_means_with_the_extremes_of_the_seeds() -> None:
    rows = [{"device_s": 10.0, "ours": 0.8, "tpe": 0.5, "nsga2": 0.4}]
    rows.append({"device_s": 12.0, "ours": 0.9, "tpe": 0.7, "nsga2": 0.4})
    found = real_search.figures(rows)
    assert set(found) == {"ours_hypervolume", "tpe_hypervolume", "nsga2_hypervolume", "device_s"}
    figure = found["ours_hypervolume"]
    assert (figure.value, figure.low, figure.high, figure.n) == (pytest.approx(0.85), 0.8, 0.9, 2)
