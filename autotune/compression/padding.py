"""Pads that a convolution can do itself.

Owns that one rewriting of the normal form: TensorFlow and others write a Pad in front of a
strided convolution. It has no 8-bit kernel, so it would end the codes in front of the
convolution; as the convolution's own padding it costs nothing in any precision.
"""

from __future__ import annotations

import onnx
from onnx import helper

from autotune.compression.graph import GraphView, attribute

_PADDED = frozenset({"Conv"})


def fold_pads(model: onnx.ModelProto) -> None:
    """Move zero padding of spatial axes into the one convolution that takes it; in place."""
    view = GraphView(model)
    folded = set()
    for node in view.nodes:
        taker = view.only_consumer(node.output[0]) if node.op_type == "Pad" else None
        if taker is None or taker.op_type not in _PADDED or taker.input[0] != node.output[0]:
            continue
        pads = _spatial_zeros(view, node, taker)
        if pads is None:
            continue
        held = attribute(taker, "pads", [0] * len(pads))
        kept = [a for a in taker.attribute if a.name not in ("pads", "auto_pad")]
        del taker.attribute[:]
        taker.attribute.extend(kept)
        summed = [a + b for a, b in zip(held, pads, strict=True)]
        taker.attribute.append(helper.make_attribute("pads", summed))
        taker.input[0] = node.input[0]
        folded.add(node.output[0])
    for index in reversed(range(len(view.nodes))):
        if view.nodes[index].output[0] in folded:
            del model.graph.node[index]


def _spatial_zeros(view: GraphView, node: onnx.NodeProto, conv: onnx.NodeProto) -> list[int] | None:
    """Begins, then ends, of the spatial axes, as a Conv has them; None for any other padding."""
    if attribute(conv, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    if attribute(node, "mode", b"constant") != b"constant":
        return None
    if not all(view.is_constant(name) for name in node.input[1:] if name):
        return None
    if len(node.input) > 2 and node.input[2] and view.array(node.input[2]).any():
        return None
    rank = len(view.initializers[conv.input[1]].dims) if view.is_constant(conv.input[1]) else 0
    amounts = view.array(node.input[1]).tolist()
    axes = list(range(rank))
    if len(node.input) > 3 and node.input[3]:
        axes = [axis % rank for axis in view.array(node.input[3]).tolist()] if rank else []
    if not rank or len(amounts) != 2 * len(axes) or min(amounts) < 0:
        return None
    begins, ends = [0] * rank, [0] * rank
    for axis, begin, end in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        begins[axis], ends[axis] = begin, end
    if any(begins[:2]) or any(ends[:2]):
        return None
    return [*begins[2:], *ends[2:]]
