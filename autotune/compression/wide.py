"""Where 16-bit data begins and ends in a graph, given the precision of each layer.

Owns the decision for float16 and for 16-bit activations, beside the 8-bit one of
`placement.py`; `graph_writer.py` writes both down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from autotune.compression.graph import GraphView
from autotune.compression.operators import SAME_SCALE, WeightedNode, clip_bounds
from autotune.compression.placement import Placement
from search_spaces import Precision

# Between float16 layers these stay float16: their result is no worse than a layer's own.
_HALF_OPERATORS = SAME_SCALE | {
    "Add", "AveragePool", "Clip", "Concat", "Gelu", "GlobalAveragePool", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid",
}  # fmt: skip
_QUANTIZED_BY_THE_RUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm"})
_TRANSPARENT_TO_Q = SAME_SCALE | {"Relu", "Clip"}


@dataclass(slots=True)
class WidePlacement:
    """The decision for one candidate.

    `half` names the nodes that compute in float16; `rounded` the tensors that are rounded to
    16-bit codes where they are made; `guarded` the float nodes between codes, at least one
    side of which is 16-bit.
    """

    half: set[str] = field(default_factory=set)
    rounded: set[str] = field(default_factory=set)
    guarded: set[str] = field(default_factory=set)


def place_wide(
    view: GraphView,
    layers: Mapping[str, WeightedNode],
    chosen: Mapping[str, Precision],
    placement: Placement,
) -> WidePlacement:
    """Decide for every node; layers that `chosen` does not name are FP32."""
    wide = WidePlacement()
    coded = {name for name, p in chosen.items() if p.activation_bits == 16 and not p.is_half}
    halves = {name for name, p in chosen.items() if p.is_half}
    if halves:
        _place_half(view, halves, placement, wide)
    for name in coded:
        wide.rounded.add(_behind_bounds(view, layers[name].biased_output))
    if coded:
        _guard(view, coded, placement, wide)
    return wide


def _place_half(
    view: GraphView, halves: set[str], placement: Placement, wide: WidePlacement
) -> None:
    made: set[str] = set()
    for node in view.nodes:
        inputs = view.data_inputs(node)
        follows = (
            node.op_type in _HALF_OPERATORS
            and node.name not in placement.int8 | placement.absorbed.keys()
            and len(node.output) == 1
            and bool(inputs)
            and made.issuperset(inputs)
        )
        if node.name in halves or follows:
            wide.half.add(node.name)
            made.update(node.output)


def _behind_bounds(view: GraphView, tensor: str) -> str:
    """The tensor, or the one behind a Relu or Clip that alone takes it."""
    taker = view.only_consumer(tensor)
    if taker is not None and clip_bounds(view, taker) is not None:
        return str(taker.output[0])
    return tensor


def _guard(view: GraphView, coded: set[str], placement: Placement, wide: WidePlacement) -> None:
    """Find the layers that onnxruntime's WeightBiasQuantization would quantize on its own."""
    for node in view.nodes:
        if (
            node.op_type in _QUANTIZED_BY_THE_RUNTIME
            and node.name not in coded | placement.int8 | wide.half
            and (node.input[0] in placement.stored or node.input[0] in wide.rounded)
            and _reaches_codes(view, coded | placement.int8, node.output[0])
        ):
            wide.guarded.add(node.name)


def _reaches_codes(view: GraphView, takers: set[str], tensor: str) -> bool:
    return any(
        node.name in takers or _passes(view, takers, node)
        for node in view.consumers.get(tensor, [])
    )


def _passes(view: GraphView, takers: set[str], node: onnx.NodeProto) -> bool:
    return node.op_type in _TRANSPARENT_TO_Q and _reaches_codes(view, takers, node.output[0])
