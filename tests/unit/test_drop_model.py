"""The model of drops: divergence speaks first, counts of answers have the last word."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autotune.search.drop_model import DropModel, Drops
from autotune.search.features import Features
from autotune.search.priors import damage_factors, damage_links
from autotune.search.surrogate import Surrogate

N, SAMPLES = 6, 300
DAMAGE = np.array([0.002, 0.01, 0.001, 0.02, 0.005, 0.008])
EVERYTHING = np.array(list(itertools.product(range(2), repeat=N)))


def features() -> Features:
    factors = damage_factors([np.array([0.0, damage]) for damage in DAMAGE])
    return Features(factors, damage_links(factors))


def divergence(points: np.ndarray) -> np.ndarray:
    """The square of a sum: every two choices reinforce each other, wherever they are."""
    found: np.ndarray = (points @ np.sqrt(DAMAGE)) ** 2
    return found


def drops(points: np.ndarray) -> Drops:
    """Whole samples: what is expected, with luck."""
    expected = divergence(points)
    luck = np.random.default_rng(7).normal(0, 0.5 * np.sqrt(expected / SAMPLES))
    counted = np.maximum(np.round((expected + luck) * SAMPLES), 0.0) / SAMPLES
    return Drops(
        measured=counted,
        diverged=expected,
        errors=np.zeros(len(points)),
        n_samples=SAMPLES,
        ceiling=0.2,
    )


def measured(n: int = 24) -> np.ndarray:
    points = np.random.default_rng(0).integers(0, 2, (n, N))
    points[0] = 0
    return points


def test_with_divergence_it_predicts_better_than_from_counts_alone() -> None:
    points = measured()
    told = drops(points)
    counts = Surrogate(
        features(), points, told.measured, np.full(len(points), 1 / SAMPLES), base=0.0
    )
    model = DropModel(features(), points, told)
    errors = [np.abs(m.predict(EVERYTHING)[0] - divergence(EVERYTHING)) for m in (counts, model)]
    assert errors[1].mean() < 0.6 * errors[0].mean()


def test_a_choice_that_diverges_and_loses_nothing_is_learned() -> None:
    points = measured(40)
    harmless = divergence(points) - 0.5 * DAMAGE[3] * points[:, 3]
    model = DropModel(
        features(), points, replace(drops(points), measured=np.maximum(harmless, 0.0))
    )
    without, (change,) = EVERYTHING[0], np.diff(model.predict(np.eye(N, dtype=int)[[3, 0]])[0])
    assert model.predict(without[None])[0] == pytest.approx([0.0], abs=1e-3)
    assert change < -0.25 * DAMAGE[3] + DAMAGE[0], "half of its divergence counts"


def test_its_deviation_covers_what_is_counted() -> None:
    model = DropModel(features(), measured(), drops(measured()))
    mean, deviation = model.predict(EVERYTHING)
    inside = np.abs(mean - drops(EVERYTHING).measured) <= 1.96 * deviation
    assert inside.mean() >= 0.9


def test_what_was_counted_is_told_as_it_is() -> None:
    points = measured()
    told = drops(points)
    assert np.array_equal(DropModel(features(), points, told).told(), told.measured)


def test_its_tables_and_its_rows_add_up_to_its_mean() -> None:
    points = measured()
    model = DropModel(features(), points, drops(points))
    mean, _ = model.predict(EVERYTHING)
    assert model.energy().at(EVERYTHING) == pytest.approx(mean, abs=1e-9)
    rows = model.features.rows(EVERYTHING)
    assert model.weigh(rows[5:6] - rows[9:10])[0] == pytest.approx(mean[5:6] - mean[9:10])
    assert (model.unmeasured(rows) >= model.weigh(rows)[1] - 1e-5).all()


def test_believing_a_prediction_moves_no_mean() -> None:
    points = measured(12)
    model = DropModel(features(), points, drops(points))
    after = model.believing(EVERYTHING[37])
    assert after.predict(EVERYTHING)[0] == pytest.approx(model.predict(EVERYTHING)[0], abs=1e-9)
    assert len(after.told()) == 13


def test_a_drop_on_few_samples_bends_the_model_little() -> None:
    points = measured()
    told = drops(points)
    wrong = told.measured.copy()
    wrong[5] += 0.05
    errors = np.zeros(len(points))
    sure = DropModel(features(), points, replace(drops(points), measured=wrong))
    errors[5] = 0.05
    unsure = DropModel(features(), points, replace(drops(points), measured=wrong, errors=errors))
    shifts = [m.predict(points[5:6])[0][0] - divergence(points[5:6])[0] for m in (sure, unsure)]
    assert abs(shifts[1]) < abs(shifts[0])
