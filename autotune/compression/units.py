"""The fusion units of an FP32 graph: which nodes share a precision, and why.

Owns the knowledge of operators: which have weights, which the runtime executes on 8-bit data
(`INT8_OPERATORS`, read off onnxruntime's optimized graphs), which a residual Add ties
together. `inventory.py` describes the result to people, `quantization.py` writes it down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from autotune.compression.graph import GraphView, attribute
from search_spaces import LayerKind

ACTIVATIONS = frozenset({"Relu", "Clip", "HardSwish", "HardSigmoid", "LeakyRelu", "Sigmoid"})
# The output has the input's values, so both share one scale and the runtime drops the Q/DQ.
SAME_SCALE = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "DepthToSpace"}
)
# An 8-bit kernel with an output scale of its own (onnxruntime 1.31, CPU provider: QLinear*).
OWN_SCALE = frozenset({"AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})
ELEMENTWISE = frozenset({"Add", "Mul"})
INT8_OPERATORS = SAME_SCALE | OWN_SCALE | ELEMENTWISE | ACTIVATIONS | {"Concat"}
_SHAPE_KEEPING = SAME_SCALE | OWN_SCALE | ACTIVATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedNode:
    """A node with constant weights that can take another precision than FP32.

    `output` is the tensor after the activations that a quantized output range replaces.
    """

    node: onnx.NodeProto
    kind: LayerKind

    @property
    def name(self) -> str:
        """The layer's name; it names the node too."""
        return str(self.node.name)

    @property
    def input(self) -> str:
        """The tensor that flows in."""
        return str(self.node.input[0])

    @property
    def weight(self) -> str:
        """The weights' initializer."""
        return str(self.node.input[1])

    @property
    def bias(self) -> str | None:
        """The bias' initializer, if any."""
        return str(self.node.input[2]) if len(self.node.input) > 2 and self.node.input[2] else None

    @property
    def output(self) -> str:
        """The tensor that the node itself makes."""
        return str(self.node.output[0])

    @property
    def is_matrix_product(self) -> bool:
        """Weight-only precisions exist for it."""
        return self.kind in (LayerKind.GEMM, LayerKind.MATMUL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weighted nodes that must share a precision, with the nodes that follow from it."""

    name: str
    layers: tuple[WeightedNode, ...]
    nodes: tuple[str, ...]


def find_layers(view: GraphView) -> list[WeightedNode]:
    """Every node whose precision may be chosen, in graph order."""
    return [
        WeightedNode(node=node, kind=kind)
        for node in view.nodes
        if (kind := _kind(view, node)) is not None
    ]


def find_units(view: GraphView) -> list[Unit]:
    """The layers, tied where a residual Add needs one precision from all its producers."""
    layers = find_layers(view)
    by_output = {layer.output: layer.name for layer in layers}
    parent = {layer.name: layer.name for layer in layers}
    followers: dict[str, list[str]] = {layer.name: [] for layer in layers}
    owner: dict[str, str] = {}
    for node in view.nodes:
        made = by_output.get(node.output[0])
        producers = [made] if made else _producers(view, node, owner)
        if not producers:
            continue
        owner.update(dict.fromkeys(node.output, producers[0]))
        if made is None and (node.op_type in ACTIVATIONS or is_residual_add(view, node)):
            followers[producers[0]].append(node.name)
        if is_residual_add(view, node):
            for other in producers[1:]:
                _join(parent, producers[0], other)
    return _collect(layers, parent, followers)


def is_residual_add(view: GraphView, node: onnx.NodeProto) -> bool:
    """An Add of two computed tensors of the same shape."""
    if node.op_type != "Add" or len(view.data_inputs(node)) != len(node.input):
        return False
    left, right = (view.shape(name) for name in node.input)
    return left == right and len(left) > 0


def clip_bounds(view: GraphView, node: onnx.NodeProto) -> tuple[float, float] | None:
    """The constant bounds of a Relu or Clip; None for anything else.

    A missing bound is infinite.
    """
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    bounds = [float("-inf"), float("inf")]
    for side, name in enumerate(node.input[1:3]):
        if not name:
            continue
        if not view.is_constant(name):
            return None
        bounds[side] = float(view.array(name))
    return bounds[0], bounds[1]


def _kind(view: GraphView, node: onnx.NodeProto) -> LayerKind | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or not view.is_constant(node.input[1]):
        return None
    if view.is_constant(node.input[0]) or len(view.consumers[node.input[1]]) > 1:
        return None
    if any(name and not view.is_constant(name) for name in node.input[2:]):
        return None
    rank = view.array(node.input[1]).ndim
    if node.op_type == "Conv":
        return _conv_kind(view, node) if rank in (3, 4, 5) else None
    if rank != 2:
        return None
    if node.op_type == "MatMul":
        return LayerKind.MATMUL
    plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    bias_fits = len(node.input) < 3 or view.array(node.input[2]).ndim == 1
    return LayerKind.GEMM if plain and bias_fits and not attribute(node, "transA", 0) else None


def _conv_kind(view: GraphView, node: onnx.NodeProto) -> LayerKind:
    groups = attribute(node, "group", 1)
    weight = view.array(node.input[1])
    is_depthwise = groups > 1 and weight.shape[1] == 1
    return LayerKind.DEPTHWISE_CONV if is_depthwise else LayerKind.CONV


def _producers(view: GraphView, node: onnx.NodeProto, owner: dict[str, str]) -> list[str]:
    """The layers whose output reaches the node through nothing but shape-keeping nodes."""
    if node.op_type not in _SHAPE_KEEPING | ELEMENTWISE:
        return []
    return list(dict.fromkeys(owner[n] for n in view.data_inputs(node) if n in owner))


def _root(parent: dict[str, str], name: str) -> str:
    while parent[name] != name:
        name = parent[name]
    return name


def _join(parent: dict[str, str], left: str, right: str) -> None:
    parent[_root(parent, left)] = _root(parent, right)


def _collect(
    layers: list[WeightedNode], parent: dict[str, str], followers: dict[str, list[str]]
) -> list[Unit]:
    members: dict[str, list[WeightedNode]] = {}
    for layer in layers:
        members.setdefault(_root(parent, layer.name), []).append(layer)
    return [
        Unit(name=group[0].name, layers=tuple(group), nodes=tuple(_node_names(group, followers)))
        for group in members.values()
    ]


def _node_names(group: list[WeightedNode], followers: dict[str, list[str]]) -> Iterator[str]:
    for layer in group:
        yield layer.name
        yield from followers[layer.name]
