"""The FP32 model as the file that it is: large constants stay in the file's bytes.

Owns reading such a file without a second copy of its weights: the model as protobuf objects has
none, the weights are views of the file, and a candidate takes them over field by field. Looking
things up in the model is `graph.py`'s business, writing candidates `quantization.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from autotune.compression.wire import field
from autotune.errors import CompressionError
from storage.protobuf import fields

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
LARGE_BYTES = 4096
"""A constant from this size on stays where it is; smaller ones may be shapes or bounds, which
other code reads again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp32File:
    """A model's file, taken apart without copying it.

    `light` is the model without the values of its large constants; `constants` has every
    constant as a field of the graph, `weights` the values of the large ones, read-only. Both are
    views of `file`; an array may begin at any byte, aligned or not.
    """

    file: bytes
    light: onnx.ModelProto
    constants: Mapping[str, memoryview]
    weights: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, file: bytes) -> Fp32File:
        """The parts of the file.

        Raises:
            CompressionError: it is no ONNX model.
        """
        constants: dict[str, memoryview] = {}
        weights: dict[str, np.ndarray] = {}
        try:
            light = b"".join(_light_model(memoryview(file), constants, weights))
            model = onnx.ModelProto.FromString(light)
        except Exception as error:
            # protobuf's DecodeError has no public base class beside Exception
            raise CompressionError(f"this is no ONNX file: {error}") from error
        return cls(file=file, light=model, constants=constants, weights=weights)


def _light_model(
    file: memoryview, constants: dict[str, memoryview], weights: dict[str, np.ndarray]
) -> Iterator[bytes | memoryview]:
    """The file's fields, the graph without large values; fills `constants` and `weights`."""
    for number, whole, content in fields(file):
        if number == _MODEL_GRAPH:
            yield field(number, b"".join(_light_graph(content, constants, weights)))
        else:
            yield whole


def _light_graph(
    graph: memoryview, constants: dict[str, memoryview], weights: dict[str, np.ndarray]
) -> Iterator[bytes | memoryview]:
    for number, whole, content in fields(graph):
        if number != _GRAPH_INITIALIZER:
            yield whole
            continue
        rest = [f.whole for f in fields(content) if f.number != _TENSOR_RAW_DATA]
        tensor = onnx.TensorProto.FromString(b"".join(rest))
        raw = next((f.content for f in fields(content) if f.number == _TENSOR_RAW_DATA), None)
        constants[tensor.name] = whole
        if raw is None or not _is_large_array(tensor, len(raw)):
            yield whole
            continue
        weights[tensor.name] = _array(tensor, raw)
        yield field(number, b"".join(rest))


def _is_large_array(tensor: onnx.TensorProto, n_bytes: int) -> bool:
    """It is worth a view, and numpy has the type: neither bfloat16 nor packed codes."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    fits = dtype.itemsize * math.prod(tensor.dims) == n_bytes
    return n_bytes >= LARGE_BYTES and dtype.isbuiltin == 1 and fits


def _array(tensor: onnx.TensorProto, data: memoryview) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
    return np.frombuffer(data, dtype, count=math.prod(tensor.dims)).reshape(tuple(tensor.dims))
