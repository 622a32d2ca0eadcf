"""The regression over choices: it learns sums and boundaries, and knows what it does not know."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autotune.search.features import Factor, Features, Link
from autotune.search.surrogate import Surrogate

N = 6


def features(*, scale: float = 0.1) -> Features:
    factors = [Factor(n_options=3, effects=np.zeros(3), scale=scale) for _ in range(N)]
    links = [Link(first=i, second=i + 1, scale=scale / 2, is_boundary=True) for i in range(N - 1)]
    return Features(factors, links)


def truth(points: np.ndarray) -> np.ndarray:
    """A sum of effects, and 0.05 wherever one of two neighbours alone is at 0."""
    effects = np.array([[0.0, -0.1, -0.05 * i] for i in range(N)])
    crossings = ((points[:, 1:] > 0) != (points[:, :-1] > 0)).sum(axis=1)
    found: np.ndarray = 1.0 + effects[np.arange(N), points].sum(axis=1) + 0.05 * crossings
    return found


def fitted(n: int = 30, *, seed: int = 0) -> tuple[Surrogate, np.ndarray]:
    points = np.random.default_rng(seed).integers(0, 3, (n, N))
    points[0] = 0
    return Surrogate(features(), points, truth(points), np.full(n, 0.002), base=1.0), points


def test_it_predicts_mixtures_that_it_has_not_seen() -> None:
    model, _ = fitted()
    everything = np.array(list(itertools.product(range(3), repeat=N)))
    mean, _ = model.predict(everything)
    error = np.sqrt(((mean - truth(everything)) ** 2).mean())
    assert error < 0.2 * truth(everything).std()


def test_its_deviation_covers_its_errors() -> None:
    model, _ = fitted(20)
    everything = np.array(list(itertools.product(range(3), repeat=N)))
    mean, deviation = model.predict(everything)
    inside = np.abs(mean - truth(everything)) <= 1.96 * deviation
    assert inside.mean() >= 0.9


def test_it_is_surest_where_it_has_measured() -> None:
    model, points = fitted()
    _, seen = model.predict(points)
    _, anywhere = model.predict(np.array(list(itertools.product(range(3), repeat=N))))
    assert seen.max() < np.median(anywhere)


def test_its_tables_add_up_to_its_mean() -> None:
    model, points = fitted()
    assert model.energy().at(points) == pytest.approx(model.predict(points)[0], abs=1e-9)


def test_believing_a_prediction_moves_no_mean_and_narrows_the_deviation() -> None:
    model, _ = fitted(10)
    point = np.array([2, 2, 0, 1, 2, 0])
    after = model.believing(point)
    others = np.random.default_rng(1).integers(0, 3, (50, N))
    assert after.predict(others)[0] == pytest.approx(model.predict(others)[0], abs=1e-9)
    assert after.predict(point[None])[1] < model.predict(point[None])[1]


def test_what_was_thought_beforehand_counts_until_something_is_measured() -> None:
    effects = np.array([0.0, -0.2])
    known = [Factor(n_options=2, effects=effects, scale=0.01) for _ in range(3)]
    start = np.zeros((1, 3), dtype=int)
    model = Surrogate(Features(known, []), start, np.ones(1), np.full(1, 0.01), base=1.0)
    assert model.predict(np.array([[1, 1, 0]]))[0] == pytest.approx([0.6])


def test_a_prior_that_is_wrong_throughout_is_unlearned() -> None:
    effects = np.array([0.0, -0.1])
    factors = [Factor(n_options=2, effects=effects, scale=0.02) for _ in range(N)]
    points = np.random.default_rng(0).integers(0, 2, (12, N))
    values = 1.0 + 0.05 * points.sum(axis=1)  # 8 bits are slower here, everywhere
    model = Surrogate(Features(factors, []), points, values, np.full(12, 0.005), base=1.0)
    everything = np.array(list(itertools.product(range(2), repeat=N)))
    mean, _ = model.predict(everything)
    assert np.abs(mean - 1.0 - 0.05 * everything.sum(axis=1)).max() < 0.03


def test_neighbouring_options_of_an_ordered_factor_are_alike() -> None:
    factor = Factor(n_options=5, effects=np.zeros(5), scale=1.0, is_ordered=True)
    points = np.array([[0], [4]])
    model = Surrogate(
        Features([factor], []), points, np.array([1.0, 0.2]), np.full(2, 0.01), base=1.0
    )
    mean, _ = model.predict(np.arange(5)[:, None])
    assert (np.diff(mean) < 0).all()


def test_leaving_each_figure_out_is_what_fitting_without_it_predicts() -> None:
    model, points = fitted(12)
    errors, deviations = model.left_out()
    rest = np.arange(12) != 5
    without = Surrogate(features(), points[rest], truth(points[rest]), np.full(11, 0.002), base=1.0)
    without.scales = model.scales
    without._solve(without._grams())
    mean, deviation = without.predict(points[5:6])
    assert truth(points[5:6]) - mean == pytest.approx(errors[5:6], abs=1e-9)
    noisy = np.hypot(deviation, np.hypot(0.002, model.scales[3]))
    assert deviations[5:6] == pytest.approx(noisy, rel=1e-6)


def test_a_difference_of_points_is_surer_than_its_ends_and_measured_where_they_are() -> None:
    model, points = fitted(40)
    rows = model.features.rows(points[1:3])
    mean, deviation = model.weigh(rows[:1] - rows[1:])
    assert mean == pytest.approx(-np.diff(model.predict(points[1:3])[0]))
    assert deviation < 0.2 * model.unmeasured(rows[:1] - rows[1:])


def test_a_choice_of_one_option_changes_nothing() -> None:
    own, links = features().factors, features().links
    only = Factor(n_options=1, effects=np.zeros(1), scale=0.3)
    wider = Features([*own, only], [*links, Link(first=0, second=N, scale=0.1)])
    points = np.random.default_rng(0).integers(0, 3, (5, N))
    rows = wider.rows(np.hstack([points, np.zeros((5, 1), dtype=int)]))
    assert np.array_equal(rows, features().rows(points))


def test_a_price_of_boundaries_is_expected_and_unlearned_like_any_prior() -> None:
    priced = [replace(link, price=0.2) for link in features().links]
    wider = Features(features().factors, priced)
    alone = np.array([[0, 1, 0, 0, 0, 0]])
    assert wider.rows(alone)[0, -1] == pytest.approx(0.4)
    points = np.random.default_rng(0).integers(0, 3, (40, N))
    points[0] = 0
    model = Surrogate(wider, points, truth(points), np.full(40, 0.002), base=1.0)
    assert model.energy().at(points) == pytest.approx(model.predict(points)[0])
    assert model.predict(alone)[0] == pytest.approx(truth(alone), abs=0.03)


def test_links_and_the_rest_of_a_row_add_up_to_the_figure_prices_included() -> None:
    factors = [Factor(n_options=2, effects=np.array([0.0, -0.1]), scale=0.1) for _ in range(N)]
    links = [
        Link(first=i, second=i + 1, scale=0.05, is_boundary=True, price=0.02) for i in range(N - 1)
    ]
    start = np.zeros((1, N), dtype=int)
    model = Surrogate(Features(factors, links), start, np.ones(1), np.full(1, 0.01), base=1.0)
    rows = model.features.rows(np.array([[0, 1, 1, 0, 0, 1]]))
    at_links = model.features.of_links(rows, range(N - 1))
    assert model.weigh(at_links)[0] == pytest.approx([3 * 0.02]), "three crossings"
    assert model.weigh(rows - at_links)[0] == pytest.approx([-0.3])
    assert model.weigh(model.features.of_links(rows, [0]))[0] == pytest.approx([0.02])


def test_of_a_measured_point_it_believes_the_figure_as_far_as_that_is_sure() -> None:
    points = np.random.default_rng(0).integers(0, 3, (30, N))
    points[0] = 0
    values = truth(points)
    values[7] += 0.2  # what no sum explains
    told = [
        Surrogate(features(), points, values, np.full(30, noise), base=1.0).told()
        for noise in (1e-4, 0.3)
    ]
    assert told[0] == pytest.approx(values, abs=1e-3)
    assert values[7] - told[1][7] > 0.1


def of_a_kind(kind: str | None) -> Features:
    own = features()
    return Features([replace(factor, kind=kind) for factor in own.factors], own.links)


def test_what_all_of_a_kind_have_in_common_is_learned_from_some() -> None:
    points = np.vstack([np.zeros((1, N), dtype=int), 2 * np.eye(N, dtype=int)[: N - 1]])
    values = 1.0 - 0.1 * (points == 2).sum(axis=1)
    last = 2 * np.eye(N, dtype=int)[N - 1 :]
    (alike, surer), (apart, sure) = (
        Surrogate(
            Features(of_a_kind(kind).factors, []), points, values, np.full(N, 0.01), base=1.0
        ).predict(last)
        for kind in ("group", None)
    )
    assert alike < 0.95 < apart
    assert surer < sure


def test_tables_and_links_have_what_their_kind_has_in_common() -> None:
    points = np.random.default_rng(0).integers(0, 3, (20, N))
    model = Surrogate(of_a_kind("group"), points, truth(points), np.full(20, 0.002), base=1.0)
    rows = model.features.rows(points)
    assert model.energy().at(points) == pytest.approx(model.predict(points)[0], abs=1e-9)
    parts = [model.features.of_links(rows, [link]) for link in range(N - 1)]
    singles = rows - sum(parts)
    by_factor = sum(t[points[:, c]] for c, t in enumerate(model.energy().singles))
    assert model.weigh(singles)[0] == pytest.approx(by_factor, abs=1e-9)


def test_a_base_that_was_measured_wrongly_is_corrected_by_the_others() -> None:
    points = np.random.default_rng(0).integers(0, 3, (30, N))
    points[0] = 0
    values = np.ones(30)
    values[0] += 0.04
    model = Surrogate(features(scale=0.01), points, values, np.full(30, 0.02), base=1.04)
    assert model.base == pytest.approx(1.0, abs=0.015)
    assert model.predict(points[:1])[0] == pytest.approx([model.base])
    assert model.told()[0] < 1.02
