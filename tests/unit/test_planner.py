"""What is proposed from structure: baselines, bases, a ladder by sensitivity, flips."""

from __future__ import annotations

import random

import pytest

from autotune.search import planner
from search_spaces import FP32, INT8, Candidate
from tests.unit.records import trial
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


def test_uniform_bases_rise() -> None:
    assert planner.uniform_bases(space()) == [
        {"stem": 0.25, "body": 0.25},
        {"stem": 0.5, "body": 0.5},
    ]


def test_a_mixed_base_prunes_the_heavy_group_more() -> None:
    low, high = planner.uniform_bases(space())
    mixed = planner.mixed_base(space(), inventory(), low, high, rng=random.Random(0))
    assert mixed == {"stem": 0.25, "body": 0.5}


def test_the_largest_ratio_and_the_mixture_come_first_among_the_bases() -> None:
    found = planner.bases(space(), inventory(), rng=random.Random(0))
    assert found == [
        {"stem": 0.5, "body": 0.5},
        {"stem": 0.25, "body": 0.5},
        {"stem": 0.25, "body": 0.25},
    ]


PRUNE_DAMAGE = {
    ("stem", 0.25): 0.5,
    ("stem", 0.5): 2.0,
    ("body", 0.25): 0.01,
    ("body", 0.5): 0.02,
}


def test_the_mildest_base_spares_the_group_that_hurts() -> None:
    like = {"stem": 0.5, "body": 0.25}
    found = planner.mildest_base(space(), inventory(), PRUNE_DAMAGE, like=like)
    assert found == {"stem": 0.0, "body": 0.5}


def test_with_prune_damage_the_second_base_is_the_mildest_of_its_saving() -> None:
    mild_stem = {("stem", 0.25): 0.01, ("stem", 0.5): 0.02, ("body", 0.25): 0.5, ("body", 0.5): 2.0}
    plain, guided = (
        planner.bases(space(), inventory(), rng=random.Random(0), damage=known)
        for known in (None, mild_stem)
    )
    assert guided[0] == plain[0]
    mildest = planner.mildest_base(space(), inventory(), mild_stem, like=plain[1])
    assert mildest in guided and plain[1] not in guided


@pytest.mark.parametrize("seed", range(5))
def test_the_mildest_base_saves_as_much_with_no_more_damage(seed: int) -> None:
    rng = random.Random(seed)
    like = {name: rng.choice((0.0, 0.25, 0.5)) for name in ("stem", "body")}
    found = planner.mildest_base(space(), inventory(), PRUNE_DAMAGE, like=like)
    macs = {"stem": 1050, "body": 9000}
    saved = [sum(macs[n] * ratio for n, ratio in base.items()) for base in (found, like)]
    hurt = [sum(PRUNE_DAMAGE.get(c, 0.0) for c in base.items()) for base in (found, like)]
    assert saved[0] >= 0.95 * saved[1]
    assert hurt[0] <= hurt[1]


def test_a_group_of_unknown_damage_keeps_its_ratio() -> None:
    known = {key: kl for key, kl in PRUNE_DAMAGE.items() if key[0] == "body"}
    like = {"stem": 0.25, "body": 0.25}
    assert planner.mildest_base(space(), inventory(), known, like=like) == like


def test_bases_of_earlier_trials_come_first() -> None:
    earlier = trial(0, 1.0, 0.9, candidate=Candidate(prune_ratios={"body": 0.25}))
    found = planner.after_earlier([{"stem": 0.5}, {"body": 0.25}], [earlier])
    assert found == [{"body": 0.25}, {"stem": 0.5}]


def test_the_first_candidates_lie_in_the_space_and_differ() -> None:
    bases = planner.uniform_bases(space())
    found = planner.first_candidates(space(), inventory(), DAMAGE, bases)
    for candidate in found:
        space().require(candidate)
    assert len({c.digest for c in found}) == len(found)
    assert found[0] == space().uniform_int8()
    assert [c.prune_ratios for c in found[1:3]] == bases


def test_one_of_them_takes_the_mildest_weight_only_precision() -> None:
    shapes = planner.by_kind(space(), inventory(), DAMAGE)
    assert any(s.precision("head").name == "w8" for s in shapes)
    assert any(s.precision("dw") == FP32 and s.precision("body") == INT8 for s in shapes)


def test_a_repeated_candidate_is_proposed_once() -> None:
    only = Candidate()
    assert planner._distinct([only, only]) == [only]
