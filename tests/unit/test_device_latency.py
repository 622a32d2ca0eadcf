"""What a job teaches about its device, and how far the next model's prior is from the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autotune.search.device_latency import (
    Mixtures,
    expected_ns,
    expected_saving,
    expected_spread,
    learn,
    operator_of,
)
from autotune.search.features import Features
from autotune.search.landscape import INT8_SAVING, Encoding, Knowledge, latency_features
from autotune.search.lessons import lesson
from autotune.search.priors import boundary_links, time_factors
from search_spaces import LayerKind, RuntimeOptions
from storage.latency_model import LatencyModel
from tests.benchmarks.oracles import Simulated, simulated
from tests.unit.records import trial
from tests.unit.spaces import group, inventory, space

KINDS = ("conv", "pointwise", "depthwise", "pointwise", "pointwise") * 2
NAMES = ("fp32", "w8a8", "w8")
SPEEDS = {"conv": (1.0, 0.3, 1.0), "pointwise": (1.0, 0.55, 1.0), "depthwise": (1.0, 1.35, 1.0)}
TENSOR_BYTES = 4e6
FP32_NS = 1e6
THOUGHT = {(kind, "w8a8"): 1 - INT8_SAVING for kind in KINDS}


def model(seed: int) -> Simulated:
    """One of the models that run on one device: shapes and shares differ, kernels hardly do."""
    made = simulated(f"model {seed}", kinds=KINDS, n_precisions=3, seed=seed)
    speeds = np.array([SPEEDS[kind] for kind in KINDS])
    speeds[:, 1:] *= np.exp(np.random.default_rng(seed).normal(0, 0.2, (len(KINDS), 2)))
    boundaries = 0.3 * made.tensor_sizes / made.tensor_sizes.sum()
    return replace(made, speeds=speeds, boundaries=boundaries)


def measured(oracle: Simulated, *, n: int = 20, seed: int = 0) -> Mixtures:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(oracle.sizes, size=(n, len(oracle.sizes)))
    points = np.vstack([*oracle.baselines(), drawn])
    ratios = np.array([oracle.measure(point, rng).ratio for point in points])
    return Mixtures(
        operators=KINDS,
        options=[NAMES] * len(KINDS),
        shares=oracle.time_shares,
        boundary_bytes=oracle.boundaries / oracle.boundaries.sum() * TENSOR_BYTES,
        fp32_ns=FP32_NS,
        points=points,
        ratios=ratios,
        noise=oracle.noise * ratios,
        bases=np.zeros(len(points), dtype=int),
    )


def taught(mixtures: Mixtures, prior: LatencyModel | None = None) -> LatencyModel:
    return learn(
        mixtures, prior, runtime=RuntimeOptions(), runtime_version="1.31.1", thought=THOUGHT
    )


def prior_error(oracle: Simulated, known: LatencyModel | None) -> float:
    """Mean error of the ratio expected of mixtures before anything is measured."""
    savings = []
    for kind in KINDS:
        own = [expected_saving(known, kind, name) for name in NAMES[1:]]
        usual = (INT8_SAVING, 0.0)
        savings.append(
            np.array([0.0, *(u if s is None else s for s, u in zip(own, usual, strict=True))])
        )
    price = (known.boundary_ns_per_byte or 0.0) * TENSOR_BYTES / FP32_NS if known else 0.0
    links = boundary_links(oracle.boundaries, price=price)
    unseen = np.random.default_rng(1).integers(oracle.sizes, size=(200, len(oracle.sizes)))
    expected = Features(time_factors(oracle.time_shares, savings), links).rows(unseen)[:, -1]
    return float(np.abs(1 + expected - oracle.latency(unseen)).mean())


@pytest.mark.parametrize("seed", range(4))
def test_the_next_model_on_the_device_starts_with_less_than_half_of_the_error(seed: int) -> None:
    once = taught(measured(model(seed)))
    next_model = model(100 + seed)
    assert prior_error(next_model, once) < 0.5 * prior_error(next_model, None)


def test_a_second_job_makes_what_is_known_surer() -> None:
    once = taught(measured(model(0)))
    twice = taught(measured(model(1), seed=1), once)
    for cost in once.operators:
        again = twice.cost(cost.operator, cost.precision)
        assert again is not None and again.deviation < cost.deviation
    assert twice.n_trials == 2 * once.n_trials


def test_what_was_not_tried_is_not_taught_and_what_was_known_of_it_stays() -> None:
    mixtures = measured(model(0))
    without = replace(mixtures, points=np.where(mixtures.points == 2, 0, mixtures.points))
    kinds = {(c.operator, c.precision) for c in taught(without).operators}
    assert kinds == {(kind, "w8a8") for kind in KINDS}
    known = taught(mixtures)
    assert taught(without, known).cost("depthwise", "w8") == known.cost("depthwise", "w8")


def test_kernel_times_tell_nanoseconds_per_operation_and_per_byte() -> None:
    oracle = model(0)
    work = np.random.default_rng(0).uniform(1e3, 1e5, (len(KINDS), 2))
    times = 0.2 * work[:, 0] + 0.5 * work[:, 1]
    known = taught(replace(measured(oracle), work=work, fp32_group_ns=times))
    assert expected_ns(known, "pointwise", 1000, 10) == pytest.approx(205)
    int8 = known.cost("pointwise", "w8a8")
    assert int8 is not None and int8.ns_per_mac == pytest.approx(0.2 * int8.factor)
    assert expected_ns(known, "gemm", 1000, 10) is None


def test_a_group_is_of_its_heaviest_layers_operator() -> None:
    layer = group("a", 10).layers[0]
    shapes = {
        "conv": (16, 8, 3, 3),
        "pointwise": (16, 8, 1, 1),
        "few_channels": (16, 3, 3, 3),
    }
    for name, shape in shapes.items():
        heavy = replace(layer, weight_shape=shape)
        light = replace(layer, macs=1, kind=LayerKind.GEMM)
        assert operator_of(replace(group("a", 10), layers=(light, heavy))) == name
    assert operator_of(group("dw", 10, LayerKind.DEPTHWISE_CONV)) == "depthwise_conv"
    assert operator_of(group("fc", 10, LayerKind.GEMM)) == "gemm"


def test_trials_teach_and_the_next_jobs_features_begin_with_it() -> None:
    encoding = Encoding(space=space(), bases=({},))
    knowledge = Knowledge(inventory=inventory(), damage={})
    slower = encoding.space.uniform_int8()
    slow_head = encoding.space.fp32().with_precision("head", slower.precision("head"))
    trials = [
        trial(0, 4.0, 0.95, candidate=encoding.space.fp32()),
        trial(1, 5.0, 0.95, candidate=slower),
        trial(2, 4.1, 0.95, candidate=slow_head),
    ]
    assert lesson(encoding, knowledge, trials[:2], None) is None
    known = lesson(encoding, knowledge, trials, None)
    assert known is not None and known.runtime_version == "1.31.1"
    saving, spread = (f(known, "conv", "w8a8") for f in (expected_saving, expected_spread))
    assert saving is not None and saving < 0
    assert spread is not None and spread < 0.5
    features = latency_features(encoding, replace(knowledge, taught=known))
    point = encoding.point(slower)
    assert point is not None
    assert features.rows(point[None])[0, -1] > 0
    assert latency_features(encoding, knowledge).rows(point[None])[0, -1] < 0
