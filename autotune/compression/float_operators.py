"""The operators of a graph that no candidate can quantize, each kind with its reason.

Owns the reasons; they are shown once per job. What can be quantized is `units.py`'s
knowledge, which nodes a candidate quantizes `placement.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx

from autotune.compression.graph import GraphView, attribute
from autotune.compression.operators import INT8_OPERATORS, norm_as_convolution
from autotune.compression.units import Unit
from search_spaces import FloatOperator

_NO_KERNEL = "onnxruntime's CPU provider has no 8-bit kernel for it"
_UNKNOWN = "nothing is known about quantizing it"
# Operators of classifiers whose float execution is a fact of the runtime, not a gap in what
# is known here (onnxruntime 1.31, "OperatorKernels.md": no uint8/int8 row for these).
_FLOAT_KERNELS = frozenset(
    {
        "BatchNormalization", "ConvTranspose", "Div", "Elu", "Erf", "Exp", "Gelu",
        "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax", "LRN",
        "Mish", "Pow", "PRelu", "RMSNormalization", "ReduceMean", "Selu", "Softmax", "Softplus",
        "Sqrt", "Sub", "Tanh",
    }
)  # fmt: skip
# They compute shapes and indices, or read values without arithmetic: nothing to quantize.
_NOT_ARITHMETIC = frozenset({"Constant", "ConstantOfShape", "Range", "Shape", "Size"})
_RANKS = {"Conv": (3, 4, 5), "Gemm": (2,), "MatMul": (2,)}
_DOMAINS = ("", "ai.onnx")


def find_float_operators(view: GraphView, units: Sequence[Unit]) -> tuple[FloatOperator, ...]:
    """What stays FP32 in every candidate, by operator and reason, in alphabetical order.

    Layers, and nodes that have an 8-bit kernel, are not among them; neither are those that
    compute shapes.
    """
    named = {layer.name for unit in units for layer in unit.layers}
    counts = Counter(
        (node.op_type if node.domain in _DOMAINS else f"{node.domain}:{node.op_type}", reason)
        for node in view.nodes
        if node.name not in named and (reason := _reason(view, node)) is not None
    )
    return tuple(
        FloatOperator(operator=operator, count=count, reason=reason)
        for (operator, reason), count in sorted(counts.items())
    )


def _reason(view: GraphView, node: onnx.NodeProto) -> str | None:
    if node.domain not in _DOMAINS:
        return _UNKNOWN
    if node.op_type in _RANKS:
        return _weighted(view, node)
    if node.op_type == "BatchNormalization":
        return None if norm_as_convolution(view, node) is not None else _NO_KERNEL
    if node.op_type in INT8_OPERATORS | _NOT_ARITHMETIC or not _computes_floats(view, node):
        return None
    return _NO_KERNEL if node.op_type in _FLOAT_KERNELS else _UNKNOWN


def _weighted(view: GraphView, node: onnx.NodeProto) -> str:
    """Why a product is no layer; the conditions are those of `units.find_layers`."""
    weight = node.input[1]
    if not view.is_constant(weight):
        return "its weights are computed, not constant"
    if view.is_constant(node.input[0]):
        return "both of its operands are constant"
    if view.array(weight).ndim not in _RANKS[node.op_type]:
        return f"its weights have {view.array(weight).ndim} axes"
    if any(name and not view.is_constant(name) for name in node.input[2:]):
        return "its bias is computed, not constant"
    if len(view.consumers[weight]) > 1:
        return "another node uses the same weights"
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return "its alpha or beta is not 1"
    if attribute(node, "transA", 0):
        return "it transposes its input (transA)"
    return "its bias is no vector with an entry per output"


def _computes_floats(view: GraphView, node: onnx.NodeProto) -> bool:
    """False where every output is known to be of another type (shapes, indices, masks)."""
    kinds = [view.element_type(name) for name in node.output if name]
    return any(kind in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.FLOAT) for kind in kinds)
