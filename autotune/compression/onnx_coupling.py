"""Which channels of an ONNX graph must be removed together: the groups that pruning offers.

Owns the grouping and the reasons why a layer is in no group. How operators pass channels on
is `onnx_channels`' knowledge. Refuses to touch the graph: choosing and slicing are
`onnx_pruning`'s work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from autotune.compression.graph import GraphView
from autotune.compression.onnx_channels import ChannelAxis, ChannelLayer, ChannelTrace
from search_spaces.layers import PrunableGroup

_GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "ReduceMax", "ReduceMean"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """A prunable group and its labels, in the order of the first layer's channels.

    Each label stands for a block of `group.block` channels. All layers of the group hold
    each of the labels equally often, and no other group holds any of them.
    """

    group: PrunableGroup
    labels: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelCouplings:
    """The whole answer: the groups in graph order, and what carries their labels.

    `left_out` says of each layer outside the groups why (layer, reason).
    `tensors` has the channel axis of every computed tensor that was followed; `constants` the
    labels along each axis of a node's constant input, by node name and position of the input
    (an initializer with several readers is none of their coupling: each can have its own).
    `idle` names the nodes that only make shapes for a Reshape whose result is known;
    `reshapes` names those Reshapes.
    """

    couplings: tuple[Coupling, ...]
    left_out: tuple[tuple[str, str], ...]
    tensors: Mapping[str, ChannelAxis]
    constants: Mapping[tuple[str, int], Mapping[int, np.ndarray]]
    n_labels: int
    idle: frozenset[str]
    reshapes: frozenset[str]


def couple_channels(view: GraphView, *, min_channels: int) -> ChannelCouplings:
    """Follow every channel of the graph from the layer that makes it to all that read it.

    A group is named after its first convolution or matrix product in graph order. Grouped
    convolutions lose whole groups. Left out, each with its reason: the model's outputs,
    groups of fewer than `min_channels`, channels that reach an operator without a rule (so
    attention and normalizations over the channels), and squeeze convolutions alone behind a
    global pool. `view` is of a graph in normal form: static shapes, unique node names.
    """
    trace = ChannelTrace(view)
    trace.follow()
    roots = trace.labels.roots()
    found = list(_examine(trace, roots, min_channels))
    return ChannelCouplings(
        couplings=tuple(one for one in found if isinstance(one, Coupling)),
        left_out=tuple(entry for one in found if isinstance(one, list) for entry in one),
        tensors={
            name: ChannelAxis(axis=track.axis, labels=roots[track.labels])
            for name, track in trace.tensors.items()
        },
        constants={
            place: {axis: roots[labels] for axis, labels in axes.items()}
            for place, axes in trace.constants.items()
        },
        n_labels=len(trace.labels),
        idle=frozenset(trace.idle),
        reshapes=frozenset(trace.reshapes),
    )


def _examine(
    trace: ChannelTrace, roots: np.ndarray, min_channels: int
) -> Iterator[Coupling | list[tuple[str, str]]]:
    """Each set of layers that lose channels together, or why they do not."""
    owners: dict[int, set[str]] = {}
    for layer in trace.layers:
        for label in roots[layer.labels].tolist():
            owners.setdefault(label, set()).add(layer.node.name)
    frozen = trace.labels.frozen()
    seen: set[str] = set()
    for layer in trace.layers:
        if layer.node.name in seen:
            continue
        members = set().union(*(owners[label] for label in roots[layer.labels].tolist()))
        tied = [m for m in trace.layers if m.node.name in members]
        names = tuple(m.node.name for m in tied)
        obstacle = _obstacle(trace.view, tied, roots, frozen, min_channels)
        if obstacle is not None:
            yield [(name, obstacle) for name in names if name not in seen]
            seen |= members
            continue
        seen |= members
        labels = np.array(list(dict.fromkeys(roots[layer.labels].tolist())))
        group = PrunableGroup(
            name=names[0],
            channels=len(layer.labels),
            layers=names,
            block=len(layer.labels) // len(labels),
        )
        yield Coupling(group=group, labels=labels)


def _obstacle(
    view: GraphView,
    layers: list[ChannelLayer],
    roots: np.ndarray,
    frozen: Mapping[int, str],
    min_channels: int,
) -> str | None:
    """Why the layers are not offered as a group, None where they are."""
    channels = [Counter(roots[layer.labels].tolist()) for layer in layers]
    for label in sum(channels, Counter()):
        if label in frozen:
            return frozen[label]
    if len(set(channels[0].values())) > 1 or any(c != channels[0] for c in channels):
        # a layer that holds only a part of the group could lose all it has
        return "its channels are only a part of what has to be removed with them"
    block = channels[0].most_common(1)[0][1]
    total = channels[0].total()
    if total < max(min_channels, 2 * block):
        return f"it has only {total} channels"
    if not layers[0].is_root:
        return "it carries channels that no layer of the model makes"
    if _is_squeeze(view, layers):
        return "it squeezes a global average pool, whose 1x1 maps cost next to nothing"
    return None


def _is_squeeze(view: GraphView, layers: list[ChannelLayer]) -> bool:
    """A convolution alone in its group on 1x1 maps: its channels cost next to nothing."""
    maker = view.producer.get(layers[0].node.input[0])
    pooled = maker is not None and maker.op_type in _GLOBAL_POOLS
    return len(layers) == 1 and layers[0].node.op_type == "Conv" and pooled
