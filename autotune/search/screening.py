"""Which sensitivities are worth measuring, and an estimate for the others.

Owns the rules; `sensitivity.py` runs them on the workers. A cheap figure comes first: the
noise at a group's own output for a precision, the share of weights removed for a prune ratio.

**Precisions.** To second order the divergence of the outputs is proportional to the noise
power at the group (KL(p, p + d) is quadratic in d): KL = gain * 10^(-SQNR / 10). A gain
belongs to its group, because all its precisions put their noise into the same layers behind
it. So a group's first measurement bounds its other precisions, and the gains of the groups
seen bound those not seen. An entry matters unless that bound lies below what it could change:
`NEGLIGIBLE_KL`, or `NEGLIGIBLE_SHARE` of the worst entry of its precision.

**Prune ratios** cost a pruned model each. They go breadth first: the middle ratio of every
group, those that save most first, then the outer ratios, until the time is spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from search_spaces import LayerInventory
from storage.sensitivity import Sensitivity

NEGLIGIBLE_KL = 1e-6
"""Nats. By Pinsker's inequality a class probability moves by sqrt(KL / 2) at most: 0.07 %."""

NEGLIGIBLE_SHARE = 0.01
"""Of the worst entry of the same precision: a hundred such groups weigh as much as that one,
so leaving them in or out does not change which groups are worth freeing first."""

OWN_MARGIN = 4.0
"""How much larger than a group's measured gain its gain at another precision may be: on
the classifiers of resnet18 and mobilenet_v2 (digits, 64x64) w4, w8 and w8a8 agree within 1.4
and 2.2; other precisions were not compared."""

FOREIGN_MARGIN = 2.0
"""The same for the largest gain of other groups, `LEAST_SEEN` or more of them. A choice, not a
bound: a group whose gain is larger by more than this may be left with an estimate."""

LEAST_SEEN = 8

LINEAR_DB = 10.0
"""Below this SQNR the noise is a tenth of the signal or more and the law no longer holds, so
such an entry is measured, and is no anchor for others while there is a better one."""


def next_precisions(entries: Iterable[Sensitivity]) -> list[Sensitivity]:
    """The entries to measure now; empty when all that matter are measured.

    First one precision per group for the noisiest quarter of the groups (`LEAST_SEEN` at
    least), then for each other group that may matter, then the remaining precisions. Entries
    without an SQNR are left out.
    """
    known = [e for e in entries if e.precision is not None and e.sqnr_db is not None]
    groups = _by_group(known)
    anchors = {g: _anchor(own) for g, own in groups.items()}
    fresh = [a for g, a in anchors.items() if not any(e.is_measured for e in groups[g])]
    seen = len(groups) - len(fresh)
    wanted = min(len(groups), max(LEAST_SEEN, math.ceil(len(groups) / 4)))
    if seen < wanted:
        return sorted(fresh, key=lambda e: e.sqnr_db or 0.0)[: wanted - seen]
    gains, floors = _gains(known), _floors(known)
    most = max((max(own) for own in gains.values()), default=0.0)

    def matters(entry: Sensitivity) -> bool:
        own = gains.get(entry.group)
        bound = OWN_MARGIN * max(own) if own else FOREIGN_MARGIN * most
        is_linear = (entry.sqnr_db or 0.0) >= LINEAR_DB
        return not is_linear or _noise(entry) * bound >= floors.get(
            entry.precision or "", NEGLIGIBLE_KL
        )

    due = [anchor for anchor in fresh if matters(anchor)]
    return due or [e for e in known if not e.is_measured and matters(e)]


def estimated_precisions(entries: Iterable[Sensitivity]) -> list[Sensitivity]:
    """An estimate for each entry with an SQNR that was not measured: gain times noise.

    The gain is the group's own (geometric mean of its measured precisions), else the median
    over the groups. Nothing without a single measured entry.
    """
    known = [e for e in entries if e.precision is not None and e.sqnr_db is not None]
    gains = {group: _geometric_mean(own) for group, own in _gains(known).items()}
    if not gains:
        return []
    usual = median(gains.values())
    return [
        replace(e, mean_kl=gains.get(e.group, usual) * _noise(e), is_estimate=True)
        for e in known
        if not e.is_measured
    ]


def prune_order(
    entries: Iterable[Sensitivity], inventory: LayerInventory
) -> list[tuple[str, float]]:
    """The (group, ratio) pairs that are not measured, the most telling first."""
    macs = pruned_macs(inventory)
    pending = [e for e in entries if e.prune_ratio is not None]
    ratios: dict[str, list[float]] = {}
    for entry in pending:
        ratios.setdefault(entry.group, []).append(entry.prune_ratio or 0.0)

    def rank(entry: Sensitivity) -> tuple[float, float, str]:
        own = sorted(ratios[entry.group])
        ratio = entry.prune_ratio or 0.0
        away = abs(own.index(ratio) - len(own) // 2)
        return away, -macs.get(entry.group, 0.0) * ratio, entry.group

    return [(e.group, e.prune_ratio or 0.0) for e in sorted(pending, key=rank) if not e.is_measured]


def estimated_pruning(entries: Iterable[Sensitivity]) -> list[Sensitivity]:
    """An estimate for each prune ratio that was not measured, from the weights it removes.

    Divergence per removed share, of the group's own measured ratios or the median over the
    groups. Nothing without a measured entry, nor for an entry without a removed share.
    """
    known = [e for e in entries if e.prune_ratio is not None and e.removed_share]
    rates: dict[str, list[float]] = {}
    for entry in known:
        if entry.is_measured and entry.mean_kl:
            rates.setdefault(entry.group, []).append(entry.mean_kl / (entry.removed_share or 1.0))
    if not rates:
        return []
    own = {group: _geometric_mean(values) for group, values in rates.items()}
    usual = median(own.values())
    return [
        replace(e, mean_kl=own.get(e.group, usual) * (e.removed_share or 0.0), is_estimate=True)
        for e in known
        if not e.is_measured
    ]


def pruned_macs(inventory: LayerInventory) -> dict[str, float]:
    """Multiply-accumulates of the layers whose outputs a prunable group removes, by group."""
    macs = {layer.name: layer.macs for group in inventory.groups for layer in group.layers}
    return {
        group.name: float(sum(macs.get(layer, 0) for layer in group.layers))
        for group in inventory.prunable_groups
    }


def _by_group(entries: Sequence[Sensitivity]) -> dict[str, list[Sensitivity]]:
    groups: dict[str, list[Sensitivity]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return groups


def _anchor(own: Sequence[Sensitivity]) -> Sensitivity:
    """The noisiest precision for which the law still holds, so that it bounds the milder ones."""
    linear = [e for e in own if (e.sqnr_db or 0.0) >= LINEAR_DB]
    if linear:
        return min(linear, key=lambda e: (e.sqnr_db or 0.0, e.precision or ""))
    return max(own, key=lambda e: (e.sqnr_db or 0.0, e.precision or ""))


def _noise(entry: Sensitivity) -> float:
    """Noise power over signal power."""
    return 10 ** (-(entry.sqnr_db or 0.0) / 10)


def _gains(entries: Sequence[Sensitivity]) -> dict[str, list[float]]:
    gains: dict[str, list[float]] = {}
    for entry in entries:
        if entry.is_measured:
            # A divergence of 0 is one that float64 cannot resolve.
            gains.setdefault(entry.group, []).append(
                max(entry.mean_kl or 0.0, 1e-18) / _noise(entry)
            )
    return gains


def _floors(entries: Sequence[Sensitivity]) -> Mapping[str, float]:
    """The divergence that does not matter, by precision."""
    worst: dict[str, float] = {}
    for entry in entries:
        if entry.is_measured and entry.precision is not None:
            worst[entry.precision] = max(worst.get(entry.precision, 0.0), entry.mean_kl or 0.0)
    return {name: max(NEGLIGIBLE_KL, NEGLIGIBLE_SHARE * kl) for name, kl in worst.items()}


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))
