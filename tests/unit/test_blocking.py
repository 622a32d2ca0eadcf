"""Which groups keep a trial from its budget, and what each costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.api_types import BlockingGroup, JobResult
from autotune.search.blocking import blocking_groups, in_words
from device_agents.protocol import KernelTime, Profile
from search_spaces import INT8, Candidate
from storage.records import TrialRecord
from tests.unit.records import latency, trial
from tests.unit.spaces import inventory


def profiled(ms: float = 2.0) -> TrialRecord:
    """Of 10 units of kernel time the body takes 5, the stem 3, the head 1; 1 is between them."""
    times = {"stem": 3e5, "body": 5e5, "head": 1e5, None: 1e5}
    kernels = tuple(
        KernelTime(name=str(name), operator="Conv", time_ns=ns, group=name)
        for name, ns in times.items()
    )
    report = latency(ms).model_copy(update={"profile": Profile(kernels=kernels, n_runs=9)})
    return replace(trial(0, ms, 0.9), latency=report)


def test_a_groups_cost_is_its_share_of_the_kernels_in_the_measured_latency() -> None:
    found = blocking_groups(profiled(), inventory(), excess=100.0)
    assert {g.group: g.cost_ns for g in found} == {
        "body": pytest.approx(1.0e6),
        "stem": pytest.approx(0.6e6),
        "head": pytest.approx(0.2e6),
    }
    assert [g.share for g in found] == [pytest.approx(s) for s in (0.5, 0.3, 0.1)]
    assert all(g.is_profiled for g in found)


def test_only_as_many_block_as_must_cost_nothing_for_the_budget_to_be_kept() -> None:
    """2 ms against 1.2 is two thirds past it; without the body's half it would be inside."""
    assert [g.group for g in blocking_groups(profiled(), inventory(), excess=2 / 3)] == ["body"]
    assert len(blocking_groups(profiled(), inventory(), excess=1.5)) == 2


def test_without_a_profile_the_planned_work_stands_in_and_is_said_to() -> None:
    plain = trial(0, 2.0, 0.9, candidate=Candidate(precisions={"body": INT8}))
    found = blocking_groups(plain, inventory(), excess=100.0)
    # 9,000 MACs in 8 bits weigh 2,250, the stem's 1,000 in 32 bits 1,000.
    assert [g.group for g in found[:2]] == ["body", "stem"]
    assert sum(g.share or 0 for g in found) == pytest.approx(1.0)
    assert not any(g.is_profiled for g in found)
    assert "by the work planned for each" in in_words(found)


def test_the_sentence_names_the_costliest_with_ms_and_counts_the_rest() -> None:
    text = in_words(blocking_groups(profiled(), inventory(), excess=100.0))
    assert text == (
        "the groups that hold it back: body (1 ms, 50%), stem (0.6 ms, 30%), head (0.2 ms, 10%)"
    )
    many = [
        BlockingGroup(group=f"g{i}", cost_ns=1e6, share=0.1, is_profiled=True) for i in range(8)
    ]
    assert in_words(many).endswith("g4 (1 ms, 10%) and 3 more")
    assert in_words([]) == ""


def test_results_that_hold_names_alone_are_still_read() -> None:
    stored = {"winner": "t", "verdict": "impossible_budget", "explanation": "x"}
    result = JobResult.model_validate({**stored, "blocking_groups": ["stem", "body"]})
    assert [g.group for g in result.blocking_groups] == ["stem", "body"]
    assert result.blocking_groups[0].cost_ns is None and in_words(result.blocking_groups) != ""
