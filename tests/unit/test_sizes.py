"""Bytes per choice against files, and the ladder of sizes against all candidates there are."""

from __future__ import annotations

import itertools

import pytest

from autotune.compression.inventory import build_inventory
from autotune.search import planner
from autotune.search.landscape import Encoding
from autotune.search.proposals import Proposals
from autotune.search.sampler import Sampler
from autotune.search.sizes import group_bytes
from search_spaces import FP32, Candidate, Precision
from tests.unit.compression_models import quantizable, tiny_source
from tests.unit.records import trial
from tests.unit.spaces import inventory, space

DAMAGE = {
    ("stem", "w8a8"): 0.5,
    ("dw", "w8a8"): 0.1,
    ("body", "w8a8"): 0.02,
    ("head", "w8a8"): 0.01,
    ("head", "w8"): 0.001,
    ("head", "w4"): 0.03,
}


def predicted(candidate: Candidate) -> int:
    return sum(group_bytes(g, candidate.precision(g.name)) for g in inventory().groups)


def harm(candidate: Candidate) -> float:
    return sum(DAMAGE[name, p.name] for name, p in candidate.precisions.items())


@pytest.mark.parametrize(
    "name",
    ["fp16", "w8a8", "w8a8-tensor", "w8a16", "w8", "w8-channel", "w4", "w4-block64-asymmetric",
     "w4-channel", "w2", "w2-tensor-asymmetric", "w1"],
)  # fmt: skip
def test_a_groups_bytes_are_what_its_file_grows_by(name: str) -> None:
    graph, precision = quantizable("tiny"), Precision.parse(name)
    group = next(g for g in build_inventory(tiny_source()).groups if g.name == "hidden")
    grown = len(graph.emit({"hidden": precision})) - len(graph.emit({}))
    expected = group_bytes(group, precision) - group_bytes(group, FP32)
    assert grown == pytest.approx(expected, abs=2000)  # names and nodes
    assert abs(expected) > 2000


def test_the_ladder_of_sizes_falls_to_the_smallest_candidate() -> None:
    found = planner.size_ladder(space(), inventory(), DAMAGE)
    sizes = [predicted(c) for c in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == min(predicted(c) for c in _all())
    assert len(found) > 2


def test_no_candidate_of_the_size_hurts_less_than_the_ladders() -> None:
    for step in planner.size_ladder(space(), inventory(), DAMAGE):
        rivals = [c for c in _all() if predicted(c) <= predicted(step)]
        assert harm(step) == pytest.approx(min(harm(c) for c in rivals))


def test_a_choice_of_unknown_damage_is_left_out() -> None:
    known = {key: value for key, value in DAMAGE.items() if key[0] == "head"}
    found = planner.size_ladder(space(), inventory(), known)
    assert {name for c in found for name in c.precisions} == {"head"}
    assert planner.size_ladder(space(), inventory(), {}) == []


def test_size_proposals_come_only_where_size_counts_and_say_who_had_them() -> None:
    def named(*beside: str) -> dict[str, str]:
        proposals = Proposals(
            space=space(), inventory=inventory(), bases=[], damage=DAMAGE, seed=0, beside=beside
        )
        return {p.candidate.digest: p.proposed_by for p in proposals.warm_start([])}

    without, with_size = named(), named("size")
    assert set(without.values()) == {"sensitivity"}
    assert set(with_size.values()) == {"sensitivity", "size"}
    assert without.keys() < with_size.keys()


def test_the_sampler_has_a_third_objective_where_size_counts() -> None:
    sampler = Sampler(encoding=Encoding(space=space(), bases=({},)), seed=0, beside=("size",))
    trials = [
        trial(n, 2.0, 0.9, candidate=c, artifact_size_bytes=predicted(c) if n else None)
        for n, c in enumerate(itertools.islice(_all(), 6))
    ]
    study = sampler.study(trials)
    assert [s.name for s in study.directions] == ["MINIMIZE"] * 3
    assert [t.values[2] for t in study.trials] == [t.artifact_size_bytes for t in trials[1:]]
    assert len(sampler.propose(trials, 3, is_unwanted=lambda c: False)) == 3


def _all() -> list[Candidate]:
    """Every unpruned candidate."""
    names = list(space().precisions)
    return [
        Candidate(precisions=dict(zip(names, picked, strict=True)))
        for picked in itertools.product(*space().precisions.values())
    ]
