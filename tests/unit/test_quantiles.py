"""Bounds of the tail: they hold as often as they say, and are missing where they must be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from device_agents.latency import MIN_SITTINGS, TimedBlock, state_uncertainty
from device_agents.quantiles import (
    independent,
    is_bounded,
    lower_bounds,
    lower_quantile,
    tail_bounds,
    upper_bounds,
    upper_quantile,
)
from device_agents.undisturbed import Pairs


def measured(
    seed: int,
    *,
    pairs: int = 40,
    per_block: int = 5,
    sittings: int = 8,
    session: float = 0.011,
    correlation: float = 0.0,
) -> list[TimedBlock]:
    """Blocks of a 1 ms candidate and a 2 ms reference whose common noise is correlated."""
    rng = np.random.default_rng(seed)
    level, blocks = 0.0, []
    own = dict.fromkeys(("candidate", "reference"), 0.0)
    for i in range(pairs):
        if i * sittings // pairs != (i - 1) * sittings // pairs:
            own = {subject: rng.normal(0, session / math.sqrt(2)) for subject in own}
        level = correlation * level + rng.normal(0, 0.05 * correlation)
        for subject, ns in (("candidate", 1e6), ("reference", 2e6)):
            spikes = (rng.random(per_block) < 0.05) * rng.exponential(0.5, per_block)
            noise = level + own[subject] + rng.normal(0, 0.05, per_block) + spikes
            samples = np.rint(ns * np.exp(noise)).astype(int)
            blocks.append(
                TimedBlock(
                    subject="candidate" if subject == "candidate" else "reference",
                    samples_ns=tuple(samples.tolist()),
                    median_ns=float(np.median(samples)),
                    sitting=i * sittings // pairs,
                )
            )
    return blocks


def true_quantiles(correlation: float) -> dict[str, float]:
    blocks = measured(999, pairs=4_000, sittings=400, per_block=20, correlation=correlation)
    samples = np.concatenate([b.samples_ns for b in blocks if b.subject == "candidate"])
    short = [
        Pairs.of(measured(seed, pairs=50, per_block=16, correlation=correlation)).undisturbed_ns(
            "reference"
        )
        for seed in range(80)
    ]
    p90, p99 = np.quantile(samples, [0.9, 0.99]) * 2e6 / np.median(short)
    return {"p90": p90, "p99": p99}


@pytest.mark.parametrize(("correlation", "covered", "n"), [(0.0, 0.975, 80), (0.9, 0.92, 300)])
@pytest.mark.parametrize(("bounds", "sign"), [(upper_bounds, 1), (lower_bounds, -1)])
@pytest.mark.parametrize("sittings", [MIN_SITTINGS - 2, MIN_SITTINGS])
def test_bounds_hold_as_often_as_they_say(
    sittings: int, bounds: Any, sign: int, correlation: float, covered: float, n: int
) -> None:
    truth = true_quantiles(correlation)
    found = [
        bounds(
            measured(seed, pairs=50, per_block=16, sittings=sittings, correlation=correlation),
            reference_latency_ns=2e6,
        )
        for seed in range(n)
    ]
    for name in ("p90", "p99"):
        named = [own[name] for own in found if own[name] is not None]
        assert len(named) >= n / 2
        held = [sign * bound >= sign * truth[name] for bound in named]
        assert sum(held) / len(named) >= covered


def test_a_quiet_devices_bound_is_close_to_its_quantile() -> None:
    blocks = measured(3, pairs=200, per_block=10)
    calibrated_ns = Pairs.of(blocks).undisturbed_ns("reference")
    bounds = tail_bounds(blocks, reference_latency_ns=calibrated_ns)
    true_ns = true_quantiles(0.0)["p90"] * calibrated_ns / 2e6
    assert bounds["p90_high_ns"] is not None
    assert 1 < bounds["p90_high_ns"] / true_ns < 1.1
    assert bounds["p90_low_ns"] is not None
    assert 0.9 < bounds["p90_low_ns"] / true_ns < 1


def test_few_samples_have_no_bound_and_more_are_asked_for() -> None:
    few, many = measured(0, pairs=10, per_block=3), measured(0, pairs=80, per_block=10)
    assert upper_bounds(few, reference_latency_ns=2e6) == {"p90": None, "p99": None}
    assert not is_bounded(few, "p90")
    assert is_bounded(many, "p90")
    assert is_bounded(few, "p50"), "the median has its interval"


def test_a_reference_that_was_slow_here_scales_the_bound_and_widens_it() -> None:
    blocks = measured(1, pairs=80)
    at_rest_ns = Pairs.of(blocks).undisturbed_ns("reference")
    calibrated = (at_rest_ns, at_rest_ns / 2)
    apart = math.exp(state_uncertainty(2.0, 1.0))
    at_rest, slow = (upper_bounds(blocks, reference_latency_ns=ns)["p90"] for ns in calibrated)
    assert at_rest is not None
    assert slow == pytest.approx(at_rest / 2 * apart)
    below, slow = (lower_bounds(blocks, reference_latency_ns=ns)["p90"] for ns in calibrated)
    assert below is not None
    assert slow == pytest.approx(below / 2 / apart)


def test_the_tail_of_a_device_that_is_not_at_rest_is_as_open_as_its_p50() -> None:
    blocks = measured(1, pairs=80)
    found_ns = Pairs.of(blocks).undisturbed_ns("reference")
    plain = tail_bounds(blocks, reference_latency_ns=found_ns)
    rest = tail_bounds(blocks, reference_latency_ns=found_ns, reference_rest_ns=found_ns / 1.05)
    assert plain["p90_high_ns"] is not None
    assert plain["p90_low_ns"] is not None
    assert rest["p90_high_ns"] == pytest.approx(plain["p90_high_ns"] * 1.05)
    assert rest["p90_low_ns"] == pytest.approx(plain["p90_low_ns"] / 1.05**2)


def test_one_sitting_leaves_room_for_how_sessions_differ() -> None:
    several, single = measured(2, session=0, pairs=80), measured(2, pairs=80, sittings=1)
    apart = upper_bounds(several, reference_latency_ns=2e6)["p90"]
    alone = upper_bounds(single, reference_latency_ns=2e6)["p90"]
    assert apart is not None
    assert alone is not None
    assert alone > apart


def test_slow_spells_are_worth_fewer_independent_samples() -> None:
    rng = np.random.default_rng(0)
    even = [rng.normal(size=100) for _ in range(6)]
    uneven = [part + shift for part, shift in zip(even, [0, 0, 0, 0, 0, 5], strict=True)]
    assert independent(uneven, 0.9) < 60 < independent(even, 0.9)


def test_no_samples_and_a_single_part_have_no_bound() -> None:
    assert upper_bounds([], reference_latency_ns=None) == {"p90": None, "p99": None}
    assert upper_quantile([np.arange(1000.0)], 0.9) is None


def test_blocks_that_are_no_pairs_of_positive_samples_have_no_bound() -> None:
    blocks, nothing = measured(0, pairs=80), {"p90": None, "p99": None}
    assert upper_bounds(blocks[:-1], reference_latency_ns=2e6) == nothing
    empty = replace(blocks[0], samples_ns=())
    assert upper_bounds([empty, *blocks[1:]], reference_latency_ns=2e6) == nothing


def test_a_clock_that_reads_the_same_each_time_is_its_own_bound() -> None:
    assert upper_quantile([np.full(20, 5.0)] * 2, 0.9) == 5.0
    assert lower_quantile([np.full(20, 5.0)] * 2, 0.9) == 5.0
