"""One normal form for FP32 graphs, whatever exported them.

Owns the rewriting: functions inlined, constants folded into initializers, BatchNorm folded,
global means as GlobalAveragePool, one input with a symbolic batch axis, every other extent
static, notes of the exporter removed. What is refused is `requirements.py`'s; `graph.py`
reads the result.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from autotune.compression.artifact_names import TAKEN_SUFFIXES
from autotune.compression.folding import fold_constants
from autotune.compression.graph import (
    BATCH_AXIS,
    GraphView,
    attribute,
    layer_name,
    shape_of,
    unique_names,
)
from autotune.compression.padding import fold_pads
from autotune.compression.requirements import (
    WEIGHTED,
    called,
    fix_sample_axes,
    require_float32_layers,
    require_inference,
    require_one_input_and_output,
    require_plain_float,
    require_usable_constants,
)
from autotune.compression.shapes import complete_shapes
from autotune.errors import InvalidModel

MIN_OPSET = 13
# Per-channel QuantizeLinear/DequantizeLinear exist since opset 13 (ONNX operator changelog).


def clean_up(
    model: onnx.ModelProto, *, input_shape: tuple[int, ...] | None = None
) -> onnx.ModelProto:
    """The model in normal form; a copy.

    `input_shape` is one sample's shape: it takes the place of dynamic axes other than the
    batch's.

    Raises:
        InvalidModel: it is quantized already, has control flow, several inputs or outputs,
            dynamic axes that no data explains, layers that are not float32, or weights that
            are not finite; the message names the node, input or weights.
    """
    model = _inlined(model)
    require_plain_float(model)
    model = _modern_opset(model)
    _drop_notes(model)
    _constants_to_initializers(model)
    require_one_input_and_output(model.graph)
    fix_sample_axes(model.graph, input_shape)
    _drop_identities(model)
    fold_constants(model)
    _drop_dead_nodes(model)
    _free_batch_axis(model)
    require_usable_constants(model.graph)
    fold_pads(model)
    _fold_batch_norms(model)
    _means_to_pools(model)
    _drop_unused_initializers(model)
    _free_taken_names(model)
    _name_weights_and_nodes(model)
    model = _with_shapes(model)
    complete_shapes(model)
    require_float32_layers(model)
    return model


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every call of a model-local function is replaced by its nodes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if not copy.functions:
        return copy
    try:
        return onnx.inliner.inline_local_functions(copy)
    except (RuntimeError, ValueError) as error:
        names = ", ".join(sorted({repr(f.name) for f in copy.functions}))
        raise InvalidModel(f"the model's functions {names} cannot be inlined: {error}") from error


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
        value = _constant(node)
        if value is None:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    _replace_nodes(graph, kept)
    # Before IR version 4 every initializer had to be an input too.
    model.ir_version = max(model.ir_version, 4)
    held = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in held]
    del graph.input[:]
    graph.input.extend(inputs)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """What a Constant holds, in any of the ways it may be written but sparse and text."""
    if node.op_type != "Constant":
        return None
    for entry in node.attribute:
        value = helper.get_attribute_value(entry)
        if entry.name == "value":
            return value
        if entry.name in ("value_float", "value_floats"):
            return numpy_helper.from_array(np.asarray(value, np.float32))
        if entry.name in ("value_int", "value_ints"):
            return numpy_helper.from_array(np.asarray(value, np.int64))
    return None


def _drop_identities(model: onnx.ModelProto) -> None:
    """Identity, and Dropout as it is at inference."""
    graph = model.graph
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer if not i.dims}
    require_inference(graph.node, held)
    kept_names = {o.name for o in graph.output} | {
        name for node in graph.node if node.op_type == "Dropout" for name in node.output[1:]
    }
    used = {name for node in graph.node for name in node.input}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        passes = node.op_type in ("Identity", "Dropout") and node.output[0] not in kept_names
        if passes and not used & set(node.output[1:]):
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _replace_nodes(graph, kept)


def _drop_dead_nodes(model: onnx.ModelProto) -> None:
    """Nothing that the output does not depend on is quantized, calibrated or counted."""
    graph = model.graph
    needed = {o.name for o in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    _replace_nodes(graph, kept[::-1])


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


def _fold_batch_norms(model: onnx.ModelProto) -> None:
    """Write scale * (conv(x) - mean) / sqrt(var + eps) + shift into the Conv's weights."""
    before = len(model.graph.node)
    _fold_batch_norms_once(model)
    if len(model.graph.node) < before:
        _fold_batch_norms(model)  # two in a row


def _fold_batch_norms_once(model: onnx.ModelProto) -> None:
    view = GraphView(model)
    graph = model.graph
    kept = []
    for node in graph.node:
        conv = view.producer.get(node.input[0]) if node.input else None
        if node.op_type != "BatchNormalization" or conv is None or not _folds(view, conv, node):
            kept.append(node)
            continue
        scale, shift, mean, var = (view.array(n).astype(np.float64) for n in node.input[1:5])
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = scale / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        weight = view.array(conv.input[1])
        has_bias = len(conv.input) > 2 and conv.input[2]
        bias = view.array(conv.input[2]) if has_bias else np.zeros(len(gain))
        with np.errstate(over="ignore", invalid="ignore"):
            folded = (weight * gain.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
            moved = ((bias - mean) * gain + shift).astype(np.float32)
        if not (np.isfinite(folded).all() and np.isfinite(moved).all()):
            raise InvalidModel(
                f"{called(node)} cannot be folded into {called(conv)}: its statistics make the "
                "weights infinite or NaN; train the model again or repair its running variance"
            )
        bias_name = _bias_name(view, conv)
        new = {conv.input[1]: folded, bias_name: moved}
        conv.input[:] = [conv.input[0], conv.input[1], bias_name]
        conv.output[0] = node.output[0]
        _set_initializers(graph, new)
    _replace_nodes(graph, kept)


def _bias_name(view: GraphView, conv: onnx.NodeProto) -> str:
    """The bias is named after the layer, unless another node uses that name."""
    name = f"{layer_name(conv.input[1])}.bias"
    takers = view.consumers.get(name, [])
    is_free = name not in view.producer and all(node is conv for node in takers)
    return name if is_free else f"{conv.output[0]}/folded_bias"


def _folds(view: GraphView, conv: onnx.NodeProto, norm: onnx.NodeProto) -> bool:
    return (
        conv.op_type == "Conv"
        and view.only_consumer(conv.output[0]) is not None
        and all(view.is_constant(name) for name in (*conv.input[1:], *norm.input[1:5]) if name)
        and len(view.consumers[conv.input[1]]) == 1
        and norm.input[0] == conv.output[0]
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


def _free_taken_names(model: onnx.ModelProto) -> None:
    """Rename a tensor called as a candidate would call one that belongs to another tensor."""
    graph = model.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    renamed = {
        name: "|".join(name.rsplit("/", 1))
        for name in dict.fromkeys(names)
        if name.endswith(TAKEN_SUFFIXES) and name not in kept
    }
    fresh = unique_names([*dict.fromkeys(n for n in names if n not in renamed), *renamed.values()])
    renamed = dict(zip(renamed, fresh[len(fresh) - len(renamed) :], strict=True))
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)


def _name_weights_and_nodes(model: onnx.ModelProto) -> None:
    """Nodes are named after their layer or their output: exporters repeat or leave out names."""
    held = {i.name for i in model.graph.initializer}
    names = []
    for node in model.graph.node:
        has_weight = node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in held
        names.append(_layer_of(node) if has_weight else f"{node.op_type}:{node.output[0]}")
    for node, name in zip(model.graph.node, unique_names(names), strict=True):
        node.name = name


def _layer_of(node: onnx.NodeProto) -> str:
    """The layer's name as its weights have it; where they have a mere number, as its node has it.

    Files hold weights called `layer1.0.conv1.weight`, but also `onnx::Conv_193` or `W7`.
    """
    name = layer_name(node.input[1])
    return node.name if name == node.input[1] and node.name else name


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
