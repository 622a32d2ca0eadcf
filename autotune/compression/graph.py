"""A read-only view of one ONNX graph: who makes a tensor, who takes it, shapes and weights.

Owns look-ups, and the one way a model becomes bytes. Cleaning a foreign graph is
`cleanup.py`'s work, writing a quantized one `quantization.py`'s.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autotune.errors import InvalidModel

BATCH_AXIS = "N"
_LARGEST_SHAPE = 64
# Constants up to this many values may be shapes, axes or indices, which decide other shapes.
_HELD_BYTES = 64 * 1024
# Weights are in the graph already; copies of all of them would double a worker's memory.
_WEIGHT_SUFFIXES = (".weight", "_weight", "/weight", ".kernel", "/kernel", "_W", ".W")


class GraphView:
    """Look-ups over a graph that nobody changes while the view is in use.

    Nodes keep their graph order, which ONNX requires to be topological. `weights` has the values
    of constants that the model itself does not hold (`fp32_file.py`).
    """

    def __init__(
        self, model: onnx.ModelProto, weights: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.model = model
        self._weights = weights or {}
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.producer: dict[str, onnx.NodeProto] = {
            name: node for node in self.nodes for name in node.output if name
        }
        self.consumers: Mapping[str, list[onnx.NodeProto]] = self._find_consumers()
        self.input_name = model.graph.input[0].name
        self.output_name = model.graph.output[0].name
        self._shapes = {value.name: shape_of(value) for value in self._values()}
        noted = {value.name: _noted_sample_shape(value) for value in self._values()}
        self._sample_shapes = {name: shape for name, shape in noted.items() if shape is not None}
        self._types = {v.name: int(v.type.tensor_type.elem_type) for v in self._values()}
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str) -> np.ndarray:
        """The constant of that name, read-only; a small one is read once, a large one a view."""
        held = self._arrays.get(name)
        if held is not None:
            return held
        if name in self._weights:
            return self._weights[name]
        array = numpy_helper.to_array(self.initializers[name])
        if array.nbytes <= _HELD_BYTES:
            self._arrays[name] = array
        return array

    def is_constant(self, name: str) -> bool:
        """The tensor is an initializer."""
        return name in self.initializers

    def data_inputs(self, node: onnx.NodeProto) -> list[str]:
        """The tensors that flow into the node, without constants and absent inputs."""
        return [name for name in node.input if name and name not in self.initializers]

    def only_consumer(self, tensor: str) -> onnx.NodeProto | None:
        """The one node that takes the tensor; None where several do or it is an output."""
        takers = self.consumers.get(tensor, [])
        if tensor == self.output_name or len(takers) != 1:
            return None
        return takers[0]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape without the batch axis; an unknown extent is 0, an unknown rank ()."""
        return self._shapes.get(tensor, ())[1:]

    def rank(self, tensor: str) -> int:
        """Number of axes with the batch axis; 0 where unknown."""
        return len(self._shapes.get(tensor, ()))

    def sample_shape(self, tensor: str) -> tuple[int, ...]:
        """The shape for one sample, without the batch axis wherever it is; () where unknown.

        An axis that holds the batch times something else stays, with one sample's extent:
        `(17 * N, 768)` is `(17, 768)`.
        """
        noted = self._sample_shapes.get(tensor)
        if noted is not None:
            return noted
        single, double = (shapes.get(tensor, ()) for shapes in self._shapes_of_batches)
        if len(single) != len(double):
            return ()
        pairs = zip(single, double, strict=True)
        return tuple(one for one, two in pairs if (one, two) != (1, 2))

    @functools.cached_property
    def _shapes_of_batches(self) -> tuple[Mapping[str, tuple[int, ...]], ...]:
        """Every shape for one sample and for two.

        ONNX's inference fills its tables of operators at first use, 6 MB of them, and walks the
        whole graph: it is asked only for a shape that the graph does not note.
        """
        light = _without_large_constants(self.model)
        return tuple(_shapes_for(light, batch) for batch in (1, 2))

    def element_type(self, tensor: str) -> int:
        """The `TensorProto.DataType` of a tensor or constant; UNDEFINED where unknown."""
        if tensor in self.initializers:
            return int(self.initializers[tensor].data_type)
        return self._types.get(tensor, onnx.TensorProto.UNDEFINED)

    def _values(self) -> Iterator[onnx.ValueInfoProto]:
        graph = self.model.graph
        yield from graph.value_info
        yield from graph.input
        yield from graph.output

    def _find_consumers(self) -> Mapping[str, list[onnx.NodeProto]]:
        takers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                if name:
                    takers[name].append(node)
        return dict(takers)


def _without_large_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its weights as inputs: shapes follow from theirs, not from their values."""
    graph = model.graph
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _LARGEST_SHAPE:
            light.graph.initializer.append(tensor)
        else:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.append(value)
    return light


def _shapes_for(light: onnx.ModelProto, batch: int) -> dict[str, tuple[int, ...]]:
    for value in (light.graph.input[0], light.graph.output[0]):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    return {v.name: shape_of(v) for v in (*graph.value_info, *graph.input, *graph.output)}


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The shape with its batch axis; a symbolic or unknown extent is 0."""
    return tuple(int(d.dim_value) for d in value.type.tensor_type.shape.dim)


def _noted_sample_shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The shape without the batch axis; None where an extent is unknown."""
    axes = value.type.tensor_type.shape.dim
    extents = tuple(int(axis.dim_value) for axis in axes if axis.dim_param != BATCH_AXIS)
    return extents if axes and all(extents) else None


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default where it is not set."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def layer_name(weight: str) -> str:
    """The name of the layer that owns a weight: the initializer's name without its suffix.

    >>> layer_name("features.3.conv.0.weight"), layer_name("dense_1/kernel"), layer_name("w7")
    ('features.3.conv.0', 'dense_1', 'w7')
    """
    for suffix in _WEIGHT_SUFFIXES:
        if weight.endswith(suffix) and len(weight) > len(suffix):
            return weight.removesuffix(suffix)
    return weight


def unique_names(names: Sequence[str]) -> list[str]:
    """The names in order, a repeated one with `#2`, `#3` behind it.

    >>> unique_names(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: dict[str, int] = defaultdict(int)
    taken = set(names)
    result = []
    for name in names:
        seen[name] += 1
        unique = name
        while seen[name] > 1 and (unique == name or unique in taken):
            unique = f"{name}#{seen[name]}"
            if unique in taken:
                seen[name] += 1
        taken.add(unique)
        result.append(unique)
    return result


def model_bytes(model: onnx.ModelProto) -> bytes:
    """The model as a file; the same model gives the same bytes in every process.

    Raises:
        InvalidModel: it exceeds what one file can hold (2 GiB).
    """
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except Exception as error:
        # protobuf raises its own EncodeError or a ValueError, depending on the back end
        raise InvalidModel(
            f"the model does not fit into one ONNX file (2 GiB at most): {error}"
        ) from error
