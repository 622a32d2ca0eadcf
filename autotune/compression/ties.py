"""Which layers share a precision: the patterns that tie them, found in the graph.

Owns the patterns; `units.py` makes the groups from them. Residual Adds and Concats tie where
`placement.py` would compute them on codes if every layer were INT8: a float one needs nothing
of its producers. Squeeze-and-excite blocks and attention are found by their shape:

- the two small convolutions of a squeeze-and-excite block work on one value per channel: a
  precision boundary between them costs a kernel call and saves nothing;
- the projections of an attention read the same tensor (Q, K, V, often packed into one matrix)
  or follow it directly (output). Its two products of activations stay float: in ViT-B/16 they
  are 3 % of the work, and Softmax between them has no 8-bit kernel on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from autotune.compression.graph import GraphView
from autotune.compression.operators import (
    ACTIVATIONS,
    ELEMENTWISE,
    FLOAT_ACTIVATIONS,
    SHAPE_KEEPING,
    WeightedNode,
    constant_operand,
    is_residual_add,
    is_swish,
    swish_input,
)
from autotune.compression.placement import Placement
from search_spaces import LayerPattern

_MOVES = frozenset(
    {
        "Cast", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
_SCALES = frozenset({"Add", "Div", "Mul"})
_MEANS = frozenset({"GlobalAveragePool", "ReduceMean"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """Layers that share a precision, and the other nodes of the pattern."""

    pattern: LayerPattern
    layers: tuple[str, ...]
    nodes: tuple[str, ...]


def find_ties(
    view: GraphView, layers: Sequence[WeightedNode], placement: Placement
) -> Iterator[Tie]:
    """Every tie of the graph; `placement` is that of uniform INT8."""
    owners = find_owners(view, layers)
    names = {layer.name for layer in layers}
    for node in view.nodes:
        if node.name in placement.int8 and is_residual_add(view, node):
            made = [owners[name] for name in node.input if name in owners]
            yield _tie(LayerPattern.RESIDUAL, made, [node, *_activations(view, node.output[0])])
        elif node.name in placement.int8 and node.op_type == "Concat":
            yield _tie(LayerPattern.CONCAT, _joined(node, owners, placement), [node])
        elif node.op_type == "Mul":
            excite = _squeeze_excite(view, node, names)
            if excite:
                yield _tie(LayerPattern.SQUEEZE_EXCITE, *excite)
        elif node.op_type == "Softmax":
            attention = _attention(view, node, names)
            if attention:
                yield _tie(LayerPattern.ATTENTION, *attention)


def find_owners(view: GraphView, layers: Sequence[WeightedNode]) -> dict[str, str]:
    """Per tensor that a layer makes, alone or through nodes that keep its codes, that layer.

    Of a product's factors the larger one counts: the other is a gate.
    """
    owners = {layer.biased_output: layer.name for layer in layers}
    owners |= {layer.output: layer.name for layer in layers}
    for node in view.nodes:
        if node.output[0] in owners or node.op_type not in SHAPE_KEEPING | ELEMENTWISE:
            continue
        if constant_operand(view, node) is not None:
            continue
        made = [name for name in view.data_inputs(node) if name in owners]
        if len(made) == 1:
            owners[node.output[0]] = owners[made[0]]
        elif made:
            largest = max(made, key=lambda name: math.prod(view.sample_shape(name)))
            owners[node.output[0]] = owners[largest]
    return owners


def followers(view: GraphView, layer: WeightedNode) -> list[str]:
    """The nodes behind a layer that belong to it: its bias and its activation."""
    names = [layer.bias_add.name] if layer.bias_add is not None else []
    return names + [str(node.name) for node in _activations(view, layer.biased_output)]


def leaders(view: GraphView, layer: WeightedNode) -> list[str]:
    """The norm and activation in front of a layer that nothing else takes (pre-activation)."""
    names: list[str] = []
    node = view.producer.get(layer.input)
    while node is not None and view.only_consumer(node.output[0]) is not None:
        if node.op_type == "BatchNormalization":
            return [node.name, *names]
        if node.op_type not in ACTIVATIONS:
            break
        names.insert(0, node.name)
        node = view.producer.get(node.input[0])
    return []


def find_classifier(view: GraphView, layers: Sequence[WeightedNode]) -> str | None:
    """The layer from which the output comes through nothing but pools, moves and Softmax."""
    by_output = {layer.biased_output: layer.name for layer in layers}
    allowed = SHAPE_KEEPING | _MOVES | _MEANS | {"Softmax", "LogSoftmax"}
    tensor = view.output_name
    while tensor not in by_output:
        node = view.producer.get(tensor)
        if node is None or node.op_type not in allowed:
            return None
        tensor = node.input[0]
    return by_output[tensor]


def _tie(pattern: LayerPattern, layers: Sequence[str], nodes: Sequence[onnx.NodeProto]) -> Tie:
    return Tie(
        pattern=pattern,
        layers=tuple(dict.fromkeys(layers)),
        nodes=tuple(dict.fromkeys(str(node.name) for node in nodes)),
    )


def _activations(view: GraphView, tensor: str) -> list[onnx.NodeProto]:
    """The activation that takes the tensor, alone: one node, or the two of x * Sigmoid(x)."""
    takers = view.consumers.get(tensor, [])
    if len(takers) == 1 and takers[0].op_type in ACTIVATIONS | FLOAT_ACTIVATIONS:
        return takers
    return takers if len(takers) == 2 and any(is_swish(view, n) for n in takers) else []


def _joined(node: onnx.NodeProto, owners: Mapping[str, str], placement: Placement) -> list[str]:
    """The producers of a Concat that takes all they make; none where inputs go elsewhere too."""
    out = node.output[0]
    roots = [placement.stored.get(name, name) for name in node.input]
    is_shared = all(placement.shared.get(r) == placement.shared.get(out) for r in roots)
    is_alone = placement.shared.get(out) == (out,)
    if not (is_shared and is_alone and all(name in owners for name in node.input)):
        return []
    return [owners[name] for name in node.input]


def _squeeze_excite(
    view: GraphView, node: onnx.NodeProto, layers: set[str]
) -> tuple[list[str], list[onnx.NodeProto]] | None:
    """The layers between mean and product in x * gate(mean(x)) (Hu et al. 2018)."""
    if is_swish(view, node) or len(view.data_inputs(node)) != 2:
        return None
    for x, gate in (node.input, reversed(node.input)):
        path = list(_upwards(view, gate, _MOVES | ACTIVATIONS | _MEANS, layers))
        mean = path[-1] if path else None
        if mean is not None and mean.op_type in _MEANS and mean.input[0] == x:
            found = [n.name for n in reversed(path) if n.name in layers]
            others = [n for n in reversed(path) if n.name not in layers]
            return (found, [*others, node]) if found else None
    return None


def _attention(
    view: GraphView, softmax: onnx.NodeProto, layers: set[str]
) -> tuple[list[str], list[onnx.NodeProto]] | None:
    """The projections around softmax(q k^T) v (Vaswani et al. 2017, section 3.2)."""
    scores = view.producer.get(softmax.input[0])
    while scores is not None and scores.op_type in _SCALES | _MOVES:
        scores = view.producer.get(scores.input[0])  # a scale, or a mask that is added
    mix = view.only_consumer(softmax.output[0])
    if scores is None or mix is None or {scores.op_type, mix.op_type} != {"MatMul"}:
        return None
    sources = [*scores.input, *(name for name in mix.input if name != softmax.output[0])]
    projections = [_projection(view, name, layers) for name in sources]
    output = _downwards(view, mix.output[0], layers)
    found = [name for name in (*projections, output) if name is not None]
    return (found, [scores, softmax, mix]) if found else None


def _projection(view: GraphView, tensor: str, layers: set[str]) -> str | None:
    path = list(_upwards(view, tensor, _MOVES | _SCALES, layers))
    return next((str(node.name) for node in path if node.name in layers), None)


def _downwards(view: GraphView, tensor: str, layers: set[str]) -> str | None:
    node = view.only_consumer(tensor)
    while node is not None and node.op_type in _MOVES:
        node = view.only_consumer(node.output[0])
    return str(node.name) if node is not None and node.name in layers else None


def _upwards(
    view: GraphView, tensor: str, allowed: frozenset[str], layers: set[str]
) -> Iterator[onnx.NodeProto]:
    """The chain of nodes that make a tensor, last first; it passes layers and constants.

    It ends behind the first mean, product of activations, or first layer in front of one.
    """
    while (node := view.producer.get(tensor)) is not None:
        is_layer = node.name in layers
        swish = swish_input(view, node)
        if not is_layer and swish is None and node.op_type not in allowed:
            return
        if node.op_type in _SCALES and swish is None and len(view.data_inputs(node)) != 1:
            return
        yield node
        if node.op_type in _MEANS or (node.op_type == "MatMul" and not is_layer):
            return
        data = view.data_inputs(node)
        tensor = swish if swish is not None else data[0]
