"""Which pruned bases are made: the ladder, its rungs, and how it is climbed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from autotune.search.pruned_bases import (
    AT_ONCE,
    Ladder,
    climb,
    earlier,
    mildest_base,
    mixed_base,
    next_levels,
    uniform_bases,
)
from search_spaces import Candidate
from tests.unit.records import trial
from tests.unit.spaces import inventory, space

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
WORTH = 0.03
PRUNE_DAMAGE = {
    ("stem", 0.25): 0.5,
    ("stem", 0.5): 2.0,
    ("body", 0.25): 0.01,
    ("body", 0.5): 0.02,
}


class Trainer:
    """Makes bases whose accuracy falls with the body's ratio beyond a share that is free."""

    def __init__(self, *, free: float) -> None:
        self.free = free
        self.rounds: list[list[float]] = []

    def __call__(self, bases: Sequence[Mapping[str, float]]) -> list[float | None]:
        self.rounds.append([base["body"] for base in bases])
        return [max(base["body"] - self.free, 0.0) for base in bases]


def climbed(
    trainer: Trainer, *, limit: float | None = 0.01, at_most: int = 8
) -> list[dict[str, float]]:
    ladder = Ladder(space=space(ratios=RATIOS), inventory=inventory())
    return climb(ladder, trainer, limit=limit, at_most=at_most, worth=WORTH)


def test_uniform_bases_rise() -> None:
    assert uniform_bases(space()) == [
        {"stem": 0.25, "body": 0.25},
        {"stem": 0.5, "body": 0.5},
    ]


def test_a_mixed_base_prunes_the_heavy_group_more() -> None:
    low, high = uniform_bases(space())
    mixed = mixed_base(space(), inventory(), low, high, share=0.5)
    assert mixed == {"stem": 0.25, "body": 0.5}


def test_whole_levels_are_the_ratios_offered_and_level_0_is_the_model() -> None:
    ladder = Ladder(space=space(), inventory=inventory())
    assert [ladder.at(level) for level in range(ladder.top + 1)] == [{}, *uniform_bases(space())]


def test_between_two_rungs_known_damage_decides_who_is_pruned_more() -> None:
    hurts = {("stem", 0.25): 0.01, ("stem", 0.5): 0.02, ("body", 0.25): 1.0, ("body", 0.5): 9.0}
    plain, guided = (
        Ladder(space=space(), inventory=inventory(), damage=damage).at(0.5)
        for damage in ({}, hurts)
    )
    assert plain == {"stem": 0.0, "body": 0.25}
    assert guided == {"stem": 0.5, "body": 0.25}


@pytest.mark.parametrize("free", [0.0, 0.125, 0.5, 0.625, 0.875])
def test_the_climb_finds_the_highest_rung_that_keeps_the_accuracy(free: float) -> None:
    trainer = Trainer(free=free)
    found = climbed(trainer)
    assert max((base["body"] for base in found), default=0.0) == free
    assert all(len(together) <= AT_ONCE for together in trainer.rounds)


def test_a_climb_makes_no_more_bases_than_it_may() -> None:
    trainer = Trainer(free=0.4)
    climbed(trainer, at_most=3)
    assert sum(map(len, trainer.rounds)) == 3


def test_the_most_pruned_base_that_keeps_the_accuracy_leads() -> None:
    found = [base["body"] for base in climbed(Trainer(free=0.625))]
    assert found[0] == 0.625
    assert found == sorted(found, reverse=True)


def test_a_base_that_lost_too_much_is_left_out_where_a_limit_is_given() -> None:
    assert climbed(Trainer(free=-1.0)) == []
    assert climbed(Trainer(free=-1.0), limit=None) != []


def test_without_a_limit_what_is_left_goes_to_the_other_rungs() -> None:
    found = climbed(Trainer(free=1.0), limit=None, at_most=7)
    assert sorted(base["body"] for base in found) == list(RATIOS)


def test_bases_that_cannot_be_made_end_the_climb() -> None:
    ladder = Ladder(space=space(), inventory=inventory())
    found = climb(ladder, lambda bases: [None] * len(bases), limit=0.01, at_most=9, worth=WORTH)
    assert found == []


def test_no_further_base_is_begun_without_time() -> None:
    trainer = Trainer(free=0.5)
    ladder = Ladder(space=space(ratios=RATIOS), inventory=inventory())
    climb(ladder, trainer, limit=0.01, at_most=8, worth=WORTH, may_go_on=lambda: not trainer.rounds)
    assert len(trainer.rounds) == 1


@pytest.mark.parametrize("seed", range(20))
def test_every_next_level_is_new_and_the_search_for_them_ends(seed: int) -> None:
    rng = random.Random(seed)
    top, drops = rng.randint(1, 9), {}
    for _ in range(40):
        levels = next_levels(top, drops, limit=0.01, n=rng.randint(1, 3))
        assert len({*levels}) == len(levels)
        assert not {*levels} & {*drops}
        assert all(0 < level <= top for level in levels)
        if not levels:
            break
        drops |= {level: rng.choice((0.0, 0.02, math.inf)) for level in levels}
    assert not levels


def test_the_mildest_base_spares_the_group_that_hurts() -> None:
    like = {"stem": 0.5, "body": 0.25}
    found = mildest_base(space(), inventory(), PRUNE_DAMAGE, like=like)
    assert found == {"stem": 0.0, "body": 0.5}


@pytest.mark.parametrize("seed", range(5))
def test_the_mildest_base_saves_as_much_with_no_more_damage(seed: int) -> None:
    rng = random.Random(seed)
    like = {name: rng.choice((0.0, 0.25, 0.5)) for name in ("stem", "body")}
    found = mildest_base(space(), inventory(), PRUNE_DAMAGE, like=like)
    macs = {"stem": 1050, "body": 9000}
    saved = [sum(macs[n] * ratio for n, ratio in base.items()) for base in (found, like)]
    hurt = [sum(PRUNE_DAMAGE.get(c, 0.0) for c in base.items()) for base in (found, like)]
    assert saved[0] >= 0.95 * saved[1]
    assert hurt[0] <= hurt[1]


def test_a_group_of_unknown_damage_keeps_its_ratio() -> None:
    known = {key: kl for key, kl in PRUNE_DAMAGE.items() if key[0] == "body"}
    like = {"stem": 0.25, "body": 0.25}
    assert mildest_base(space(), inventory(), known, like=like) == like


def test_bases_of_earlier_trials_are_kept() -> None:
    ratios = ({"body": 0.25}, {"stem": 0.5}, {})
    trials = [
        trial(number, 1.0, 0.9, candidate=Candidate(prune_ratios=base))
        for number, base in enumerate(ratios)
    ]
    assert earlier(trials, but=[{"stem": 0.5}]) == [{"body": 0.25}]
