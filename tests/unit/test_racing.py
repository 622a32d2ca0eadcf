"""Racing: how often it is wrong, what it saves, and in which order samples come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autotune.compression import racing as racing_module
from autotune.compression.racing import (
    DRAWN_EVERY,
    LEAST_SEEN,
    Race,
    Racing,
    Shown,
    Verdict,
    label_margins,
    mean_over_all,
    student_tail,
)
from tests.benchmarks.accuracy_per_image import (
    ALIKE,
    AUXILIARIES,
    SHIFTS,
    agrees,
    by,
    raced,
    simulated,
)
from tests.unit.records import accuracy


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("known", AUXILIARIES)
def test_the_drop_on_all_samples_is_seldom_outside_the_bounds(
    kind: str, spread: float, known: str
) -> None:
    margins, candidates, auxiliary = simulated(
        300, wrong=0.1, kind=kind, spread=spread, n=200, known=known
    )
    ended = raced(Race(limit=0.02, auxiliary=by(auxiliary)), margins, candidates)
    assert ended.used.mean() < 0.5
    assert ended.is_outside.mean() <= 0.05
    is_wronged = ended.is_worse & (ended.drop <= 0.02)
    assert is_wronged.mean() <= (0.01 if known == "shrinking" else 0.0)


def test_bounds_that_trust_the_samples_seen_alone_would_be_wrong_far_more_often() -> None:
    """The reason for the forecast: without it, what was not seen would not have changed."""
    margins, candidates, _ = simulated(300, wrong=0.1, kind="laplace", spread=1.0, n=200)
    race = Race(limit=1.0)
    order = race.order(margins)[:64]
    is_right = margins[order] > 0
    seen = (is_right & (candidates[:, order] <= 0)).sum(axis=1)
    lost = ((margins > 0) & (candidates <= 0)).sum(axis=1)
    assert (lost > seen + 1.96 * np.sqrt(np.maximum(seen, 1)) / 4).mean() > 0.1


def test_hopeless_and_harmless_candidates_end_early() -> None:
    race = Race(limit=0.01)
    hopeless = raced(race, *simulated(1000, wrong=0.05, kind="normal", spread=4.0, n=20)[:2])
    assert hopeless.is_worse.all() and hopeless.used.max() <= 0.15
    harmless = raced(race, *simulated(1000, wrong=0.05, kind="normal", spread=0.01, n=20)[:2])
    assert not harmless.is_worse.any() and harmless.used.max() <= 0.05
    assert np.abs(harmless.estimate - harmless.drop).max() <= 0.001


@pytest.mark.parametrize("kind", ["normal", "shrinking", "growing"])
@pytest.mark.parametrize("known", AUXILIARIES)
def test_what_is_expected_of_samples_not_seen_is_not_off_to_one_side(kind: str, known: str) -> None:
    samples = 450
    margins, candidates, auxiliary = simulated(
        samples, wrong=0.1, kind=kind, spread=1.0, n=200, known=known
    )
    ended = raced(Race(limit=1.0, auxiliary=by(auxiliary)), margins, candidates)
    assert ended.used.max() < 1 and ended.drop.mean() * samples > 8
    # What is thought of an auxiliary that tells nothing pulls a little to its side, and those that
    # shift as it does are lucky or unlucky with the same samples.
    most = 0.3 if auxiliary is None else 0.08 * ended.drop.mean() * samples
    assert abs((ended.estimate - ended.drop).mean()) * samples < most


def test_a_candidate_that_breaks_what_was_safe_is_seen_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    margins = np.random.default_rng(0).uniform(0.1, 7, 400)
    broken = np.where(margins > 3.5, -margins, margins)
    with monkeypatch.context() as none_drawn:
        none_drawn.setattr(racing_module, "DRAWN_EVERY", 1000)
        racing = Racing(Race(limit=0.02), margins)
    hardest = racing.see(broken[racing.order[:64]][None])
    assert hardest.is_known[0], "the hardest alone do not tell"
    ended = raced(Race(limit=0.02), margins, broken[None])
    assert ended.is_worse[0] and ended.used[0] <= 0.2


def test_fp32_itself_is_known_as_soon_as_a_race_may_end() -> None:
    margins, _, _ = simulated(300, wrong=0.1, kind="normal", spread=1.0, n=1)
    racing = Racing(Race(limit=0.01), margins)
    early, standing = (racing.see(margins[None, racing.order[i : i + 16]]) for i in (0, 16))
    assert early.verdict() is None
    assert standing.verdict() is Verdict.KNOWN
    assert standing.low[0] == standing.high[0] == standing.error[0].round(9) == 0.0


def test_candidates_side_by_side_race_as_each_alone() -> None:
    margins, candidates, auxiliary = simulated(
        320, wrong=0.1, kind="laplace", spread=0.8, n=6, known=ALIKE
    )
    race = Race(limit=0.02, auxiliary=by(auxiliary))
    together = raced(race, margins, candidates)
    alone = [raced(race, margins, row[None]) for row in candidates]
    for name in ("is_worse", "used", "estimate", "is_outside"):
        parts = [getattr(one, name) for one in alone]
        assert np.allclose(getattr(together, name), np.concatenate(parts))


def test_the_hardest_come_first_and_some_are_drawn() -> None:
    margins = np.random.default_rng(1).permutation(np.arange(1, 101) * 0.1)
    order = Race(limit=0.01, seed=3).order(margins)
    assert sorted(order) == list(range(100))
    drawn = np.arange(100) % DRAWN_EVERY == DRAWN_EVERY - 1
    assert (np.diff(margins[order][~drawn]) > 0).all()
    assert margins[order][:LEAST_SEEN][drawn[:LEAST_SEEN]].mean() > 3
    assert np.array_equal(order, Race(limit=0.5, seed=3).order(margins))
    assert not np.array_equal(order, Race(limit=0.01, seed=4).order(margins))


def test_samples_that_the_auxiliary_shifts_come_early() -> None:
    rng = np.random.default_rng(2)
    margins = rng.uniform(1, 7, 200)
    is_easy = rng.permutation(200) < 40
    auxiliary = np.where(is_easy, margins - 4, margins - 0.1)
    seen = Race(limit=0.01, auxiliary=by(auxiliary)).order(margins)[:48]
    drawn = np.arange(48) % DRAWN_EVERY == DRAWN_EVERY - 1
    alone = Race(limit=0.01).order(margins)[:48]
    assert is_easy[seen[~drawn]].mean() > 2 * is_easy[alone[~drawn]].mean()


def test_an_auxiliary_tells_the_drop_more_exactly() -> None:
    """The reason for it: of as many samples."""
    margins, candidates, auxiliary = simulated(
        300, wrong=0.1, kind="normal", spread=1.0, n=300, known=ALIKE
    )
    drops, errors = raced(Race(limit=1.0), margins, candidates).drop, []
    for known in (auxiliary, None):
        racing = Racing(Race(limit=1.0, auxiliary=by(known)), margins, n_candidates=300)
        standing = racing.see(candidates[:, racing.order[:48]])
        errors.append(300 * np.square(standing.drop - drops).mean() ** 0.5)
    assert errors[0] < 0.85 * errors[1], errors


def test_one_that_shifts_nothing_changes_nothing() -> None:
    margins, candidates, _ = simulated(300, wrong=0.1, kind="normal", spread=0.6, n=20)
    with_it, without = (
        raced(Race(limit=0.02, auxiliary=by(known)), margins, candidates)
        for known in (margins, None)
    )
    assert np.array_equal(with_it.used, without.used)
    assert np.allclose(with_it.estimate, without.estimate)


def test_a_mean_divergence_is_as_many_times_the_auxiliarys_as_on_the_samples_seen() -> None:
    rng = np.random.default_rng(3)
    told = rng.lognormal(0, 1.5, 200)
    auxiliary = Shown(margins=np.ones(200), divergences=told)
    race, order = Race(limit=0.02, auxiliary=auxiliary), np.argsort(-told)
    divergences = 0.3 * told * rng.lognormal(0, 0.1, 200)
    found = race.mean_divergence(divergences[order[:32]], order)
    assert found == pytest.approx(divergences.mean(), rel=0.05)
    assert Race(limit=0.02).mean_divergence(divergences[order[:32]], order) > 1.2 * found
    nothing = Shown(margins=np.ones(200), divergences=np.zeros(200))
    without = Race(limit=0.02, auxiliary=nothing).mean_divergence(divergences[order[:32]], order)
    assert without == mean_over_all(divergences[order[:32]], 200)


def test_margins_of_other_data_are_refused() -> None:
    with pytest.raises(ValueError, match="margins of 5 samples, FP32 of 4"):
        Racing(Race(limit=0.02, auxiliary=by(np.ones(5))), np.ones(4))


def test_those_drawn_stand_for_what_was_not_seen() -> None:
    values = np.where(np.arange(2 * DRAWN_EVERY) % DRAWN_EVERY == DRAWN_EVERY - 1, 1.0, 9.0)
    hardest = len(values) - 2
    assert mean_over_all(values, len(values)) == values.mean()
    found = mean_over_all(values, hardest + 100)
    assert found == pytest.approx((hardest * 9 + 100 * 1) / (hardest + 100))
    assert mean_over_all(values[:2], 10) == 9.0


def test_margins_are_positive_exactly_where_the_label_wins() -> None:
    log_p = np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2]])
    margins = label_margins(log_p, np.array([0, 1, 0, 1]))
    assert margins.round(3).tolist() == [1.253, -0.693, 0.0, 0.0]
    assert (margins > 0).tolist() == [True, False, True, False]
    assert (label_margins(np.zeros((3, 1)), np.zeros(3, dtype=int)) > 0).all()


def test_the_tail_is_that_of_student_with_five_degrees_of_freedom() -> None:
    # Abramowitz and Stegun, table 26.10: one-sided 0.25, 0.05, 0.01, 0.0005.
    found = student_tail(np.array([0.7267, 2.0150, 3.3649, 6.8688, 1e9]))
    assert found.round(4).tolist() == [0.25, 0.05, 0.01, 0.0005, 0.0]


@pytest.mark.parametrize(("changes", "word"), [({"alpha": 1.0}, "alpha"), ({"block": 0}, "block")])
def test_a_race_that_cannot_be_run_is_refused(changes: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Race(limit=0.01, **changes)


@pytest.mark.parametrize(
    ("stopped_early", "full_drop", "expected"),
    [
        (None, 0.5, True),
        ("... the accuracy drop exceeds 1 points ...", 0.02, True),
        ("... the accuracy drop exceeds 1 points ...", 0.01, False),
        ("... 0.1 of those left are expected to change sides", 0.01, True),
        ("... 0.1 of those left are expected to change sides", 0.05, False),
    ],
)
def test_a_race_agrees_with_all_images_where_they_are_inside_its_interval(
    stopped_early: str | None, full_drop: float, expected: bool
) -> None:
    report = replace(accuracy(0.9), drop_low=0.0, drop_high=0.03, stopped_early=stopped_early)
    assert agrees(report, full_drop, 0.01) is expected
