"""One normal form for FP32 graphs, whatever exported them.

Owns the rewriting: constants to initializers, BatchNorm folded, global means as
GlobalAveragePool, one input with a symbolic batch axis, every other extent static, notes of
the exporter removed. Refuses graphs that nothing later could treat; `graph.py` reads the
result.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autotune.compression.graph import (
    BATCH_AXIS,
    GraphView,
    attribute,
    layer_name,
    shape_of,
    unique_names,
)
from autotune.errors import InvalidModel

MIN_OPSET = 13
# Per-channel QuantizeLinear/DequantizeLinear exist since opset 13 (ONNX operator changelog).
_QUANTIZED_OPERATORS = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv",
        "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits", "QGemm",
    }
)  # fmt: skip
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})


def clean_up(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in normal form; a copy.

    Raises:
        InvalidModel: it is quantized already, has control flow, several inputs or outputs,
            a dynamic axis other than the first, or weights that are not finite.
    """
    model = _copy_of(model)
    _require_plain_float(model)
    model = _modern_opset(model)
    _drop_notes(model)
    _constants_to_initializers(model)
    _require_one_input_and_output(model)
    _drop_identities(model)
    _free_batch_axis(model)
    _require_finite(model)
    _fold_batch_norms(model)
    _means_to_pools(model)
    _drop_unused_initializers(model)
    _name_weights_and_nodes(model)
    return _with_shapes(model)


def _copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _require_plain_float(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in _QUANTIZED_OPERATORS:
            raise InvalidModel(
                f"the model is already quantized: node {node.name!r} is a {node.op_type}; "
                "give the FP32 model from which it was made"
            )
        if node.op_type in _CONTROL_FLOW:
            raise InvalidModel(
                f"node {node.name!r} is control flow ({node.op_type}), which cannot be tuned; "
                "export the model with fixed control flow"
            )


def _modern_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version >= MIN_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, MIN_OPSET)
    except RuntimeError as error:
        raise InvalidModel(
            f"the model has opset {version} and cannot be converted to {MIN_OPSET}, the least "
            f"that holds per-channel quantization: {error}; export it again with a newer opset"
        ) from error


def _drop_notes(model: onnx.ModelProto) -> None:
    """Exporters leave stack traces and paths of the machine they ran on."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    model.producer_name, model.producer_version = "", ""
    del model.metadata_props[:]
    del graph.metadata_props[:]
    for entries in (graph.node, graph.input, graph.output, graph.initializer, graph.value_info):
        for entry in entries:
            del entry.metadata_props[:]
            entry.doc_string = ""


def _constants_to_initializers(model: onnx.ModelProto) -> None:
    graph = model.graph
    kept = []
    for node in graph.node:
        value = attribute(node, "value", None) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    _replace_nodes(graph, kept)
    held = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in held]
    del graph.input[:]
    graph.input.extend(inputs)


def _require_one_input_and_output(model: onnx.ModelProto) -> None:
    graph = model.graph
    for role, values in (("input", graph.input), ("output", graph.output)):
        if len(values) != 1:
            names = ", ".join(repr(v.name) for v in values)
            raise InvalidModel(
                f"the model has {len(values)} {role}s ({names}); exactly one {role} is supported"
            )
    value = graph.input[0]
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        raise InvalidModel(f"input {value.name!r} is {kind}; a float32 input is needed")
    if len(value.type.tensor_type.shape.dim) < 2:
        raise InvalidModel(f"input {value.name!r} needs a batch axis and at least one more axis")
    for axis, extent in enumerate(shape_of(value)):
        if axis > 0 and extent < 1:
            name = value.type.tensor_type.shape.dim[axis].dim_param or "unknown"
            raise InvalidModel(
                f"axis {axis} of input {value.name!r} is dynamic ({name}); only the batch axis "
                "may be: export the model with a fixed input shape"
            )


def _drop_identities(model: onnx.ModelProto) -> None:
    """Identity, and Dropout as it is at inference."""
    graph = model.graph
    outputs = {o.name for o in graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type in ("Identity", "Dropout") and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _replace_nodes(graph, kept)


def _free_batch_axis(model: onnx.ModelProto) -> None:
    """A model exported for one batch size repeats it in its Reshapes; -1 takes its place.

    Whether that was enough is for the loader to find out, by running two batch sizes.
    """
    graph = model.graph
    batch = shape_of(graph.input[0])[0]
    if batch < 1:
        return
    held = {tensor.name: tensor for tensor in graph.initializer}
    freed = {}
    for node in graph.node:
        shape = held.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None:
            continue
        target = numpy_helper.to_array(shape).copy()
        if len(target) > 1 and target[0] == batch and -1 not in target:
            target[0] = -1
            freed[f"{node.output[0]}/shape"] = target
            node.input[1] = f"{node.output[0]}/shape"
    _set_initializers(graph, freed)


def _require_finite(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise InvalidModel(
                f"weights {tensor.name!r} hold {bad} values that are NaN or infinite; "
                "train or export the model again"
            )


def _fold_batch_norms(model: onnx.ModelProto) -> None:
    """Write scale * (conv(x) - mean) / sqrt(var + eps) + shift into the Conv's weights."""
    view = GraphView(model)
    graph = model.graph
    kept, replaced = [], set()
    for node in graph.node:
        conv = view.producer.get(node.input[0]) if node.input else None
        if node.op_type != "BatchNormalization" or conv is None or not _folds(view, conv, node):
            kept.append(node)
            continue
        scale, shift, mean, var = (view.array(n).astype(np.float64) for n in node.input[1:5])
        gain = scale / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        weight = view.array(conv.input[1])
        bias = view.array(conv.input[2]) if len(conv.input) > 2 else np.zeros(len(gain))
        folded = (weight * gain.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        bias_name = f"{layer_name(conv.input[1])}.bias"
        replaced |= {conv.input[1], bias_name}
        new = {conv.input[1]: folded, bias_name: ((bias - mean) * gain + shift).astype(np.float32)}
        conv.input[:] = [conv.input[0], conv.input[1], bias_name]
        conv.output[0] = node.output[0]
        _set_initializers(graph, new)
    _replace_nodes(graph, kept)


def _folds(view: GraphView, conv: onnx.NodeProto, norm: onnx.NodeProto) -> bool:
    return (
        conv.op_type == "Conv"
        and view.only_consumer(conv.output[0]) is not None
        and all(view.is_constant(name) for name in (*conv.input[1:], *norm.input[1:5]) if name)
        and len(view.consumers[conv.input[1]]) == 1
    )


def _means_to_pools(model: onnx.ModelProto) -> None:
    """ReduceMean over both spatial axes is a GlobalAveragePool, which has an int8 kernel."""
    view = GraphView(_with_shapes(model))
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or attribute(node, "keepdims", 1) != 1:
            continue
        axes = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1 and view.is_constant(node.input[1]):
            axes = view.array(node.input[1]).tolist()
        if axes is None or view.rank(node.input[0]) != 4:
            continue
        if sorted(axis % 4 for axis in axes) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]
            del node.input[1:]


def _drop_unused_initializers(model: onnx.ModelProto) -> None:
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _name_weights_and_nodes(model: onnx.ModelProto) -> None:
    """Nodes are named after their layer or their output: exporters repeat or leave out names."""
    held = {i.name for i in model.graph.initializer}
    names = []
    for node in model.graph.node:
        has_weight = node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in held
        names.append(
            layer_name(node.input[1]) if has_weight else f"{node.op_type}:{node.output[0]}"
        )
    for node, name in zip(model.graph.node, unique_names(names), strict=True):
        node.name = name


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise InvalidModel(f"the shapes of the model do not fit together: {error}") from error
    return inferred


def _set_initializers(graph: onnx.GraphProto, arrays: dict[str, np.ndarray]) -> None:
    kept = [tensor for tensor in graph.initializer if tensor.name not in arrays]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    if len(nodes) != len(graph.node):
        kept = [helper.make_node("Identity", [], []) for _ in nodes]
        for copy, node in zip(kept, nodes, strict=True):
            copy.CopyFrom(node)
        del graph.node[:]
        graph.node.extend(kept)
