"""One group pruned alone: its outputs without an export, and a cheap guess of the damage.

Owns the step from prune ratios to outputs for a source of either kind: a torch module is
pruned and run as a module, because an export costs more than all the rest; an ONNX graph as
a graph. Which channels go is the compressor's choice, the same as in a base. Recovery is left
out on purpose: the bases that are chosen by these figures get theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autotune.compression.channels import kept_channels
from autotune.compression.compressor import Compressor
from autotune.compression.graph import GraphView, model_bytes
from autotune.compression.session import Session
from search_spaces import PrunableGroup

REESTIMATION_SAMPLES = 128
"""Two batches of BatchNorm re-estimation: its statistics average over all pixels too."""


def pruned_outputs(
    compressor: Compressor, ratios: Mapping[str, float], *, calibration: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """The outputs over `x`, float32 of shape `(n, classes)`, of the model pruned by `ratios`.

    Statistics are re-estimated on `calibration`; nothing is trained. Without ratios the
    source itself answers.

    Raises:
        CompressionError: the source cannot be pruned by them.
    """
    if compressor.source.module is None:
        return _graph_outputs(compressor, ratios, calibration[:REESTIMATION_SAMPLES], x)
    from autotune.compression.pruning import prune_module
    from autotune.compression.recovery import logits, reestimate_batch_norm

    if not ratios:
        return logits(compressor.source.module, x)
    pruned = prune_module(
        compressor.source.module,
        compressor.source.input_shape,
        ratios,
        round_to=compressor.channel_multiple,
        scores=compressor.channel_scores(),
    )
    reestimate_batch_norm(pruned, calibration[:REESTIMATION_SAMPLES])
    return logits(pruned, x)


def removed_share(
    view: GraphView, group: PrunableGroup, ratio: float, *, round_to: int
) -> float | None:
    """The fraction of the group's squared weights that lies in its smallest channels.

    As many as the ratio removes. Every layer of the group counts the same, its own total
    being 1 (Li et al. 2017, arXiv:1608.08710, rank filters by their norm). None where a
    layer's weights are not found under its name.
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
    kept = kept_channels(group.channels, ratio, round_to=round_to, block=group.block)
    removed = np.sort(shares)[: group.channels - kept]
    return float(removed.sum() / max(shares.sum(), np.finfo(np.float64).tiny))


def _graph_outputs(
    compressor: Compressor, ratios: Mapping[str, float], calibration: np.ndarray, x: np.ndarray
) -> np.ndarray:
    from autotune.compression.onnx_pruning import prune_graph

    source = compressor.source
    graph = source.graph
    if ratios:
        graph = prune_graph(
            graph,
            ratios,
            samples=calibration,
            round_to=compressor.channel_multiple,
            scores=compressor.channel_scores(),
        )
    return Session(model_bytes(graph), what="the pruned graph").answers(x)
