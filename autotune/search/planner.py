"""What the search proposes from structure, before and beside Optuna.

Owns the baselines and the first candidates that sensitivity suggests, on the pruned bases that
`pruned_bases.py` had made. What to try once trials are there is `landscape.py`'s. Measures
nothing; the runner decides how many are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from autotune.search.sizes import group_bytes
from search_spaces import (
    FP16,
    FP32,
    INT8,
    Candidate,
    LayerInventory,
    LayerKind,
    Precision,
    SearchSpace,
)

_SIZE_BOUNDS = 6
"""Steps of the ladder of sizes: as many as the ladder by sensitivity has on some 60 groups."""
_SMALLER_IS_BETTER = 1e-6
"""Weight of the size beside the damage, both as shares of their sums."""
_GAP, _TIME_LIMIT_S = 1e-4, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A candidate and who had the idea.

    `gain` is the hypervolume, ratio to FP32 times accuracy drop, that the fitted models expect
    of it; None where nothing was predicted.
    """

    candidate: Candidate
    proposed_by: str
    gain: float | None = None


def baselines(space: SearchSpace) -> list[Proposal]:
    """FP32 and uniform INT8, on every runtime option; what any result must beat.

    On the first option also what else is usual, where it is offered everywhere: FP16, and 8-bit
    weights alone.
    """
    candidates = [space.fp32(runtime) for runtime in space.runtimes]
    candidates += [space.uniform_int8(runtime) for runtime in space.runtimes]
    reducible = [set(offered) - {FP32} for offered in space.precisions.values() if len(offered) > 1]
    usual = (FP16, Precision(8, 32))
    candidates += [
        Candidate(
            precisions={g: p for g, offered in space.precisions.items() if p in offered},
            runtime=space.runtimes[0],
        )
        for p in usual
        if reducible and all(p in offered for offered in reducible)
    ]
    return [Proposal(candidate=c, proposed_by="baseline") for c in _distinct(candidates)]


def first_candidates(
    space: SearchSpace,
    inventory: LayerInventory,
    damage: Mapping[tuple[str, str], float],
    bases: Sequence[Mapping[str, float]],
) -> list[Candidate]:
    """The warm start, most promising first.

    `damage` is the sensitivity: mean KL to FP32 in nats when only that (group, precision) is
    quantized; larger is worse. Unpruned and on every base there is a ladder: all INT8, then
    the most sensitive 1, 2, 4, 8, ... groups left in FP32; on a base all FP32 comes second, which
    is faster than INT8 where few channels are left. Between the steps come mixtures by layer
    kind, which beat uniform INT8 where small or depthwise layers are slower in it.
    """
    steps = ladder(space, damage)
    on_base = [steps[0], space.fp32(), *steps[1:]]
    ladders = [steps, *(_on_base(on_base, base) for base in bases)]
    shapes = by_kind(space, inventory, damage)
    interleaved = [c for row in zip_longest(*ladders, shapes) for c in row if c is not None]
    runtimes = space.runtimes
    return _distinct(
        [
            replace(candidate, runtime=runtimes[index % len(runtimes)])
            for index, candidate in enumerate(interleaved)
        ]
    )


def ladder(space: SearchSpace, damage: Mapping[tuple[str, str], float]) -> list[Candidate]:
    """Uniform INT8 with the 0, 1, 2, 4, 8, ... most sensitive groups left in FP32.

    Stops at half of the groups: past that little is quantized at all.
    """
    uniform = space.uniform_int8()
    ranked = sorted(uniform.precisions, key=lambda g: (-damage.get((g, INT8.name), 0.0), g))
    steps = [0]
    while (step := max(1, steps[-1] * 2)) <= len(ranked) // 2:
        steps.append(step)
    return [_leave_float(uniform, ranked[:step]) for step in steps]


def size_ladder(
    space: SearchSpace,
    inventory: LayerInventory,
    damage: Mapping[tuple[str, str], float],
    *,
    within: float | None = None,
) -> list[Candidate]:
    """For falling bounds on the file's size the candidate that is expected to hurt least.

    An integer program per bound: each group takes one of its precisions, the sum of bytes
    (`sizes.py`) stays within the bound, the sum of damages (mean KL in nats, as if they added
    up) is least. The bounds lie evenly on a logarithmic scale between FP32's size and the
    smallest there is, which is the last; where the weights must stay `within` so many bytes,
    that is the first. Choices without a known damage are left out.
    """
    groups = {group.name: group for group in inventory.groups}
    choices = [
        (name, precision, damage.get((name, precision.name), 0.0))
        for name, offered in space.precisions.items()
        for precision in offered
        if precision == FP32 or (name, precision.name) in damage
    ]
    sizes = [group_bytes(groups[name], precision) for name, precision, _ in choices]
    by_group = {name: [i for i, c in enumerate(choices) if c[0] == name] for name in groups}
    largest = sum(max(sizes[i] for i in held) for held in by_group.values() if held)
    least = sum(min(sizes[i] for i in held) for held in by_group.values() if held)
    if least == largest:
        return []
    bounds = np.geomspace(largest, least, _SIZE_BOUNDS + 1)[1:].round()
    if within is not None and within < largest:
        bounds = np.array([max(within, least), *bounds[bounds < within]])
    chosen = [
        _least_damage([cost for *_, cost in choices], sizes, list(by_group.values()), bound)
        for bound in bounds
    ]
    return _distinct(
        [
            Candidate(
                precisions={choices[i][0]: choices[i][1] for i in picked},
                runtime=space.runtimes[0],
            )
            for picked in chosen
            if picked
        ]
    )


def _least_damage(
    costs: Sequence[float], sizes: Sequence[int], groups: Sequence[Sequence[int]], bound: float
) -> list[int]:
    """The choices, one per group, of the multiple-choice knapsack problem's solution.

    Of choices that hurt equally the smaller one is taken.
    """
    one_each = lil_array((len(groups), len(costs)))
    for row, held in enumerate(groups):
        one_each[row, list(held)] = 1
    weight = np.array(sizes, dtype=float)
    total = float(sum(costs)) or 1.0
    found = milp(
        np.array(costs) / total + _SMALLER_IS_BETTER * weight / weight.sum(),
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each.tocsr(), 1, 1),
            LinearConstraint(weight / weight.sum(), -np.inf, bound / weight.sum()),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _TIME_LIMIT_S},
    )
    return [] if found.x is None else [i for i, taken in enumerate(found.x) if taken > 0.5]


def by_kind(
    space: SearchSpace,
    inventory: LayerInventory,
    damage: Mapping[tuple[str, str], float],
) -> list[Candidate]:
    """Mixtures by layer kind: weight-only where it is mild, no depthwise, heavy groups only."""
    uniform = space.uniform_int8()
    groups = {group.name: group for group in inventory.groups}
    depthwise = [
        name
        for name in uniform.precisions
        if all(layer.kind is LayerKind.DEPTHWISE_CONV for layer in groups[name].layers)
    ]
    by_macs = sorted(uniform.precisions, key=lambda name: groups[name].macs)
    light = by_macs[: len(by_macs) // 2]
    shapes = [
        _leave_float(uniform, depthwise),
        _leave_float(uniform, light),
        _weight_only(space, uniform, damage),
    ]
    return [shape for shape in _distinct(shapes) if shape != uniform]


def _leave_float(candidate: Candidate, groups: Sequence[str]) -> Candidate:
    return replace(candidate, precisions={**candidate.precisions, **dict.fromkeys(groups, FP32)})


def _weight_only(
    space: SearchSpace, uniform: Candidate, damage: Mapping[tuple[str, str], float]
) -> Candidate:
    """Uniform INT8, with the mildest weight-only precision where one is offered."""
    changed = dict(uniform.precisions)
    for name, choices in space.precisions.items():
        options = [p for p in choices if p.is_weight_only]
        if options:
            changed[name] = min(options, key=lambda p: (damage.get((name, p.name), 0.0), p))
    return replace(uniform, precisions=changed)


def _on_base(candidates: Sequence[Candidate], base: Mapping[str, float]) -> list[Candidate]:
    return [replace(candidate, prune_ratios=base) for candidate in candidates]


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    return list({candidate.digest: candidate for candidate in candidates}.values())
