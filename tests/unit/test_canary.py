"""The comparison of a pool's members: who is off, and what the pool's latency is."""

from __future__ import annotations

import random

import pytest

from autotune.search.canary import MAX_OFF, READINGS, compare, pool_latency_ns, reading_ns
from device_agents.protocol import Block
from tests.unit.records import latency


def test_the_pools_latency_is_the_median_of_its_members_and_the_faster_one_of_two() -> None:
    assert pool_latency_ns({"a": [1, 9, 2], "b": [5, 5, 5], "c": [7, 7, 7]}) == 5
    assert pool_latency_ns({"slow": [11.0], "fast": [10.0]}) == 10.0
    assert pool_latency_ns({"alone": [3.0, 4.0, 5.0]}) == 4.0


def test_a_member_is_off_when_its_whole_interval_is_and_not_before() -> None:
    alike = [100.0, 100.5, 99.5]
    pool = {"a": alike, "b": alike, "c": [102.0, 104.0, 106.0], "d": [103.5, 104.0, 104.5]}
    off = {name: found.is_off for name, found in compare(pool).items()}
    assert off == {"a": False, "b": False, "c": False, "d": True}


def test_a_member_may_be_off_by_being_faster() -> None:
    pool = {"a": [100.0] * 3, "b": [100.0] * 3, "c": [90.0, 91.0, 92.0]}
    assert [name for name, found in compare(pool).items() if found.is_off] == ["c"]


@pytest.mark.parametrize(("slower", "expected"), [(1.0, 0.0), (1.10, 1.0)])
def test_equal_devices_are_left_alone_and_one_that_is_a_tenth_slower_is_found(
    slower: float, expected: float
) -> None:
    """Readings that spread like fresh sessions do: 1.5 % between the quartiles."""
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        factors = {"a": 1.0, "b": 1.0, "c": 1.0, "d": slower}
        readings = {
            name: [4e6 * factor * rng.gauss(1, 0.015 / 1.349) for _ in range(READINGS)]
            for name, factor in factors.items()
        }
        off = {name for name, one in compare(readings).items() if one.is_off}
        assert off <= {"d"}
        found += "d" in off
    assert found / 300 == pytest.approx(expected, abs=0.01)


def test_the_range_of_the_readings_holds_their_median_as_often_as_stated() -> None:
    rng = random.Random(1)
    n = 4000
    inside = sum(
        min(own) <= 0.0 <= max(own)
        for own in ([rng.gauss(0, 1) for _ in range(READINGS)] for _ in range(n))
    )
    assert inside / n == pytest.approx(1 - 2 / 2**READINGS, abs=0.01)
    assert MAX_OFF == 0.03


def test_an_older_agents_reading_is_made_like_the_others() -> None:
    blocks = tuple(
        Block(subject=subject, samples_ns=(1_000_000, 1_010_000, 1_020_000, 1_500_000, 1_600_000))
        for subject in ("candidate", "reference")
    )
    told = latency(1.0, reference_p50_ns=1.2e6, blocks=blocks)
    assert reading_ns(told) == pytest.approx(1.008e6, rel=1e-3)
    assert reading_ns(told.model_copy(update={"undisturbed_share": 0.6})) == reading_ns(told)
    assert reading_ns(told.model_copy(update={"blocks": ()})) == 1.2e6
    empty = (blocks[0], blocks[1].model_copy(update={"samples_ns": ()}))
    assert reading_ns(told.model_copy(update={"blocks": empty})) == 1.2e6
