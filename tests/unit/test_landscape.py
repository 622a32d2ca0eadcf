"""A job's space as numbers and back, and proposals that follow from trials."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from autotune.search.landscape import (
    INT8_SAVING,
    Encoding,
    Knowledge,
    drop_per_nat,
    fit,
    propose,
    ratio_deviation,
)
from autotune.search.priors import BOUNDARY_SCALE, Earlier, boundary_links
from device_agents.protocol import KernelTime, Profile
from search_spaces import FP32, INT8, Candidate, RuntimeOptions
from storage.records import TrialRecord
from tests.unit.records import latency, trial
from tests.unit.spaces import inventory, space

BASE = {"stem": 0.5, "body": 0.5}
DAMAGE = {("stem", "w8a8"): 0.05, ("body", "w8a8"): 0.001, ("dw", "w8a8"): 0.001}


def encoding() -> Encoding:
    return Encoding(space=space(threads=(1, 2)), bases=({}, BASE))


def knowledge() -> Knowledge:
    return Knowledge(inventory=inventory(), damage=DAMAGE)


def measured() -> list[TrialRecord]:
    """FP32, and INT8 everywhere: twice as fast, five points lost."""
    built = encoding().space
    return [
        trial(0, 4.0, 0.95, candidate=built.fp32()),
        trial(1, 2.0, 0.90, candidate=built.uniform_int8()),
    ]


def test_every_candidate_survives_its_encoding() -> None:
    rng = random.Random(0)
    for _ in range(50):
        drawn = encoding().space.sample(rng)
        candidate = replace(drawn, prune_ratios=rng.choice([{}, BASE]))
        point = encoding().point(candidate)
        assert point is not None
        assert encoding().candidate(point) == candidate


@pytest.mark.parametrize(
    "foreign",
    [
        Candidate(prune_ratios={"stem": 0.25}),
        Candidate(runtime=RuntimeOptions(threads=8)),
        Candidate(rounding="adaround"),
    ],
)
def test_what_is_not_of_this_space_has_no_row(foreign: Candidate) -> None:
    assert encoding().point(foreign) is None


def test_shares_of_time_sum_to_one_and_a_profile_beats_the_count() -> None:
    assert sum(knowledge().time_shares().values()) == pytest.approx(1.0)
    told = replace(knowledge(), fp32_ns={"stem": 900.0, "body": 100.0}, int8_ns={"stem": 1800.0})
    assert told.time_shares() == {"stem": 0.9, "dw": 0.0, "body": 0.1, "head": 0.0}
    assert told.saving("stem", INT8) == pytest.approx(-1.0)
    assert told.saving("body", INT8) == INT8_SAVING


def test_the_baselines_profiles_tell_what_part_of_the_latency_is_each_groups() -> None:
    def profiled(ns: float) -> Profile:
        times = {"body": ns, "head": 3 * ns}
        kernels = [
            KernelTime(name=g, operator="Conv", time_ns=t, group=g) for g, t in times.items()
        ]
        return Profile(kernels=tuple(kernels), inference_ns=ns, n_runs=5)

    told = [
        replace(t, latency=t.latency.model_copy(update={"profile": profiled(ns)}))
        for t, ns in zip(measured(), (100.0, 40.0), strict=True)
        if t.latency is not None
    ]
    found = knowledge().told_by(encoding().space, told)
    assert found.fp32_ns == pytest.approx({"body": 1e6, "head": 3e6})
    assert found.int8_ns == pytest.approx({"body": 0.5e6, "head": 1.5e6})


def test_proposals_are_new_and_the_same_for_the_same_trials() -> None:
    first, again = (propose(encoding(), knowledge(), measured(), n=4, seed=3) for _ in range(2))
    candidates = [c for c, _ in first]
    assert candidates == [c for c, _ in again]
    assert len({c.digest for c in candidates}) == 4
    assert not {c.digest for c in candidates} & {t.candidate.digest for t in measured()}


def test_the_group_that_hurts_is_left_in_fp32_first() -> None:
    found = [c for c, _ in propose(encoding(), knowledge(), measured(), n=4, seed=0)]
    unpruned = [c for c in found if not c.prune_ratios]
    assert any(c.precision("stem") == FP32 and c.precision("body") == INT8 for c in unpruned)


def test_a_boundary_is_thought_to_cost_something_however_small_its_tensor_is() -> None:
    links = boundary_links(np.array([300.0, 100.0, 0.0]), price=0.04)
    assert sum(link.scale for link in links) == pytest.approx(BOUNDARY_SCALE)
    assert [link.scale / links[2].scale for link in links] == pytest.approx([2.125, 1.375, 1.0])
    assert [link.price for link in links] == pytest.approx([0.03, 0.01, 0.0])


@pytest.mark.parametrize(("budget", "n_taught"), [(12, 0), (16, 1), (24, 2)])
def test_what_was_measured_before_counts_of_the_quarter_that_may_teach(
    budget: int, n_taught: int
) -> None:
    """Every second one of the job's first quarter, and two are measured."""
    found = propose(encoding(), knowledge(), measured(), n=6, seed=0, budget=budget)
    assert sum(promise.gain is None for _, promise in found) == n_taught


def test_a_job_that_may_lose_more_goes_on_beyond_three_points() -> None:
    # INT8 everywhere loses five points, so that up to three a base on top of it gains nothing.
    pruned = replace(encoding().space.uniform_int8(), prune_ratios=BASE)

    def gain(**limit: float) -> float:
        found = propose(encoding(), knowledge(), measured(), n=400, seed=0, budget=0, **limit)
        return {c.digest: promise.gain or 0.0 for c, promise in found}[pruned.digest]

    assert gain(largest_drop=0.3) > 10 * gain()


def test_what_is_surely_beaten_is_hopeless_and_what_may_not_be_is_not() -> None:
    slow = encoding().space.uniform_int8()
    trials = [measured()[0], trial(1, 8.0, 0.95, candidate=slow)]
    fitted = fit(encoding(), knowledge(), trials)
    assert fitted is not None
    assert fitted.is_hopeless(slow)
    assert not fitted.is_hopeless(encoding().space.fp32())
    assert not fitted.is_hopeless(replace(slow, prune_ratios=BASE))  # nobody knows yet


def test_without_a_measured_fp32_nothing_is_proposed() -> None:
    assert propose(encoding(), knowledge(), measured()[1:], n=4, seed=0) == []


def test_what_failed_is_not_proposed_again() -> None:
    first = propose(encoding(), knowledge(), measured(), n=1, seed=0)[0][0]
    failed = trial(2, None, None, candidate=first)
    following = propose(encoding(), knowledge(), [*measured(), failed], n=6, seed=0)
    assert first.digest not in {c.digest for c, _ in following}


def test_earlier_latencies_without_their_accuracies_leave_the_front_to_the_jobs_own_trials() -> (
    None
):
    better = encoding().space.uniform_int8().with_precision("head", FP32)
    earlier = Earlier(latencies=(trial(7, 1.0, 0.95, candidate=better),))
    found = propose(encoding(), knowledge(), measured(), n=3, seed=0, earlier=earlier)
    assert len(found) == 3


def test_a_ratio_is_as_unsure_as_its_interval_is_wide() -> None:
    assert ratio_deviation(latency(4.0, half_width=0.0196)) == pytest.approx(0.01)
    assert ratio_deviation(latency(4.0, half_width=0.0)) == pytest.approx(0.001)
    assert ratio_deviation(latency(2.0, half_width=math.inf)) == 0.5


def test_trials_say_what_a_nat_costs() -> None:
    expensive = [trial(i, 3.0, 0.85) for i in range(3)]  # 10 points for 0.1 nats each
    assert drop_per_nat([]) == pytest.approx(0.5)
    assert drop_per_nat(expensive) == pytest.approx(1.0, abs=0.05)
