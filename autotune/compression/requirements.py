"""What a foreign graph must be before anything can tune it, and the refusals.

Owns the checks and their messages: each names the node, input or weight and says what to do.
Bringing an admitted graph into normal form is `cleanup.py`'s work; whether the model answers
sensibly is found out by running it, in `source.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from autotune.compression.graph import attribute, shape_of
from autotune.errors import InvalidModel

# Names of operators that read or make quantized data, in every domain; onnxruntime's own ones
# begin with QLinear, QOrdered or Q and a capital (QGemm, QAttention, QMoE).
_QUANTIZED = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger",
        "MatMulInteger", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized",
        "MatMulIntegerToFloat", "MatMulInteger16", "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM", "BFPQuantizeLinear",
    }
)  # fmt: skip
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike"}
)  # fmt: skip
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})
# Their constants take part in arithmetic. Elsewhere infinity is a bound or a mask: Clip, Pad,
# Where, an Add of an attention mask.
_FINITE_CONSTANTS = WEIGHTED | {
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
    "RMSNormalization", "PRelu", "Mul", "Div",
}  # fmt: skip
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# Domains whose operators onnxruntime brings along (its `OperatorKernels.md`, CPU provider).
_KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}
)
# What every runtime release since onnxruntime 1.23 loads.
_NEWEST_COMMON_OPSET = 24
_GRAPH_ATTRIBUTES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def called(node: onnx.NodeProto) -> str:
    """How a message names a node; one without a name goes by what it makes."""
    if node.name:
        return f"node {node.name!r} ({node.op_type})"
    made = next((name for name in node.output if name), "")
    return f"the {node.op_type} node that makes {made!r}"


def require_plain_float(model: onnx.ModelProto) -> None:
    """Refuse what is quantized already, branches or loops, is custom, or answers at random.

    Raises:
        InvalidModel: naming the node.
    """
    for node in model.graph.node:
        if _is_quantized(node):
            raise InvalidModel(
                f"the model is already quantized: {called(node)}; give the FP32 model from which "
                "it was made"
            )
        has_body = any(entry.type in _GRAPH_ATTRIBUTES for entry in node.attribute)
        if has_body or node.op_type in _CONTROL_FLOW:
            raise InvalidModel(
                f"{called(node)} is control flow, which cannot be tuned; export the model with "
                "fixed control flow (torch.onnx.export with dynamo=True unrolls loops)"
            )
        if node.domain not in _KNOWN_DOMAINS:
            raise InvalidModel(
                f"{called(node)} is of the domain {node.domain!r}, which onnxruntime does not "
                "have; export the model without custom operators"
            )
        if node.op_type in _RANDOM:
            raise InvalidModel(
                f"{called(node)} gives random values, so no two answers can be compared; export "
                "the model for inference"
            )


def _is_quantized(node: onnx.NodeProto) -> bool:
    name = node.op_type
    return name in _QUANTIZED or (name[:1] == "Q" and name[1:2].isupper())


def require_inference(nodes: Iterable[onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
    """Refuse a Dropout or BatchNormalization that is in training mode.

    Raises:
        InvalidModel: naming the node.
    """
    for node in nodes:
        is_training = node.op_type == "BatchNormalization" and attribute(node, "training_mode", 0)
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            mode = constants.get(node.input[2])
            is_training = mode is None or bool(mode)
        if is_training:
            raise InvalidModel(
                f"{called(node)} is in training mode; export the model for inference "
                "(module.eval() in torch)"
            )


def require_one_input_and_output(graph: onnx.GraphProto) -> None:
    """One float32 tensor in, one out.

    Raises:
        InvalidModel: naming the inputs or outputs.
    """
    for role, values in (("input", graph.input), ("output", graph.output)):
        if len(values) != 1:
            names = ", ".join(repr(v.name) for v in values) or "none"
            raise InvalidModel(
                f"the model has {len(values)} {role}s ({names}); exactly one {role} is supported: "
                "cut the model to the image input and the class scores with "
                "onnx.utils.extract_model(path, new_path, [input], [output])"
            )
        _require_float_tensor(role, values[0])
    value = graph.input[0]
    if len(value.type.tensor_type.shape.dim) < 2:
        raise InvalidModel(
            f"input {value.name!r} has no known shape with a batch axis and at least one more "
            "axis; export the model with its input shape"
        )


def _require_float_tensor(role: str, value: onnx.ValueInfoProto) -> None:
    kind = value.type.WhichOneof("value") or "of unknown type"
    if kind != "tensor_type":
        raise InvalidModel(
            f"{role} {value.name!r} is {kind.removesuffix('_type').replace('_', ' ')}; a float32 "
            f"tensor is needed: export the model with a tensor as its {role}"
        )
    element = value.type.tensor_type.elem_type
    if element != onnx.TensorProto.FLOAT:
        raise InvalidModel(
            f"{role} {value.name!r} is {onnx.TensorProto.DataType.Name(element)}; a float32 "
            f"{role} is needed: export the model in float32, with the conversion of pixels or "
            "labels left to whoever calls it"
        )


def dynamic_sample_axes(graph: onnx.GraphProto) -> tuple[int, ...]:
    """The axes of the first input, but for the batch's, whose extent the graph leaves open."""
    held = {tensor.name for tensor in graph.initializer}
    value = next(value for value in graph.input if value.name not in held)
    dims = value.type.tensor_type.shape.dim
    return tuple(axis for axis in range(1, len(dims)) if _is_open(dims[axis]))


def _is_open(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Some exporters write -1 for an extent that is not known."""
    return not dim.HasField("dim_value") or dim.dim_value < 0


def fix_sample_axes(graph: onnx.GraphProto, input_shape: tuple[int, ...] | None) -> None:
    """Give dynamic axes of the input the data's extents.

    `input_shape` is one sample's shape; None where no data is known. The batch axis stays.

    Raises:
        InvalidModel: an axis of extent 0, or a dynamic one without data that fits.
    """
    value = graph.input[0]
    dims = value.type.tensor_type.shape.dim
    for axis in dynamic_sample_axes(graph):
        if input_shape is None or len(input_shape) != len(dims) - 1:
            raise InvalidModel(
                f"axis {axis} of input {value.name!r} is dynamic ({dims[axis].dim_param or '?'}) "
                f"and samples of shape {input_shape} do not say its extent; export the model "
                "with a fixed input shape"
            )
        dims[axis].dim_value = input_shape[axis - 1]
    for axis, extent in enumerate(shape_of(value)):
        if axis > 0 and extent < 1:
            raise InvalidModel(
                f"axis {axis} of input {value.name!r} has extent {extent}; a sample needs at "
                "least one value along every axis"
            )


def require_usable_constants(graph: onnx.GraphProto) -> None:
    """Refuse NaN anywhere, infinity in arithmetic, and weights without a single value.

    Raises:
        InvalidModel: naming the initializer and the node that uses it.
    """
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for tensor in graph.initializer:
        takers = users.get(tensor.name, [])
        array = numpy_helper.to_array(tensor)
        where = f" of {called(takers[0])}" if takers else ""
        if array.size == 0 and any(node.op_type in WEIGHTED for node in takers):
            raise InvalidModel(
                f"weights {tensor.name!r}{where} have shape {array.shape} and hold no values; "
                "remove the layer"
            )
        if array.dtype.kind != "f":
            continue
        strict = any(node.op_type in _FINITE_CONSTANTS for node in takers)
        bad = int((~np.isfinite(array)).sum() if strict else np.isnan(array).sum())
        if bad:
            raise InvalidModel(
                f"weights {tensor.name!r}{where} hold {bad} values that are NaN or infinite; "
                "train or export the model again"
            )


def require_float32_layers(model: onnx.ModelProto) -> None:
    """Refuse layers that compute in another float type; the graph's types are inferred.

    Raises:
        InvalidModel: naming the first such node.
    """
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in _values(model.graph)}
    known = (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED)
    for node in model.graph.node:
        kind = kinds.get(node.input[0]) if node.op_type in WEIGHTED else None
        if kind is not None and kind not in known:
            raise InvalidModel(
                f"{called(node)} computes in {onnx.TensorProto.DataType.Name(kind)}; give the "
                "model in FP32, from which every other precision is made"
            )


def why_it_does_not_load(model: onnx.ModelProto) -> str | None:
    """What a runtime that refuses the model most likely lacks, with a way out; None if unclear."""
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version > _NEWEST_COMMON_OPSET:
        return (
            f"its opset {version} is newer than this runtime; export it with a lower "
            f"opset_version, such as {_NEWEST_COMMON_OPSET}"
        )
    return None


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from graph.value_info
    yield from graph.input
    yield from graph.output
