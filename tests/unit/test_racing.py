"""Racing: how often it is wrong, what it saves, and what a stopped report says."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.compression.racing import (
    Race,
    Racing,
    Verdict,
    interval_at_any_time,
)
from tests.benchmarks.accuracy_per_image import agrees, candidates_with, raced


@pytest.mark.parametrize("won", [0, 4, 20])
@pytest.mark.parametrize("limit", [0.01, 0.05])
def test_candidates_at_the_limit_are_seldom_called_worse(limit: float, won: int) -> None:
    at_limit = candidates_with(400, lost=round(400 * limit) + won, won=won, n=2000)
    worse, _, _ = raced(Race(limit=limit), at_limit)
    assert worse.mean() <= 0.05


@pytest.mark.parametrize("won", [0, 4, 20])
@pytest.mark.parametrize("limit", [0.01, 0.05])
def test_candidates_just_over_the_limit_are_seldom_called_within(limit: float, won: int) -> None:
    over = candidates_with(400, lost=round(400 * limit) + won + 1, won=won, n=2000)
    _, within, _ = raced(Race(limit=limit), over)
    assert within.mean() <= 0.05


def test_looking_with_an_ordinary_interval_would_be_wrong_far_more_often() -> None:
    """The reason for the correction: the same looks with a test made for one look."""
    differences = candidates_with(400, lost=40, won=20, n=2000)
    looks = range(32, 400, 32)
    ends = np.zeros(2000, bool)
    for n in looks:
        seen = differences[:, :n]
        error = seen.std(axis=1) / np.sqrt(n) * np.sqrt(1 - n / 400)
        ends |= seen.mean(axis=1) - 1.645 * error > 0.05
    assert ends.mean() > 0.1


def test_hopeless_and_harmless_candidates_end_early() -> None:
    worse, _, used = raced(Race(limit=0.01), candidates_with(1000, lost=300, won=0, n=50))
    assert worse.all() and used.max() <= 0.1
    _, within, used = raced(Race(limit=0.03), candidates_with(1000, lost=0, won=0, n=50))
    assert within.all() and used.max() <= 0.3


def test_a_race_without_a_limit_to_keep_ends_only_for_the_worse() -> None:
    race = Race(limit=0.03, ends_within=False)
    worse, within, _ = raced(race, candidates_with(1000, lost=0, won=0, n=10))
    assert not worse.any() and not within.any()


def test_what_the_rest_can_no_longer_undo_is_certain() -> None:
    racing = Racing(Race(limit=0.1, alpha=1e-9), 20)
    assert racing.verdict(np.zeros(8)) is None
    assert racing.verdict(np.ones(11)) is Verdict.WORSE  # 11 of 20 lost, one sample is left


def test_candidates_side_by_side_race_as_each_alone() -> None:
    rows = candidates_with(320, lost=20, won=5, n=6, seed=3)
    together = raced(Race(limit=0.02), rows)
    alone = [raced(Race(limit=0.02), row[None]) for row in rows]
    for part, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(part, np.concatenate(parts))


def test_the_wealth_is_the_product_of_the_bets_written_out() -> None:
    values, limit, total = [0, 1, 1, -1, 1, 0, 1, 1], 0.1, 40
    wealth, lost = np.ones(5), 0
    for i, value in enumerate(values):
        expected = (total * limit - lost) / (total - i)
        stake = np.array([0.1, 0.25, 0.5, 0.8, 0.95]) / (1 + expected)
        wealth *= 1 + stake * (value - expected)
        lost += value
    just = Racing(Race(limit=limit, alpha=1 / (wealth.mean() * 0.999)), total)
    missed = Racing(Race(limit=limit, alpha=1 / (wealth.mean() * 1.001)), total)
    assert just.verdict(np.array(values)) is Verdict.WORSE
    assert missed.verdict(np.array(values)) is None


def test_the_interval_covers_the_mean_wherever_the_worst_moment_to_stop_is() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(40):
        values = rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.8, 0.15], size=200)
        bounds = [interval_at_any_time(values[:n]) for n in range(40, 201, 40)]
        missed += any(not low <= 0.1 <= high for low, high in bounds)
    assert missed <= 4


def test_the_interval_narrows_and_is_everything_without_samples() -> None:
    assert interval_at_any_time(np.zeros(0)) == (-1.0, 1.0)
    few, many = (interval_at_any_time(np.tile([0, 0, 0, 1], n)) for n in (20, 200))
    assert few[0] < many[0] < 0.25 < many[1] < few[1]


def test_the_order_is_random_and_the_same_everywhere() -> None:
    order = Race(limit=0.01, seed=3).order(100)
    assert sorted(order) == list(range(100))
    assert not np.array_equal(order, np.arange(100))
    assert np.array_equal(order, Race(limit=0.5, seed=3).order(100))


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
        ("... the accuracy drop stays within 1 points ...", 0.01, True),
        ("... the accuracy drop stays within 1 points ...", 0.02, False),
    ],
)
def test_a_race_agrees_with_all_images_where_they_lie_on_the_same_side(
    stopped_early: str | None, full_drop: float, expected: bool
) -> None:
    assert agrees(stopped_early, full_drop, 0.01) is expected
