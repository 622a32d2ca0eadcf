"""The per-layer picture: what became of every layer group, in graph order.

Owns the geometry of the strip and what it shows; the report's template draws it as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autotune.export import figures
from search_spaces import INT8, LayerInventory
from storage.records import JobRecord, TrialRecord

# Nine steps from harmless to harmful: one per half decade of KL between 1e-5 and 1e-1 nats, the
# range in which INT8 groups of ordinary classifiers lie.
SENSITIVITY_STEPS = 9
LEAST_KL = 1e-5
STEPS_PER_DECADE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCell:
    """One layer group in the strip.

    `effective` is None where nobody saw what is executed, the plan of a file that was not built.
    `sensitivity` is a step from 0 (harmless) to 8, None where nothing was measured; `macs_share`
    is the group's share of the model's multiply-accumulates, a fraction from 0 to 1.
    """

    group: str
    planned: str
    effective: str | None
    reason: str | None
    prune_ratio: float | None
    sensitivity: int | None
    sensitivity_kl: float | None
    macs_share: float

    @property
    def differs(self) -> bool:
        """The runtime executes something else than was planned."""
        return self.effective not in (None, self.planned)

    @property
    def shown(self) -> str:
        """What the picture calls the precision."""
        return self.effective or "unknown"


def layer_cells(job: JobRecord, trial: TrialRecord) -> list[LayerCell]:
    """One cell per group of the job's inventory in graph order; empty without an inventory."""
    inventory = job.inventory
    if inventory is None:
        return []
    built = {entry["group"]: entry for entry in figures.group_precisions(trial)}
    kl_by_group = _int8_kl(job)
    ratios = _prune_ratio_by_layer(inventory, trial.candidate.prune_ratios)
    total_macs = sum(group.macs for group in inventory.groups) or 1
    cells = []
    for group in inventory.groups:
        planned = trial.candidate.precision(group.name).name
        entry = built.get(group.name, {})
        kl = kl_by_group.get(group.name)
        names = {group.name, *(layer.name for layer in group.layers)}
        cells.append(
            LayerCell(
                group=group.name,
                planned=entry.get("planned", planned),
                effective=entry.get("effective", planned),
                reason=entry.get("reason"),
                prune_ratio=max((ratios[name] for name in names if name in ratios), default=None),
                sensitivity=sensitivity_step(kl),
                sensitivity_kl=kl,
                macs_share=group.macs / total_macs,
            )
        )
    return cells


def sensitivity_step(mean_kl: float | None) -> int | None:
    """The colour step of a KL divergence in nats; None where it is unknown or not finite.

    >>> sensitivity_step(0.0), sensitivity_step(1e-4), sensitivity_step(5.0)
    (0, 2, 8)
    """
    if mean_kl is None or not math.isfinite(mean_kl):
        return None
    if mean_kl <= LEAST_KL:
        return 0
    step = STEPS_PER_DECADE * math.log10(mean_kl / LEAST_KL)
    return min(int(step + 1e-9), SENSITIVITY_STEPS - 1)


def _int8_kl(job: JobRecord) -> Mapping[str, float]:
    return {
        entry.group: entry.mean_kl
        for entry in job.sensitivity
        if entry.precision == INT8.name and entry.mean_kl is not None
    }


def _prune_ratio_by_layer(
    inventory: LayerInventory, ratios: Mapping[str, float]
) -> Mapping[str, float]:
    """Ratio by layer name, 0.0 where a prunable layer was left whole; others are absent."""
    by_layer: dict[str, float] = {}
    for group in inventory.prunable_groups:
        for layer in group.layers:
            by_layer[layer] = max(ratios.get(group.name, 0.0), by_layer.get(layer, 0.0))
    return by_layer
