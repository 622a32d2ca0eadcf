"""What feasible means: upper bounds at the asked quantile, and limits beside the latency."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autotune.errors import InvalidJob
from autotune.search.feasibility import (
    Limits,
    bounded,
    constraints,
    require_figures,
    require_sensors,
)
from autotune.search.front import answer, is_feasible, latency_of, non_dominated
from device_agents.protocol import Block
from storage.records import DeviceRecord, TrialRecord
from tests.unit.fakes import description
from tests.unit.records import NOW, latency, trial


def costing(number: int, ms: float, value: float = 0.94, **figures: Any) -> TrialRecord:
    size = figures.pop("artifact_size_bytes", 1_000_000)
    return trial(number, ms, value, latency=latency(ms, **figures), artifact_size_bytes=size)


@pytest.mark.parametrize(("at", "inside"), [("p50", True), ("p90", True), ("p99", False)])
def test_the_budget_holds_at_the_quantile_that_was_asked_for(at: Any, inside: bool) -> None:
    jittery = costing(0, 1.0, p90_high_ns=1.4e6, p99_high_ns=2.1e6)
    assert is_feasible(jittery, Limits(latency_ns=1.5e6, at=at)) is inside


def test_a_tail_without_a_bound_is_never_inside_and_the_answer_says_so() -> None:
    seen_briefly = costing(0, 1.0)
    found = answer([seen_briefly], limits=Limits(latency_ns=9e6, at="p99"), max_accuracy_drop=None)
    assert found is not None
    assert found.verdict == "impossible_budget"
    assert "too few samples for an upper bound at p99" in found.explanation
    assert (found.missed, found.missed_by_ns) == ({}, None)


@pytest.mark.parametrize(
    ("limits", "figures"),
    [
        (Limits(size_bytes=9e5), {}),
        (Limits(memory_bytes=6e7), {"peak_memory_bytes": 61_000_000}),
        (Limits(energy_joules=0.005), {"energy_joules": 0.0051}),
        (Limits(memory_bytes=6e7), {"peak_memory_bytes": None}),
        (Limits(energy_joules=0.005), {"energy_joules": math.nan}),
    ],
)
def test_past_a_limit_or_of_unknown_cost_is_no_answer(
    limits: Limits, figures: dict[str, Any]
) -> None:
    cheap = costing(1, 3.0, artifact_size_bytes=500_000, peak_memory_bytes=1, energy_joules=1e-6)
    found = answer([costing(0, 1.0, **figures), cheap], limits=limits, max_accuracy_drop=0.05)
    assert found is not None
    assert (found.winner.number, found.verdict) == (1, "within_budget")


def test_limits_that_exclude_each_other_are_answered_with_the_nearest_and_every_distance() -> None:
    fast = costing(0, 1.0, artifact_size_bytes=4_000_000)
    small = costing(1, 3.0, artifact_size_bytes=1_000_000)
    limits = Limits(latency_ns=2e6, size_bytes=2e6)
    found = answer([fast, small], limits=limits, max_accuracy_drop=None)
    assert found is not None
    assert found.winner.number == 1, "half of a budget too slow is nearer than twice the size"
    assert found.missed == {"latency": pytest.approx(0.515)}
    assert "misses 2 ms by 1.03 ms" in found.explanation
    assert "each limit alone is kept by some trial" in found.explanation


def test_a_limit_that_nobody_meets_is_named() -> None:
    trials = [costing(0, 1.0), costing(1, 3.0)]
    limits = Limits(latency_ns=2e6, size_bytes=1000)
    found = answer(trials, limits=limits, max_accuracy_drop=0.1)
    assert found is not None
    assert "no trial at all is inside a file of 1 kB" in found.explanation
    assert found.winner.number == 0


def test_an_optimizer_is_told_every_limit_in_parts_of_it() -> None:
    made = costing(0, 1.0, 0.92, peak_memory_bytes=90_000_000)
    limits = Limits(latency_ns=2e6, memory_bytes=6e7, energy_joules=0.01)
    told = constraints(made, latency_of(made), limits=limits, max_accuracy_drop=0.01)
    expected = {"latency": -0.495, "memory": 0.5, "energy": 1.0, "accuracy_drop": 2.0}
    assert told == pytest.approx(expected)


@pytest.mark.parametrize("name", ["memory", "energy"])
def test_memory_and_energy_keep_a_slower_trial_on_the_front_where_they_count(name: str) -> None:
    key = {"memory": "peak_memory_bytes", "energy": "energy_joules"}[name]
    fast, lean = costing(0, 1.0, 0.95, **{key: 40}), costing(1, 2.0, 0.94, **{key: 10})
    unknown = costing(2, 3.0, 0.93)
    assert non_dominated([unknown, lean, fast]) == [fast]
    assert non_dominated([unknown, lean, fast], beside=(name,)) == [fast, lean]


def test_bounds_that_an_agent_did_not_send_come_from_its_samples() -> None:
    blocks = tuple(
        Block(subject=subject, samples_ns=tuple(range(ns, ns + 20)), sitting=n // 3)
        for n in range(36)
        for subject, ns in (("candidate", 1000), ("reference", 2000))
    )
    reference = {"reference_latency_ns": 2000.0, "reference_p50_ns": 2009.5}
    report = bounded(latency(1.0, blocks=blocks, **reference))
    assert report.p90_high_ns == pytest.approx(1018, rel=0.01)
    assert report.p90_low_ns == pytest.approx(1016, rel=0.01)
    assert bounded(report) is report
    assert bounded(report.model_copy(update={"p90_low_ns": None})) == report
    assert bounded(latency(1.0)).p90_high_ns is None


def _device(name: str, energy_missing: str | None) -> DeviceRecord:
    described = description().model_copy(update={"energy_missing": energy_missing})
    return DeviceRecord(
        id=name, name=name, pool="lab", description=described, enrolled_at=NOW, last_seen_at=NOW
    )


def test_devices_that_cannot_measure_what_is_limited_are_named_one_by_one() -> None:
    devices = [_device("a", "no RAPL"), _device("b", None), _device("c", "no INA")]
    with pytest.raises(InvalidJob, match="on a: no RAPL; c: no INA") as caught:
        require_sensors({"max_energy": "5mJ"}, devices)
    assert "b:" not in str(caught.value)
    require_sensors({"max_memory": "60MB"}, devices)
    require_sensors({"search": {"objectives": ["accuracy", "latency", "size"]}}, devices)


def test_a_device_that_says_nothing_is_found_out_by_its_first_measurement() -> None:
    silent = latency(1.0, energy_source="no RAPL counter")
    with pytest.raises(InvalidJob, match="device edge did not measure: no RAPL counter"):
        require_figures({"search": {"objectives": ["energy"]}}, "edge", silent)
    with pytest.raises(InvalidJob, match="about memory"):
        require_figures({"max_memory": "60MB"}, "edge", silent)
    require_figures({"max_memory": "60MB"}, "edge", latency(1.0, peak_memory_bytes=1))
