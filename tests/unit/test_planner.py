"""What is proposed from structure: baselines, a ladder by sensitivity, mixtures by kind."""

from __future__ import annotations

from dataclasses import replace

from autotune.search import planner
from search_spaces import FP32, INT8, Candidate
from tests.unit.spaces import inventory, space

DAMAGE = {
    ("stem", "w8a8"): 0.5,
    ("dw", "w8a8"): 0.1,
    ("body", "w8a8"): 0.01,
    ("head", "w8a8"): 0.02,
    ("head", "w8"): 0.001,
    ("head", "w4"): 0.03,
}


def test_the_baselines_are_fp32_first_then_uniform_int8_on_every_runtime() -> None:
    built = space(threads=(1, 2))
    found = [p.candidate for p in planner.baselines(built)]
    assert found[0] == built.fp32()
    assert {c.digest for c in found} == {
        c.digest for r in built.runtimes for c in (built.fp32(r), built.uniform_int8(r))
    }


def test_uniform_fp16_and_8_bit_weights_are_baselines_where_they_are_offered_everywhere() -> None:
    from search_spaces import FP16, Precision, SearchSpace

    weights = Precision.parse("w8")
    groups = tuple(
        replace(group, precisions=("fp32", "fp16", "w8a8", "w8")) for group in inventory().groups
    )
    offered = [FP32, FP16, INT8, weights, Precision.parse("w4")]
    everywhere = SearchSpace.build(replace(inventory(), groups=groups), precisions=offered)
    found = [set(p.candidate.precisions.values()) for p in planner.baselines(everywhere)]
    assert found == [set(), {INT8}, {FP16}, {weights}]
    in_some_groups = SearchSpace.build(inventory(), precisions=offered)
    assert len(planner.baselines(in_some_groups)) == 2


def test_a_space_without_int8_has_one_baseline() -> None:
    from search_spaces import SearchSpace

    built = SearchSpace.build(inventory(), precisions=[FP32])
    assert [p.candidate for p in planner.baselines(built)] == [built.fp32()]


def test_the_ladder_frees_the_most_sensitive_groups_first() -> None:
    steps = planner.ladder(space(), DAMAGE)
    assert steps[0] == space().uniform_int8()
    assert [sorted(g for g in space().precisions if s.precision(g) == FP32) for s in steps] == [
        [],
        ["stem"],
        ["dw", "stem"],
    ]


def test_the_first_candidates_lie_in_the_space_and_differ() -> None:
    bases = [space().uniform_prune_ratios(ratio) for ratio in (0.5, 0.25)]
    found = planner.first_candidates(space(), inventory(), DAMAGE, bases)
    for candidate in found:
        space().require(candidate)
    assert len({c.digest for c in found}) == len(found)
    assert found[0] == space().uniform_int8()
    assert [c.prune_ratios for c in found[1:3]] == bases


def test_a_pruned_base_is_tried_in_fp32_right_after_int8() -> None:
    base = space().uniform_prune_ratios(0.5)
    found = planner.first_candidates(space(), inventory(), DAMAGE, [base])
    pruned = [c.precisions for c in found if c.prune_ratios]
    assert pruned[:2] == [space().uniform_int8().precisions, {}]


def test_one_of_them_takes_the_mildest_weight_only_precision() -> None:
    shapes = planner.by_kind(space(), inventory(), DAMAGE)
    assert any(s.precision("head").name == "w8" for s in shapes)
    assert any(s.precision("dw") == FP32 and s.precision("body") == INT8 for s in shapes)


def test_a_repeated_candidate_is_proposed_once() -> None:
    only = Candidate()
    assert planner._distinct([only, only]) == [only]
