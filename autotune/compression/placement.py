"""Where 8-bit data begins and ends in a graph, given the precision of each layer.

Owns the decision, node by node in graph order; `quantization.py` writes it down. The rules
follow what onnxruntime's CPU provider fuses; `quantization.py` lists them with the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from autotune.compression.graph import GraphView, attribute
from autotune.compression.units import (
    ELEMENTWISE,
    INT8_OPERATORS,
    SAME_SCALE,
    WeightedNode,
    clip_bounds,
)
from search_spaces import LayerKind, Precision

_GUARDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
# Behind a quantized matrix product these take its sums as float, without a Q/DQ in between.
_TAKES_FLOAT_SUMS = frozenset({"Gemm", "MatMul", "Softmax", "LogSoftmax"})
_TRANSPARENT_TO_Q = SAME_SCALE | {"Relu", "Clip"}


@dataclass(slots=True)
class Placement:
    """The decision for one candidate.

    `int8` names the nodes that compute on codes. `stored` maps each tensor that exists as
    codes to the tensor whose scale it has. `absorbed` maps an activation that its producer's
    output range replaces to that range's kind: `clip` or `gate` (HardSigmoid). `writes` maps
    a producer's tensor to the one it writes instead. `guarded` names the float nodes that
    onnxruntime would quantize on its own.
    """

    int8: set[str] = field(default_factory=set)
    stored: dict[str, str] = field(default_factory=dict)
    absorbed: dict[str, str] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)
    guarded: set[str] = field(default_factory=set)


def place(
    view: GraphView, layers: Mapping[str, WeightedNode], chosen: Mapping[str, Precision]
) -> Placement:
    """Decide for every node; layers that `chosen` does not name are FP32."""
    placement = Placement()
    quantized = {name for name, precision in chosen.items() if precision.is_int8}
    rules = _Rules(view, layers, quantized, placement)
    for node in view.nodes:
        rules.visit(node)
    _guard(view, placement)
    return placement


@dataclass(frozen=True, slots=True)
class _Rules:
    view: GraphView
    layers: Mapping[str, WeightedNode]
    quantized: set[str]
    placement: Placement

    def visit(self, node: onnx.NodeProto) -> None:
        """Decide for one node; everything before it is decided."""
        if node.name in self.layers:
            self._layer(node)
        elif node.op_type in ("Relu", "Clip"):
            self._clip(node)
        elif node.op_type == "HardSigmoid":
            self._gate(node)
        elif node.op_type in INT8_OPERATORS and len(node.output) == 1:
            self._operator(node)

    def _layer(self, node: onnx.NodeProto) -> None:
        if node.name not in self.quantized:
            return
        self.placement.int8.add(node.name)
        # A matrix product may leave its int32 sums as float; a convolution has no such kernel.
        if self._is_conv(node) or self._wanted(node.output[0]):
            self._store(node.output[0])

    def _clip(self, node: onnx.NodeProto) -> None:
        bounds = clip_bounds(self.view, node)
        if bounds and bounds[0] <= 0.0 <= bounds[1] and self._can_absorb(node):
            self._absorb(node, "clip")

    def _gate(self, node: onnx.NodeProto) -> None:
        producer = self.view.producer.get(node.input[0])
        is_layer = producer is not None and producer.name in self.quantized
        rises = attribute(node, "alpha", 0.2) > 0 and 0 <= attribute(node, "beta", 0.5) <= 1
        if is_layer and rises and self._can_absorb(node):
            self._absorb(node, "gate")

    def _operator(self, node: onnx.NodeProto) -> None:
        inputs = self.view.data_inputs(node)
        stored = [name for name in inputs if name in self.placement.stored]
        if node.op_type in ELEMENTWISE | {"Concat"}:
            floats = [name for name in inputs if name not in self.placement.stored]
            is_int8 = len(inputs) == len(node.input) and self._size(stored) > self._size(floats)
        else:
            is_int8 = node.input[0] in self.placement.stored
        if not is_int8:
            return
        self.placement.int8.add(node.name)
        if node.op_type in SAME_SCALE:
            self._store(node.output[0], root=self.placement.stored[node.input[0]])
        else:
            self._store(node.output[0])

    def _can_absorb(self, node: onnx.NodeProto) -> bool:
        """Only the node takes the tensor, whose scale is nobody else's."""
        tensor = node.input[0]
        return (
            self.placement.stored.get(tensor) == tensor
            and self.view.only_consumer(tensor) is not None
        )

    def _absorb(self, node: onnx.NodeProto, kind: str) -> None:
        self.placement.absorbed[node.name] = kind
        del self.placement.stored[node.input[0]]
        self._store(node.output[0])
        self.placement.writes[node.input[0]] = node.output[0]

    def _store(self, tensor: str, *, root: str | None = None) -> None:
        self.placement.stored[tensor] = root or tensor

    def _wanted(self, tensor: str) -> bool:
        """Somebody computes on codes of the tensor, or the runtime would fuse him otherwise.

        onnxruntime fuses a Gemm with the activation behind it before it looks for DQs.
        """
        return any(
            node.name in self.quantized or node.op_type not in _TAKES_FLOAT_SUMS
            for node in self.view.consumers.get(tensor, [])
        )

    def _is_conv(self, node: onnx.NodeProto) -> bool:
        kind = self.layers[node.name].kind
        return kind in (LayerKind.CONV, LayerKind.DEPTHWISE_CONV)

    def _size(self, tensors: list[str]) -> int:
        return sum(math.prod(self.view.shape(name)) for name in tensors)


def _guard(view: GraphView, placement: Placement) -> None:
    for node in view.nodes:
        if (
            node.op_type in _GUARDED
            and node.name not in placement.int8
            and node.input[0] in placement.stored
            and _reaches_codes(view, placement, node.output[0])
        ):
            placement.guarded.add(node.name)


def _reaches_codes(view: GraphView, placement: Placement, tensor: str) -> bool:
    """A Q follows the tensor, directly or behind nodes that let a Q move up."""
    return any(
        node.name in placement.int8
        or (node.op_type in _TRANSPARENT_TO_Q and _reaches_codes(view, placement, node.output[0]))
        for node in view.consumers.get(tensor, [])
    )
