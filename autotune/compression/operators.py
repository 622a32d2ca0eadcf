"""What is known of the operators of a float graph: weights, activations, 8-bit kernels.

Owns that knowledge, node by node (`INT8_OPERATORS` is read off onnxruntime's optimized
graphs). Where 8-bit data begins and ends is `placement.py`'s decision, which layers share a
precision `ties.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from autotune.compression.graph import GraphView, attribute
from autotune.compression.histograms import LEVELS
from search_spaces import LayerKind

ACTIVATIONS = frozenset({"Relu", "Clip", "HardSwish", "HardSigmoid", "LeakyRelu", "Sigmoid"})
FLOAT_ACTIVATIONS = frozenset({"Elu", "Gelu", "Mish", "PRelu", "Selu", "Softplus", "Tanh"})
# The output has the input's values, so both share one scale and the runtime drops the Q/DQ.
SAME_SCALE = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "DepthToSpace"}
)
# An 8-bit kernel with an output scale of its own (onnxruntime 1.31, CPU provider: QLinear*).
OWN_SCALE = frozenset({"AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})
ELEMENTWISE = frozenset({"Add", "Mul"})
# It has no 8-bit kernel, but it is a depthwise 1x1 convolution, which has one.
NORMS = frozenset({"BatchNormalization"})
INT8_OPERATORS = SAME_SCALE | OWN_SCALE | ELEMENTWISE | ACTIVATIONS | NORMS | {"Concat"}
SHAPE_KEEPING = SAME_SCALE | OWN_SCALE | ACTIVATIONS
# QLinearGlobalAveragePool refuses to run where input scale / (output scale x values averaged) is
# under 2**-32 or from 2**8 on (onnxruntime 1.31, MLAS); half of either is kept as a margin.
_LEAST_POOL_RATIO, _LARGEST_POOL_RATIO = 2.0**-31, 2.0**7
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedNode:
    """A node with constant weights that can take another precision than FP32.

    `bias_add` is the Add behind a MatMul that has the bias as its constant: exporters write a
    linear layer on sequences so.
    """

    node: onnx.NodeProto
    kind: LayerKind
    bias_add: onnx.NodeProto | None = None

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
        """The bias' initializer, if the node itself adds one."""
        return str(self.node.input[2]) if len(self.node.input) > 2 and self.node.input[2] else None

    @property
    def output(self) -> str:
        """The tensor that the node itself makes."""
        return str(self.node.output[0])

    @property
    def biased_output(self) -> str:
        """The tensor with the bias added, by the node itself or by the Add behind it."""
        return str(self.bias_add.output[0]) if self.bias_add is not None else self.output

    @property
    def is_matrix_product(self) -> bool:
        """Weight-only precisions exist for it."""
        return self.kind in (LayerKind.GEMM, LayerKind.MATMUL)


def find_layers(view: GraphView) -> list[WeightedNode]:
    """Every node whose precision may be chosen, in graph order."""
    return [
        WeightedNode(node=node, kind=kind, bias_add=_bias_add(view, node, kind))
        for node in view.nodes
        if (kind := _kind(view, node)) is not None
    ]


def is_residual_add(view: GraphView, node: onnx.NodeProto) -> bool:
    """An Add of two computed tensors of the same shape."""
    if node.op_type != "Add" or len(view.data_inputs(node)) != len(node.input):
        return False
    left, right = (view.shape(name) for name in node.input)
    return left == right and len(left) > 0


def stream_sums(view: GraphView) -> frozenset[str]:
    """Residual Adds that follow one another with nothing in between.

    Rounded at every Add, a stream gathers the errors of all of them; one that stays float is
    rounded for the layers that read it alone. Uniform INT8's divergence falls from 0.54 to 0.45 of
    `quantize_static`'s on mobilenet_v2, from 0.55 to 0.53 on mobilenet_v3_small (means over six
    calibration sets of 128 digits) and its latency grows by 2 to 4 %, 0 to 2 % (one core, 64 and
    224 pixels, medians of 30 to 60 alternating pairs; efficientnet_b0 0 to 1 %). Streams that a
    Relu cuts are wide: float ones would make resnet18 4 to 7 % slower and resnet50 13 to 16 %.
    """
    adds = {node.output[0]: node.name for node in view.nodes if is_residual_add(view, node)}
    sums: set[str] = set()
    for tensor, name in adds.items():
        before = [adds[x] for x in view.producer[tensor].input if x in adds]
        if before:
            sums.update([name, *before])
    return frozenset(sums)


def is_swish(view: GraphView, node: onnx.NodeProto) -> bool:
    """The product in x * Sigmoid(x), which exporters write for SiLU."""
    return swish_input(view, node) is not None


def swish_input(view: GraphView, node: onnx.NodeProto) -> str | None:
    """The x of x * Sigmoid(x) or x * HardSigmoid(x); None for any other node."""
    if node.op_type != "Mul" or len(node.input) != 2:
        return None
    for x, gate in (node.input, reversed(node.input)):
        producer = view.producer.get(gate)
        is_gate = producer is not None and producer.op_type in ("Sigmoid", "HardSigmoid")
        if producer is not None and is_gate and producer.input[0] == x:
            return str(x)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedProduct:
    """The tensors of `swish * excite`, where `swish` is `x * gate`; a HardSwish has no `gate`."""

    x: str
    gate: str | None
    swish: str
    excite: str


def gated_products(view: GraphView) -> dict[str, GatedProduct]:
    """Products of a swish with an excite (squeeze and excite), by the product's node.

    In 8 bits `x gate` is rounded before `excite` is multiplied with it. Where `gate excite` is
    rounded instead, which lies between 0 and 1, the error grows with `x` and is the smaller.
    Uniform INT8's divergence falls from 0.53 to 0.49 of `quantize_static`'s on mobilenet_v3_small
    (means over six calibration sets of 128 digits), from 1.20 to 0.46 of it on efficientnet_b0
    (four sets). It takes one more kernel: 3 to 5 % of the former's latency, 7 % of the latter's
    (one core, 64 and 224 pixels, medians of 60 alternating pairs).
    """
    found: dict[str, GatedProduct] = {}
    for node in view.nodes:
        if node.op_type != "Mul" or len(view.data_inputs(node)) != 2:
            continue
        for swish, excite in (node.input, reversed(node.input)):
            made, maker = view.producer.get(swish), view.producer.get(excite)
            if made is None or maker is None or maker.op_type not in ("Sigmoid", "HardSigmoid"):
                continue
            x = str(made.input[0]) if made.op_type == "HardSwish" else swish_input(view, made)
            if x is not None:
                gate = next((str(name) for name in made.input if name != x), None)
                found[node.name] = GatedProduct(x=x, gate=gate, swish=swish, excite=excite)
    return found


def constant_operand(view: GraphView, node: onnx.NodeProto) -> str | None:
    """The float constant that an Add or Mul applies to a computed tensor, if there is one."""
    if node.op_type not in ELEMENTWISE or len(view.data_inputs(node)) != 1:
        return None
    return next((n for n in node.input if view.is_constant(n)), None)


def norm_as_convolution(
    view: GraphView, node: onnx.NodeProto
) -> tuple[np.ndarray, np.ndarray] | None:
    """Weights `(C, 1, 1, ...)` and bias `(C,)` of the depthwise convolution that it equals.

    None where the node is no BatchNormalization of constants over images (3 to 5 axes).
    """
    if node.op_type not in NORMS or view.rank(node.input[0]) not in (3, 4, 5):
        return None
    if len(node.output) > 1 and any(node.output[1:]):
        return None
    if not all(view.is_constant(name) for name in node.input[1:5]):
        return None
    scale, shift, mean, variance = (view.array(n).astype(np.float64) for n in node.input[1:5])
    gain = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    spatial = [1] * (view.rank(node.input[0]) - 2)
    weight = gain.reshape(-1, 1, *spatial).astype(np.float32)
    return weight, (shift - mean * gain).astype(np.float32)


def clip_bounds(view: GraphView, node: onnx.NodeProto) -> tuple[float, float] | None:
    """The constant bounds of a Relu or Clip; None for anything else.

    A missing bound is infinite.
    """
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    bounds = [-math.inf, math.inf]
    for side, name in enumerate(node.input[1:3]):
        if not name:
            continue
        if not view.is_constant(name):
            return None
        bounds[side] = float(view.array(name))
    return bounds[0], bounds[1]


def _kind(view: GraphView, node: onnx.NodeProto) -> LayerKind | None:
    if node.op_type not in _WEIGHTED or not view.is_constant(node.input[1]):
        return None
    if view.is_constant(node.input[0]) or len(view.consumers[node.input[1]]) > 1:
        return None
    if any(name and not view.is_constant(name) for name in node.input[2:]):
        return None
    rank = len(view.initializers[node.input[1]].dims)
    if node.op_type in ("Conv", "ConvTranspose"):
        return _conv_kind(view, node) if rank in (3, 4, 5) else None
    if rank != 2:
        return None
    if node.op_type == "MatMul":
        return LayerKind.MATMUL
    plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    bias = view.initializers.get(node.input[2]) if len(node.input) > 2 else None
    bias_fits = bias is None or len(bias.dims) == 1
    return LayerKind.GEMM if plain and bias_fits and not attribute(node, "transA", 0) else None


def _conv_kind(view: GraphView, node: onnx.NodeProto) -> LayerKind:
    if node.op_type == "ConvTranspose":
        return LayerKind.CONV_TRANSPOSE
    groups = attribute(node, "group", 1)
    is_depthwise = groups > 1 and view.initializers[node.input[1]].dims[1] == 1
    return LayerKind.DEPTHWISE_CONV if is_depthwise else LayerKind.CONV


def _bias_add(
    view: GraphView, node: onnx.NodeProto, kind: LayerKind | None
) -> onnx.NodeProto | None:
    """The Add behind a MatMul whose constant has one entry per output feature."""
    if kind is not LayerKind.MATMUL:
        return None
    taker = view.only_consumer(node.output[0])
    bias = constant_operand(view, taker) if taker is not None else None
    if taker is None or bias is None or taker.op_type != "Add":
        return None
    features = view.initializers[node.input[1]].dims[1]
    dims = view.initializers[bias].dims
    return taker if [*dims[-1:]] == [features] and math.prod(dims) == features else None


def averaged_range(
    joint: tuple[float, float], own: tuple[float, float], *, input_scale: float, n_values: int
) -> tuple[float, float]:
    """The range that an 8-bit GlobalAveragePool over `n_values` codes can write.

    That of all whom its output is joined with; where that is too wide for the kernel, its own;
    where the averages vanish beside one step of the input, the input's width.
    """
    low, high = joint
    step = input_scale / n_values
    if step < _LEAST_POOL_RATIO * (high - low) / LEVELS:
        low, high = own
    if step >= _LARGEST_POOL_RATIO * (high - low) / LEVELS:
        return 0.0, LEVELS * input_scale
    return low, high
