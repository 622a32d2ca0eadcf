"""What keeps a trial from its latency budget: the layer groups that cost most, and how much.

Owns that one question. Which trial comes nearest to an impossible budget is `front.py`'s; what
another precision would save in a group `explanation.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.api_types import BlockingGroup
from autotune.limits import ms_text
from autotune.search.front import latency_of, profile_of
from search_spaces import LayerInventory
from storage.records import TrialRecord

_NAMED = 5
"""Groups named in a sentence; the answer has all of them."""


def blocking_groups(
    trial: TrialRecord, inventory: LayerInventory, *, excess: float
) -> list[BlockingGroup]:
    """The layer groups that hold the trial's latency up, the costliest first.

    As many as must cost nothing for the trial to be within its budget; `excess` is by what
    fraction of the budget it is past it. By the device's own profile; without one weighed by
    multiply-accumulates times the planned bits of weights and activations, scaled by what
    pruning kept.
    """
    measured = profile_of(trial)
    if measured is None:
        costs, total = _work(trial, inventory), 0.0
    else:
        costs, total = measured.group_ns(), sum(measured.other_ns().values())
    total = total + sum(costs.values()) or 1.0
    latency = latency_of(trial)
    # Not the latency itself: of several devices the worst one's stands in the first one's units.
    latency_ns = None if latency is None else latency.ratio * latency.reference_latency_ns
    found: list[BlockingGroup] = []
    left = excess / (1.0 + excess)
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        if found and left <= 0:
            break
        share = costs[name] / total
        left -= share
        found.append(
            BlockingGroup(
                group=name,
                cost_ns=None if latency_ns is None else share * latency_ns,
                share=share,
                is_profiled=measured is not None,
            )
        )
    return found


def in_words(groups: Sequence[BlockingGroup]) -> str:
    """The groups with what each costs, the first ones by name; empty without any."""
    if not groups:
        return ""
    named = ", ".join(_named(group) for group in groups[:_NAMED])
    more = f" and {len(groups) - _NAMED} more" if len(groups) > _NAMED else ""
    guess = "" if groups[0].is_profiled else ", by the work planned for each, for want of a profile"
    return f"the groups that hold it back: {named}{more}{guess}"


def _named(group: BlockingGroup) -> str:
    if group.cost_ns is None or group.share is None:
        return group.group
    return f"{group.group} ({ms_text(group.cost_ns)}, {group.share:.0%})"


def _work(trial: TrialRecord, inventory: LayerInventory) -> dict[str, float]:
    return {
        group.name: group.macs
        * max(
            trial.candidate.precision(group.name).weight_bits,
            trial.candidate.precision(group.name).activation_bits,
        )
        / 32
        * _kept(trial, [layer.name for layer in group.layers], inventory)
        for group in inventory.groups
    }


def _kept(trial: TrialRecord, layers: Sequence[str], inventory: LayerInventory) -> float:
    ratios = [
        trial.candidate.prune_ratio(group.name)
        for group in inventory.prunable_groups
        if set(group.layers) & set(layers)
    ]
    return 1.0 - max(ratios, default=0.0)
