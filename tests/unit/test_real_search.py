"""What the benchmark on real jobs counts, and how it lets Optuna's samplers propose."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from autotune.search.front import hypervolume
from search_spaces import Candidate
from storage.records import TrialRecord
from tests.benchmarks import real_search, rivals
from tests.benchmarks.real_search import Course
from tests.unit.records import trial
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


def test_the_figures_are_means_with_the_extremes_of_the_seeds() -> None:
    rows = [{"device_s": 10.0, "ours": 0.8, "tpe": 0.5, "nsga2": 0.4}]
    rows.append({"device_s": 12.0, "ours": 0.9, "tpe": 0.7, "nsga2": 0.4})
    found = real_search.figures(rows)
    assert set(found) == {"ours_hypervolume", "tpe_hypervolume", "nsga2_hypervolume", "device_s"}
    figure = found["ours_hypervolume"]
    assert (figure.value, figure.low, figure.high, figure.n) == (pytest.approx(0.85), 0.8, 0.9, 2)
