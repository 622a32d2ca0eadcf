"""One group pruned alone: its outputs without an export, and a cheap guess of the damage.

Owns the step from prune ratios to outputs for a source of either kind: a torch module is
pruned and run as a module, because an export costs more than all the rest. What is coupled
and which channels go is `pruning.py`'s; recovery is left out on purpose, the bases that are
built from these figures get theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from autotune.compression.graph import GraphView
from autotune.compression.source import SourceModel
from autotune.errors import CompressionError
from search_spaces import PrunableGroup

if TYPE_CHECKING:
    from autotune.compression.importance import ChannelScores

REESTIMATION_SAMPLES = 128
"""Two batches of BatchNorm re-estimation: its statistics average over all pixels too."""


def pruned_outputs(
    source: SourceModel,
    ratios: Mapping[str, float],
    *,
    calibration: np.ndarray,
    x: np.ndarray,
    round_to: int = 8,
    scores: ChannelScores | None = None,
) -> np.ndarray:
    """The outputs over `x`, float32 of shape `(n, classes)`, of the model pruned by `ratios`.

    BatchNorm statistics are re-estimated on `calibration`; nothing is trained. Without ratios
    the source itself answers. `round_to` and `scores` are those of `pruning.prune_module`.

    Raises:
        CompressionError: the source cannot be pruned by them.
    """
    from autotune.compression.pruning import prune_module
    from autotune.compression.recovery import logits, reestimate_batch_norm

    if source.module is None:
        raise CompressionError(
            f"prune ratios for {', '.join(ratios)} need a torch module, the source is an ONNX file"
        )
    if not ratios:
        return logits(source.module, x)
    pruned = prune_module(
        source.module, source.input_shape, ratios, round_to=round_to, scores=scores
    )
    reestimate_batch_norm(pruned, calibration[:REESTIMATION_SAMPLES])
    return logits(pruned, x)


def removed_share(view: GraphView, group: PrunableGroup, ratio: float) -> float | None:
    """The fraction of the group's squared weights in its least important channels.

    Every layer of the group counts the same, as its own total is 1 (Li et al. 2017,
    arXiv:1608.08710, rank filters by their norm). None where a layer's weights are not found
    under its name.
    """
    shares = np.zeros(group.channels)
    for layer in group.layers:
        name = f"{layer}.weight"
        if name not in view.initializers:
            return None
        weight = view.array(name)
        axes = [axis for axis, extent in enumerate(weight.shape) if extent == group.channels]
        if not axes:
            return None
        others = tuple(axis for axis in range(weight.ndim) if axis != axes[0])
        norms = np.square(weight, dtype=np.float64).sum(axis=others)
        shares += norms / max(norms.sum(), np.finfo(np.float64).tiny)
    kept_last = np.sort(shares)[: round(ratio * group.channels)]
    return float(kept_last.sum() / max(shares.sum(), np.finfo(np.float64).tiny))
