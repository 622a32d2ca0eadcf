"""Which pruned versions of the model are trained: a ladder of prune ratios, climbed by accuracy.

Each base costs a recovery training, so that only a few can be made, and how much a model can
lose nobody knows beforehand: on digits resnet18 keeps its accuracy on an eighth of its channels,
other models lose it at half. So the ratios are found by bisection: the rungs are the ratios
offered, everywhere; what the bases made so far have lost says where the next ones lie, first
among the rungs, then between the last that keeps the accuracy and the first that does not.
Training is `autotune.compression`'s; what is tried on the bases is `planner.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotune.errors import DiskFull
from autotune.search.screening import pruned_macs
from autotune.search.workers import Call, CallFailed
from search_spaces import Candidate, LayerInventory, SearchSpace
from storage.records import TrialRecord

AT_ONCE = 2
"""Bases made side by side; a constant, so that the same results lead to the same bases on
machines with more cores."""

FINEST = 0.25
"""Of the way from one rung to the next: closer than that the bases differ by a few channels."""

BASES_SHARE = 0.6
"""Of a job's time budget; no further base is begun once so much of it is spent."""

_SAVING_SHARE = 0.95
"""Of the saving aimed at: the last twentieth would take a group that saves little and hurts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The bases of a space by level: 0 is the unpruned model, whole levels are rungs.

    `damage` is the sensitivity of (prunable group, ratio), mean KL in nats. Between two rungs a
    base saves about that part of what the upper one saves beyond the lower: at the least damage
    where that is known, else the groups that save most take the upper rung's ratio.
    """

    space: SearchSpace
    inventory: LayerInventory
    damage: Mapping[tuple[str, float], float] = field(default_factory=dict)

    @property
    def top(self) -> int:
        """The highest level; 0 where nothing can be pruned."""
        return len(uniform_bases(self.space))

    def at(self, level: float) -> dict[str, float]:
        """The base of a level from 0 to `top`."""
        rungs: list[dict[str, float]] = [{}, *uniform_bases(self.space)]
        low, high = rungs[math.floor(level)], rungs[math.ceil(level)]
        if low is high:
            return low
        mixed = mixed_base(self.space, self.inventory, low, high, share=level - math.floor(level))
        if not self.damage:
            return mixed
        return mildest_base(self.space, self.inventory, self.damage, like=mixed)


def climb(
    ladder: Ladder,
    make: Callable[[Sequence[Mapping[str, float]]], Sequence[float | None]],
    *,
    limit: float | None,
    at_most: int,
    worth: float,
    may_go_on: Callable[[], bool] = lambda: True,
) -> list[dict[str, float]]:
    """The bases made, those that keep the accuracy first, the most pruned of them leading.

    `make` takes up to `AT_ONCE` bases and says what accuracy each lost, as a fraction, None
    where it could not be made. `limit` is the loss that a base may have to be pruned further.
    Where it is None, nobody said what may be lost: the climb keeps to `worth`, and what `at_most`
    leaves goes to the rungs not made, the most pruned ones first. With a limit, a base that
    lost more than both is left out: nothing on it can be an answer.
    """
    bound = worth if limit is None else limit
    drops: dict[float, float] = {}
    made: dict[str, tuple[float, float, dict[str, float]]] = {}
    while len(made) < at_most and may_go_on():
        levels = next_levels(ladder.top, drops, limit=bound, n=min(AT_ONCE, at_most - len(made)))
        if not levels and limit is None:
            levels = [float(n) for n in range(ladder.top, 0, -1) if n not in drops][:AT_ONCE]
        if not levels:
            break
        bases = [ladder.at(level) for level in levels]
        known = [made.get(_digest(base)) for base in bases]
        new = [base for base, found in zip(bases, known, strict=True) if found is None]
        lost = iter(make(new) if new else ())
        for level, base, found in zip(levels, bases, known, strict=True):
            drop = found[1] if found is not None else next(lost)
            drops[level] = math.inf if drop is None else drop
            if drop is not None and found is None:
                made[_digest(base)] = (level, drop, base)
    useful = [m for m in made.values() if limit is None or m[1] <= max(bound, worth)]
    ordered = sorted(useful, key=lambda m: (m[1] > bound, -m[0] if m[1] <= bound else m[0]))
    return [base for *_, base in ordered]


def next_levels(top: int, drops: Mapping[float, float], *, limit: float, n: int) -> list[float]:
    """Up to `n` levels to try, by what those in `drops` lost; empty where it is known enough.

    They cut what lies between the highest level that keeps the limit and the lowest above it
    that does not into `n + 1` parts: whole levels first, then `FINEST` of the way at least.

    >>> next_levels(6, {}, limit=0.01, n=2)
    [2.0, 5.0]
    >>> next_levels(6, {2.0: 0.0, 5.0: 0.04}, limit=0.01, n=2)
    [3.0, 4.0]
    >>> next_levels(6, {2.0: 0.0, 3.0: 0.02, 5.0: 0.04}, limit=0.01, n=1)
    [2.5]
    """
    kept = max((level for level, drop in drops.items() if drop <= limit), default=0.0)
    lost = min((level for level in drops if level > kept), default=None)
    whole = range(math.floor(kept) + 1, top + 1 if lost is None else math.ceil(lost))
    if whole:
        n = min(n, len(whole))
        middles = ((len(whole) + 1) * part / (n + 1) - 1 for part in range(1, n + 1))
        return [float(whole[round(middle)]) for middle in middles]
    if lost is None or (lost - kept) / 2 < FINEST:
        return []
    parts = min(n + 1, math.floor((lost - kept) / FINEST))
    return [kept + (lost - kept) * part / parts for part in range(1, parts)]


def make_bases(
    bases: Sequence[Mapping[str, float]],
    *,
    run: Callable[[Sequence[Call]], Iterable[tuple[int, Any]]],
    notice: Callable[[str], None],
    on_made: Callable[[Mapping[str, Any]], None],
) -> list[float | None]:
    """Train them; what each lost on the search data, None where it could not be made.

    `run` has workers do the calls; `on_made` gets what they say of each base.

    Raises:
        DiskFull: there is no room for one.
    """
    lost: list[float | None] = [None] * len(bases)
    for index, result in run([Call(method="prepare_base", arguments=(base,)) for base in bases]):
        if isinstance(result, CallFailed):
            if isinstance(result.exception, DiskFull):
                raise result.exception
            notice(f"a pruned base could not be made: {result.error}")
        else:
            lost[index] = result["accuracy"]["drop"]
            on_made(result)
    return lost


def mildest_base(
    space: SearchSpace,
    inventory: LayerInventory,
    damage: Mapping[tuple[str, float], float],
    *,
    like: Mapping[str, float],
) -> dict[str, float]:
    """The base that saves about as much as `like` at the least sum of damages, greedily.

    Saved is a group's multiply-accumulates times its ratio; about is `_SAVING_SHARE`. From
    the unpruned model the step with the least further damage per further saving is taken
    until the saving is reached: the greedy solution of the multiple-choice knapsack problem
    (Sinha and Zoltners 1979), at most one step from the best. A group without a known damage
    takes the ratio of `like`.
    """
    macs = pruned_macs(inventory)
    known = {
        name: {0.0: 0.0} | {r: damage[name, r] for r in ratios if (name, r) in damage}
        for name, ratios in space.prune_ratios.items()
    }
    chosen = {n: 0.0 if len(known[n]) > 1 else like.get(n, 0.0) for n in space.prune_ratios}
    goal = _SAVING_SHARE * sum(macs.get(name, 0.0) * ratio for name, ratio in like.items())
    while sum(macs.get(name, 0.0) * ratio for name, ratio in chosen.items()) < goal:
        steps = [
            ((costs[ratio] - costs[now]) / (macs.get(name, 0.0) * (ratio - now)), name, ratio)
            for name, costs in known.items()
            if macs.get(name, 0.0) > 0 and (now := chosen[name]) in costs
            for ratio in costs
            if ratio > now
        ]
        if not steps:
            break
        _, name, ratio = min(steps)
        chosen[name] = ratio
    return chosen


def earlier(
    trials: Sequence[TrialRecord], *, but: Sequence[Mapping[str, float]]
) -> list[dict[str, float]]:
    """The bases that trials already used and `but` has not: what is trained is kept."""
    used = {t.candidate.base_digest: dict(t.candidate.prune_ratios) for t in trials}
    known = {_digest(base) for base in ({}, *but)}
    return [base for digest, base in used.items() if digest not in known]


def uniform_bases(space: SearchSpace) -> list[dict[str, float]]:
    """One set of prune ratios per offered ratio above zero, applied everywhere, rising."""
    ratios = sorted({r for choices in space.prune_ratios.values() for r in choices if r > 0})
    return [space.uniform_prune_ratios(ratio) for ratio in ratios]


def mixed_base(
    space: SearchSpace,
    inventory: LayerInventory,
    low: Mapping[str, float],
    high: Mapping[str, float],
    *,
    share: float,
) -> dict[str, float]:
    """A base between two others: the groups that save most take `high`, the others `low`.

    A group's saving is the multiply-accumulates of its layers; `share` is that of the groups
    which take `high`.
    """
    macs = pruned_macs(inventory)
    heaviest = sorted((n for n in macs if n in space.prune_ratios), key=lambda n: (-macs[n], n))
    chosen = set(heaviest[: round(share * len(heaviest))])
    return {name: (high if name in chosen else low).get(name, 0.0) for name in heaviest}


def _digest(base: Mapping[str, float]) -> str:
    return Candidate(prune_ratios=base).base_digest
