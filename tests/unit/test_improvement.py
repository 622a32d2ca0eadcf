"""The next point: exact expectations, optima that hold, nothing asked twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autotune.search import improvement, minima
from autotune.search.features import Factor, Features
from autotune.search.improvement import (
    TEACHING_RUNS,
    Flips,
    Landscape,
    expected_improvement,
    front_of,
    hypervolume,
    most_promising,
    weighted_optima,
)
from autotune.search.surrogate import Energy, Surrogate

REFERENCE = (1.0, 1.0)


def test_the_expectation_is_what_sampling_gives() -> None:
    rng = np.random.default_rng(0)
    front = np.array([[0.2, 0.8], [0.5, 0.4], [0.9, 0.1]])
    mean, deviation = np.array([[0.4, 0.3]]), np.array([[0.2, 0.25]])
    draws = rng.normal(mean, deviation, (40_000, 2))
    before = hypervolume(front, REFERENCE)
    gains = [hypervolume(np.vstack([front, row]), REFERENCE) - before for row in draws[:4000]]
    exact = expected_improvement(mean, deviation, front, REFERENCE)
    assert exact[0] == pytest.approx(np.mean(gains), abs=4 * np.std(gains) / 4000**0.5)


def test_without_a_front_the_whole_box_is_to_be_gained() -> None:
    gain = expected_improvement(
        np.array([[0.25, 0.5]]), np.full((1, 2), 1e-9), np.empty((0, 2)), REFERENCE
    )
    assert gain == pytest.approx([0.75 * 0.5])


def test_a_dominated_certainty_gains_nothing() -> None:
    gain = expected_improvement(
        np.array([[0.6, 0.6]]), np.full((1, 2), 1e-9), np.array([[0.5, 0.5]]), REFERENCE
    )
    assert gain == pytest.approx([0.0], abs=1e-8)


def test_the_hypervolume_is_the_area_counted_cell_by_cell() -> None:
    figures = np.random.default_rng(1).integers(0, 12, (7, 2)) / 10
    cells = np.array(list(itertools.product(np.arange(10), repeat=2))) / 10 + 0.05
    covered = (figures[None] <= cells[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(figures, REFERENCE) == pytest.approx(covered)


def test_the_front_ignores_order_and_copies() -> None:
    rows = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [3.0, 3.0]])
    assert front_of(rows).tolist() == front_of(rows[::-1]).tolist() == [[1.0, 2.0], [2.0, 1.0]]


def chain(rng: np.random.Generator) -> Energy:
    return Energy(
        0.0,
        [rng.normal(size=3) for _ in range(5)],
        {(i, i + 1): 0.3 * rng.normal(size=(3, 3)) for i in range(4)},
    )


def sum_of(first: Energy, second: Energy, points: np.ndarray, weight: float) -> np.ndarray:
    found: np.ndarray = first.at(points) + weight * second.at(points)
    return found


def test_the_optima_are_the_best_of_all_points() -> None:
    rng = np.random.default_rng(0)
    everything = np.array(list(itertools.product(range(3), repeat=5)))
    weights = np.array([0.1, 1.0, 10.0])
    for _ in range(20):
        first, second = chain(rng), chain(rng)
        found = weighted_optima(first, second, np.zeros((1, 5), dtype=int), weights)
        for point, weight in zip(found, weights, strict=True):
            best = sum_of(first, second, everything, weight).min()
            assert sum_of(first, second, point[None], weight) == pytest.approx([best], abs=1e-9)


def test_factors_that_too_many_others_are_tied_to_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(minima, "LARGEST_TABLE", 3)  # not even one link
    unkept = minima.elimination_order.__wrapped__
    monkeypatch.setattr(improvement, "elimination_order", unkept)
    rng = np.random.default_rng(0)
    first, second = chain(rng), chain(rng)
    start = np.array([[1, 1, 1, 1, 1]])
    (found,) = weighted_optima(first, second, start, np.ones(1))
    held = found == 1
    assert held[[1, 3]].all()
    for column in (0, 2, 4):  # each is the best there is between those
        others = np.repeat(found[None], 3, axis=0)
        others[:, column] = np.arange(3)
        assert found[column] == np.argmin(sum_of(first, second, others, 1.0))


def test_neighbours_come_with_the_means_of_the_tables() -> None:
    rng = np.random.default_rng(3)
    first, second = chain(rng), chain(rng)
    flips = Flips(first, second, np.array([[0, 1, 2, 0, 1], [2, 2, 2, 2, 2]]))
    points = flips.points(np.arange(len(flips.means)))
    assert len(np.unique(points, axis=0)) == len(points) == 2 * 5 * 2
    expected = np.column_stack([first.at(points), second.at(points)])
    assert flips.means == pytest.approx(expected)


def landscape(repeats: int = 1) -> tuple[Landscape, np.ndarray]:
    """Ten factors: option 1 is faster by 0.05 and loses a little more from factor to factor."""
    cost = np.linspace(0.0, 0.2, 10)
    points = np.vstack(
        [np.zeros((1, 10), int), np.eye(10, dtype=int), np.eye(1, 10, 1) + np.eye(1, 10)]
    )
    points = np.tile(
        points.astype(int), (repeats, 1)
    )  # an even number: the next one is for the front
    models = []
    for base, effects in ((0.9, np.full(10, -0.05)), (0.0, cost)):
        factors = [Factor(n_options=2, effects=np.array([0.0, e]), scale=0.01) for e in effects]
        values = base + points @ effects
        noise = np.full(len(points), 1e-3)
        models.append(Surrogate(Features(factors, []), points, values, noise, base=base))
    return Landscape(*models), points


def test_the_most_promising_points_take_what_is_cheap_first() -> None:
    known, points = landscape()
    (first,) = most_promising(known, points, reference=REFERENCE, n=1, rng=np.random.default_rng(0))
    assert first.point[:4].all()
    assert not first.point[-1]


def test_random_points_are_weighed_however_many_neighbours_there_are() -> None:
    """60 factors of 8 options: 420 neighbours, which are less uncertain than distant points."""
    factors = [Factor(n_options=8, effects=np.zeros(8), scale=0.01)] * 60
    points = np.zeros((2, 60), dtype=int)
    at_half = np.full(2, 0.5), np.full(2, 1e-3)
    model = Surrogate(Features(factors, []), points, *at_half, base=0.5)
    (first,) = most_promising(
        Landscape(model, model), points, reference=REFERENCE, n=1, rng=np.random.default_rng(0)
    )
    assert first.origin == "random"


def test_no_point_is_proposed_twice_or_again() -> None:
    known, points = landscape()
    excluded = [np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 0])]
    found = most_promising(
        known, points, reference=REFERENCE, n=8, rng=np.random.default_rng(0), excluded=excluded
    )
    asked = [tuple(p.point) for p in found]
    assert len(set(asked)) == len(asked) == 8
    assert not set(asked) & {tuple(p) for p in (*points, *excluded)}


def test_what_the_models_know_beyond_the_points_is_on_no_front() -> None:
    known, points = landscape()
    (of_all,), (of_one,) = (
        most_promising(known, own, reference=REFERENCE, n=1, rng=np.random.default_rng(0))
        for own in (points, points[:2])
    )
    assert of_one.gain is not None and of_all.gain is not None
    assert of_one.gain > 1.1 * of_all.gain


def test_every_second_point_teaches_the_latency_model_while_that_is_unsure() -> None:
    known, points = landscape()
    rng = np.random.default_rng(0)
    found = most_promising(known, points, reference=REFERENCE, n=4, rng=rng)
    assert [promise.gain is None for promise in found] == [False, True, False, True]


def test_a_model_that_is_as_sure_as_a_measurement_is_taught_no_further() -> None:
    factors = [Factor(n_options=2, effects=np.array([0.0, -0.05]), scale=1e-4)] * 6
    points = np.random.default_rng(1).integers(0, 2, (TEACHING_RUNS - 3, 6))
    values = 0.9 - 0.05 * points.sum(axis=1)
    noise = np.full(len(points), 0.05)
    model = Surrogate(Features(factors, []), points, values, noise, base=0.9)
    known = Landscape(model, model)
    rng = np.random.default_rng(0)
    found = most_promising(known, points, reference=REFERENCE, n=3, rng=rng)
    assert all(promise.gain is not None for promise in found)


def test_a_long_search_is_for_the_front_alone() -> None:
    known, points = landscape(3)
    assert len(points) >= TEACHING_RUNS
    rng = np.random.default_rng(0)
    found = most_promising(known, points, reference=REFERENCE, n=2, rng=rng)
    assert all(promise.gain is not None for promise in found)


def test_an_exhausted_space_gives_nothing() -> None:
    factors = [Factor(n_options=2, effects=np.zeros(2), scale=0.1)] * 2
    points = np.array(list(itertools.product(range(2), repeat=2)))
    model = Surrogate(Features(factors, []), points, np.ones(4), np.full(4, 0.1), base=1.0)
    rng = np.random.default_rng(0)
    known = Landscape(model, model)
    assert most_promising(known, points, reference=REFERENCE, n=3, rng=rng) == []
