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
from autotune.compression.operators import (
    ELEMENTWISE,
    INT8_OPERATORS,
    NORMS,
    SAME_SCALE,
    GatedProduct,
    WeightedNode,
    clip_bounds,
    constant_operand,
    gated_products,
    norm_as_convolution,
    stream_sums,
)
from autotune.compression.sharing import share_concat_scales
from search_spaces import LayerKind, Precision

# Its 8-bit kernel (QLinearSoftmax, 1.31) answers 0 where it has a single value to choose from.
_GUARDED = frozenset({"Conv", "ConvTranspose", "Gemm", "Softmax"})
# onnxruntime fuses these into the Gemm before it looks for DQs (GemmActivationFusion, 1.31).
_FUSED_INTO_GEMM = frozenset(
    {
        "Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
        "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
_TRANSPARENT_TO_Q = SAME_SCALE | {"Relu", "Clip"}


@dataclass(slots=True)
class Placement:
    """The decision for one candidate.

    `int8` names the nodes that compute on codes. `stored` maps each tensor that exists as
    codes to the tensor whose scale it has. `absorbed` maps an activation that its producer's
    output range replaces to that range's kind: `clip` or `gate` (HardSigmoid). `writes` maps
    a producer's tensor to the one it writes instead. `guarded` names the float nodes that
    onnxruntime would quantize on its own. `shared` maps a tensor to the Concat outputs whose
    ranges together are its scale: equal scales make an 8-bit Concat a copy. `sums` names the
    residual Adds of `int8` that add in float and hand their sum on to the next one unrounded;
    `gated` the products of `int8` of a swish with an excite, which multiply both gates first.
    """

    int8: set[str] = field(default_factory=set)
    stored: dict[str, str] = field(default_factory=dict)
    absorbed: dict[str, str] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)
    guarded: set[str] = field(default_factory=set)
    shared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sums: frozenset[str] = frozenset()
    gated: dict[str, GatedProduct] = field(default_factory=dict)


def place(
    view: GraphView, layers: Mapping[str, WeightedNode], chosen: Mapping[str, Precision]
) -> Placement:
    """Decide for every node; layers that `chosen` does not name are FP32."""
    placement = Placement()
    quantized = {name for name, precision in chosen.items() if precision.is_int8}
    wanted = _wanted_as_codes(view, quantized)
    rules = _Rules(view, layers, quantized, wanted, placement)
    for node in view.nodes:
        rules.visit(node)
    placement.shared = share_concat_scales(
        view, placement.int8, placement.stored, placement.absorbed
    )
    placement.gated = {
        name: product
        for name, product in gated_products(view).items()
        if {name, view.producer[product.swish].name} <= placement.int8
    }
    placement.sums = stream_sums(view) & placement.int8
    _guard(view, placement)
    return placement


def _wanted_as_codes(view: GraphView, quantized: set[str]) -> set[str]:
    """The tensors from which codes could flow to a quantized layer."""
    wanted: set[str] = set()
    for node in reversed(view.nodes):
        if node.name in quantized:
            wanted.add(node.input[0])
        elif node.op_type in INT8_OPERATORS and wanted.intersection(node.output):
            wanted.update(view.data_inputs(node))
    return wanted


@dataclass(frozen=True, slots=True)
class _Rules:
    view: GraphView
    layers: Mapping[str, WeightedNode]
    quantized: set[str]
    wanted: set[str]
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
        if self._gives_codes(self.layers[node.name]):
            self._store(node.output[0])

    def _clip(self, node: onnx.NodeProto) -> None:
        bounds = clip_bounds(self.view, node)
        # Bounds that leave zero alone have no width that a scale could express.
        is_range = bounds is not None and bounds[0] <= 0.0 <= bounds[1] != bounds[0]
        if is_range and self._can_absorb(node):
            self._absorb(node, "clip")

    def _gate(self, node: onnx.NodeProto) -> None:
        producer = self.view.producer.get(node.input[0])
        # A MatMul has no bias to hold what a whole zero point leaves over.
        is_layer = (
            producer is not None
            and producer.name in self.quantized
            and producer.op_type != "MatMul"
        )
        rises = attribute(node, "alpha", 0.2) > 0 and 0 <= attribute(node, "beta", 0.5) <= 1
        if is_layer and rises and self._can_absorb(node):
            self._absorb(node, "gate")

    def _operator(self, node: onnx.NodeProto) -> None:
        if not self._computes_on_codes(node):
            return
        self.placement.int8.add(node.name)
        if node.op_type in SAME_SCALE:
            self._store(node.output[0], root=self.placement.stored[node.input[0]])
        else:
            self._store(node.output[0])

    def _computes_on_codes(self, node: onnx.NodeProto) -> bool:
        """Most of the input is stored as codes, and nothing is gained from leaving them.

        Where a float operand would have to be quantized for it, or a norm to be rounded,
        somebody must want the result as codes.
        """
        is_wanted = node.output[0] in self.wanted
        if node.op_type in NORMS:
            is_possible = norm_as_convolution(self.view, node) is not None
            return is_possible and is_wanted and node.input[0] in self.placement.stored
        if node.op_type not in ELEMENTWISE | {"Concat"}:
            return node.input[0] in self.placement.stored
        inputs = self.view.data_inputs(node)
        stored = [name for name in inputs if name in self.placement.stored]
        floats = [name for name in inputs if name not in self.placement.stored]
        if len(inputs) < len(node.input):
            return bool(stored) and is_wanted and constant_operand(self.view, node) is not None
        if not floats:
            return bool(stored)
        is_free = node.op_type != "Concat" or is_wanted
        return is_free and self._size(stored) > self._size(floats)

    def _can_absorb(self, node: onnx.NodeProto) -> bool:
        """Only the node takes the tensor, whose scale is nobody else's.

        One range cannot stand for two activations in a row: it ends where one of them does.
        """
        tensor = node.input[0]
        return (
            self.placement.stored.get(tensor) == tensor
            and tensor not in self.placement.writes.values()
            and self.view.only_consumer(tensor) is not None
        )

    def _absorb(self, node: onnx.NodeProto, kind: str) -> None:
        self.placement.absorbed[node.name] = kind
        del self.placement.stored[node.input[0]]
        self._store(node.output[0])
        self.placement.writes[node.input[0]] = node.output[0]

    def _store(self, tensor: str, *, root: str | None = None) -> None:
        self.placement.stored[tensor] = root or tensor

    def _gives_codes(self, layer: WeightedNode) -> bool:
        """A matrix product may leave its int32 sums as float; a convolution has no such kernel.

        It does where nobody wants codes, and where an Add brings the bias, which 8 bits would
        round. A Gemm gives codes too where the runtime would fuse it with its activation.
        """
        if not layer.is_matrix_product:
            return True
        takers = self.view.consumers.get(layer.output, [])
        if layer.kind is LayerKind.GEMM and any(t.op_type in _FUSED_INTO_GEMM for t in takers):
            return True
        return layer.bias_add is None and layer.output in self.wanted

    def _size(self, tensors: list[str]) -> int:
        return sum(math.prod(self.view.sample_shape(name)) for name in tensors)


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
