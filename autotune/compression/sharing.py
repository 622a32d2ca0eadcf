"""One scale for everything that 8-bit Concats join.

Owns the decision which tensors share a scale. onnxruntime 1.31's QLinearConcat copies an input
whose scale is the output's, and maps every byte of any other one through a table: 7.6 against
42 us for two tensors of 128 x 28 x 28. The codes are the more exact ones too: rounded once
instead of twice. `placement.py` applies the decision.

The scale is shared, not the precision: in a chain of Concats (DenseNet's dense blocks) every
feature is an input of all later Concats, so one scale spans the block and each of them becomes
a copy, while a layer of it may stay float at the cost of one Q behind it. Tying the precision
would make a block of up to 24 layers one choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx

from autotune.compression.graph import GraphView
from autotune.compression.operators import SAME_SCALE, clip_bounds

Bounds = tuple[float, float]
# Their codes have a fixed meaning, 0 to 1, which no Concat may widen.
_FIXED_RANGE = frozenset({"Sigmoid", "HardSigmoid"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})


def share_concat_scales(
    view: GraphView, int8: set[str], stored: Mapping[str, str], absorbed: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Per tensor with a shared scale, the Concat outputs whose ranges together are its scale.

    An input shares where most of its takers are 8-bit Concats: another taker would read it
    with a wider step than it needs. `int8`, `stored` and `absorbed` are the placement's.
    """
    concats = [node for node in view.nodes if node.op_type == "Concat" and node.name in int8]
    if not concats:
        return {}
    in_concats = _mostly_concatenated(view, concats, stored)
    bounds: dict[str, Bounds | None] = {}
    parent: dict[str, str] = {}
    for node in concats:
        out = node.output[0]
        roots = dict.fromkeys(stored.get(name, name) for name in view.data_inputs(node))
        limits = {root: _bounds(view, root, stored, absorbed, bounds) for root in roots}
        common = limits[next(iter(roots))] if len(set(limits.values())) == 1 else None
        bounds[out] = common
        for root in roots:
            # A range that stands for an activation must end where the activation does.
            is_free = limits[root] is None or limits[root] == common
            if is_free and root in in_concats and not _has_fixed_range(view, root):
                parent[_top(parent, root)] = _top(parent, out)
    return _classes(concats, parent)


def _mostly_concatenated(
    view: GraphView, concats: list[onnx.NodeProto], stored: Mapping[str, str]
) -> set[str]:
    """The tensors more than half of whose takers are among the Concats."""
    names = {node.name for node in concats}
    takers: Counter[str] = Counter()
    joined: Counter[str] = Counter()
    for node in view.nodes:
        if node.op_type in SAME_SCALE and node.output[0] in stored:
            continue  # its output has the same root
        for root in {stored.get(name, name) for name in view.data_inputs(node)}:
            takers[root] += 1
            joined[root] += node.name in names
    return {root for root, n in joined.items() if 2 * n > takers[root]}


def _bounds(
    view: GraphView,
    root: str,
    stored: Mapping[str, str],
    absorbed: Mapping[str, str],
    known: Mapping[str, Bounds | None],
) -> Bounds | None:
    """What an absorbed Relu or Clip confines the tensor to; None where nothing does."""
    if root in known:
        return known[root]
    producer = view.producer.get(root)
    if producer is None:
        return None
    if producer.op_type in _POOLS:
        source = producer.input[0]
        return _bounds(view, stored.get(source, source), stored, absorbed, known)
    return clip_bounds(view, producer) if producer.name in absorbed else None


def _has_fixed_range(view: GraphView, root: str) -> bool:
    producer = view.producer.get(root)
    return producer is not None and producer.op_type in _FIXED_RANGE


def _top(parent: Mapping[str, str], name: str) -> str:
    while name in parent and parent[name] != name:
        name = parent[name]
    return name


def _classes(
    concats: list[onnx.NodeProto], parent: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    outputs: dict[str, list[str]] = {}
    for node in concats:
        outputs.setdefault(_top(parent, node.output[0]), []).append(node.output[0])
    members = dict.fromkeys([*parent, *parent.values()])
    return {name: tuple(outputs[_top(parent, name)]) for name in members}
