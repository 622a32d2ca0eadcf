"""The search benchmark's oracles and figures: what is replayed is what was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.oracles import Measured, simulated
from tests.benchmarks.search import attained, regrets, runs_to_reach
from tests.benchmarks.search_methods import METHODS
from tests.benchmarks.search_ours import REFERENCE, comparison_runs, model_based
from tests.benchmarks.tables import FOLDER, Table, distance_to_front


def table() -> Table:
    rng = np.random.default_rng(0)
    counts = np.array([2, 3, 2, 4, 2, 2])
    right = rng.random((6, 40)) < 0.8
    return Table(
        name="made_up",
        options=(("fp32", "w8a8"), ("fp32", "w8a8", "w4")),
        ratios=rng.uniform(0.5, 1.5, counts.sum()),
        counts=counts,
        right=right,
        margins=np.where(right, 1.0, -1.0) * rng.uniform(0.0, 8.0, right.shape),
        kl=rng.random(6),
        nll=rng.random(6),
        early_kl=rng.random(6),
        kernel_ns=rng.uniform(1e3, 1e4, (3, 2)),
        tensor_bytes=np.array([4096.0]),
        conditions={"made": "up"},
    )


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = table()
    written.save(tmp_path)
    read = Table.load("made_up", tmp_path)
    assert read.options == written.options
    assert read.conditions == written.conditions
    assert (read.right == written.right).all()
    assert ((read.margins > 0) == written.right).all()
    assert np.abs(read.margins - written.margins).max() < 0.5
    assert read.margins[0] == pytest.approx(written.margins[0], abs=1e-5)
    assert read.latency == pytest.approx(written.latency, rel=1e-6)
    assert [len(own) for own in read.replicates] == written.counts.tolist()


def test_points_stand_where_their_numbers_say() -> None:
    made = table()
    assert made.index(made.points).tolist() == list(range(6))


def test_runs_scatter_around_the_truth_as_the_oracle_says() -> None:
    oracle, rng = Measured(table=table()), np.random.default_rng(1)
    point = np.array([1, 1])
    runs = [oracle.measure(point, rng).ratio for _ in range(4000)]
    logs = np.log(np.array(runs) / oracle.latency(point[None])[0])
    assert logs.std() == pytest.approx(oracle.noise, rel=0.1)
    assert abs(logs.mean()) < 0.1 * oracle.noise


def test_a_point_is_as_far_from_the_front_as_it_would_have_to_be_faster() -> None:
    latency, drop = np.array([1.0, 0.5, 0.8, 0.4]), np.array([0.0, 0.01, 0.01, 0.02])
    assert distance_to_front(latency, drop) == pytest.approx([0.0, 0.0, 1 - 0.5 / 0.8, 0.0])


def test_the_optima_of_a_simulated_model_are_the_best_of_all_its_points() -> None:
    oracle = simulated(
        "small", kinds=("conv", "depthwise", "pointwise"), n_precisions=3, ratios=(0.0, 0.5), seed=3
    )
    everything = np.array(list(itertools.product(*(range(size) for size in oracle.sizes))))
    weights = np.array([0.1, 1.0, 10.0])
    for weight, point in zip(weights, oracle.optima(weights), strict=True):
        sums = oracle.latency(everything) + weight * oracle._joint_damage(everything)
        own = oracle.latency(point[None]) + weight * oracle._joint_damage(point[None])
        assert own[0] == pytest.approx(sums.min())


def test_regrets_are_held_against_random_and_against_the_best_other_method() -> None:
    shares = {"ours": [[0.5, 0.9]] * 3, "random": [[0.1, 0.5]] * 3, "tpe": [[0.1, 0.8]] * 3}
    found = regrets(shares, 2)
    assert found["regret_vs_random"].value == pytest.approx(0.2)
    assert found["regret_vs_best"].value == pytest.approx(0.5)


def test_the_runs_to_reach_tpe_are_the_first_that_have_its_share() -> None:
    shares = {"ours": [[0.5, 0.7, 0.9]] * 3, "tpe": [[0.1, 0.7]] * 3}
    assert runs_to_reach(shares).value == pytest.approx(2 / 200)


def test_our_search_misses_far_less_of_the_front_than_random_points_do() -> None:
    oracle = Measured(table=Table.load("resnet18"))
    points = {
        name: [METHODS[name](oracle, comparison_runs(oracle), seed) for seed in (0, 1)]
        for name in ("ours", "random")
    }
    assert [len(rows) for rows in points["ours"]] == [20, 20]
    found = regrets(attained(oracle, points, REFERENCE), 20)
    assert found["regret_vs_random"].value <= 0.4


def test_our_search_begins_with_the_baselines_and_the_ladder_of_a_jobs_warm_start() -> None:
    oracle = Measured(table=Table.load("resnet18"))
    points = model_based(oracle, 20, seed=0)
    assert len({tuple(point) for point in points}) == 20
    most_damaged = np.argsort([-damage[1] for damage in oracle.damages()])
    assert points[:2].tolist() == [[0] * 10, [1] * 10]
    for point, n_float in zip(points[2:5], (1, 2, 4), strict=True):
        assert set(np.flatnonzero(point == 0)) == set(most_damaged[:n_float])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.npz")), ids=lambda path: str(path.stem))
def test_every_kept_table_is_whole(path: Path) -> None:
    kept = Table.load(path.stem)
    assert path.stat().st_size < 300_000
    assert len(kept.points) == len(kept.counts) == len(kept.right) == len(kept.kl)
    assert len(kept.sizes) == 10
    assert kept.counts.min() >= 1
    assert np.isfinite(kept.latency).all()
    assert {"machine", "versions", "runtime", "commit"} <= set(kept.conditions)
