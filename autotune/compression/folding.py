"""Constant parts of a graph, computed once and kept as initializers.

Owns the evaluation alone. Exporters leave weights behind a Transpose, a Cast or a Reshape, and
Unsqueezes of shapes; a layer counts as one only where its weights are constant. Which graph
may come here is `requirements.py`'s to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autotune.compression.graph import model_bytes
from autotune.compression.session import Session
from autotune.errors import CompressionError, InvalidModel

# A constant that grows (ConstantOfShape, Expand, Tile) may be cheap to compute and dear to ship.
_MAX_GROWTH_BYTES = 1024 * 1024
_NAME_KEEPING = frozenset({"Cast", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace, in place, every node that depends on nothing but constants by its value.

    A weight that is only reshaped, transposed or cast keeps its name. What onnxruntime cannot
    compute stays as it is: the loader finds out when it runs the model.
    """
    graph = model.graph
    candidates = _constant_nodes(graph)
    values = _evaluated(model, candidates) if candidates else {}
    outputs = {value.name for value in graph.output}
    folded = [n for n in candidates if not outputs & set(n.output) and _is_small(n, values)]
    made = {name: node for node in folded for name in node.output if name}
    kept = [node for node in graph.node if not (node.output and node.output[0] in made)]
    used = {name for node in kept for name in node.input}
    names = _names(made, used)
    for name in used & set(made):
        tensor = numpy_helper.from_array(values[name], names[name])
        _replace_initializer(graph, tensor)
    for node in kept:
        node.input[:] = [names.get(name, name) for name in node.input]
    copies = [onnx.NodeProto() for _ in kept]
    for copy, node in zip(copies, kept, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def _constant_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    known = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.input and all(name in known for name in node.input if name):
            found.append(node)
            known.update(node.output)
    return found


def _evaluated(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> Mapping[str, np.ndarray]:
    """The value of everything that the nodes make; nothing where onnxruntime refuses them."""
    names = [name for node in nodes for name in node.output if name]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "constants",
        [],
        [helper.make_empty_tensor_value_info(name) for name in names],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        results = Session(model_bytes(part)).run({})
    except (CompressionError, InvalidModel):
        return {}
    return {
        name: value
        for name, value in zip(names, results, strict=True)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
    }


def _is_small(node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> bool:
    made = [name for name in node.output if name]
    if not all(name in values for name in made):
        return False
    taken = sum(values[name].nbytes for name in node.input if name in values)
    return (
        node.op_type in _NAME_KEEPING
        or sum(values[name].nbytes for name in made) <= taken + _MAX_GROWTH_BYTES
    )


def _names(made: Mapping[str, onnx.NodeProto], used: set[str]) -> dict[str, str]:
    """What each folded tensor is called: as the weight it comes from, where that is free."""
    names: dict[str, str] = {}
    claimed: set[str] = set()
    for name in made:
        root = name
        while root in made and made[root].op_type in _NAME_KEEPING:
            root = made[root].input[0]
        is_free = root not in made and root not in used and root not in claimed
        names[name] = root if is_free and name in used else name
        claimed.add(names[name])
    return names


def _replace_initializer(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    for held in graph.initializer:
        if held.name == tensor.name:
            held.CopyFrom(tensor)
            return
    graph.initializer.append(tensor)
