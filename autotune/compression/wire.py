"""ONNX files assembled from parts that are already bytes.

A candidate differs from another in a few nodes and weights; copying every weight through
protobuf objects costs more than all the rest. Serialized protobuf fields may be joined, so
each part is serialized once and kept. The encoding is protobuf's own ("Encoding", Protocol
Buffers documentation: tag = number << 3 | 2 for bytes, then a varint length).
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.node, GraphProto.initializer,
# TensorProto.raw_data.
_MODEL_GRAPH = 7
_GRAPH_NODE = 1
_GRAPH_INITIALIZER = 5
_TENSOR_RAW_DATA = 9
_LEAST_SOURCE_BYTES = 4096


def node_field(node: onnx.NodeProto) -> bytes:
    """The node as a part of a graph."""
    return _field(_GRAPH_NODE, node.SerializeToString(deterministic=True))


def initializer_field(tensor: onnx.TensorProto) -> bytes:
    """The constant as a part of a graph."""
    return _field(_GRAPH_INITIALIZER, tensor.SerializeToString(deterministic=True))


def array_field(array: np.ndarray, name: str) -> bytes:
    """`initializer_field` of an array's tensor, without the copies that making one takes."""
    if array.dtype.isbuiltin != 1 or array.size == 0:
        return initializer_field(numpy_helper.from_array(array, name))
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    rest = onnx.TensorProto(dims=array.shape, data_type=data_type, name=name)
    return b"".join((_head(rest, data.nbytes), data.view(np.uint8).data))


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A constant of the source model: all but its data as bytes, the data where it is.

    Keeping it as bytes would hold the model's weights twice.
    """

    head: bytes
    tensor: onnx.TensorProto
    size: int


Part = bytes | memoryview | SourceTensor


def source_field(tensor: onnx.TensorProto) -> bytes | SourceTensor:
    """A source model's constant as a part of a graph; small ones are bytes at once."""
    size = len(tensor.raw_data)
    if size < _LEAST_SOURCE_BYTES:
        return initializer_field(tensor)
    rest = onnx.TensorProto()
    _copy_fields(tensor, rest, {"raw_data"})
    return SourceTensor(head=_head(rest, size), tensor=tensor, size=size)


def _head(rest: onnx.TensorProto, size: int) -> bytes:
    """A constant up to its raw data, which comes last."""
    inner = rest.SerializeToString(deterministic=True) + _tag(_TENSOR_RAW_DATA, size)
    return _tag(_GRAPH_INITIALIZER, len(inner) + size) + inner


def shell(model: onnx.ModelProto) -> tuple[bytes, bytes]:
    """The model without its graph, and the graph without nodes, constants and shapes."""
    outer, graph = onnx.ModelProto(), onnx.GraphProto()
    _copy_fields(model, outer, {"graph"})
    _copy_fields(model.graph, graph, {"node", "initializer", "value_info"})
    return outer.SerializeToString(deterministic=True), graph.SerializeToString(deterministic=True)


def assemble(outer: bytes, graph: bytes, parts: Iterable[Part]) -> bytes:
    """The file: `shell`'s two halves with nodes and constants in the given order."""
    held = list(parts)
    length = len(graph) + sum(_length(part) for part in held)
    tag = _tag(_MODEL_GRAPH, length)
    # One buffer of the right size, filled piece by piece: the file exists once, and what a
    # growing buffer leaves behind would stay with the process.
    file = io.BytesIO()
    file.seek(len(outer) + len(tag) + length - 1)
    file.write(b"\0")
    file.seek(0)
    for piece in (outer, tag, graph, *held):
        if isinstance(piece, SourceTensor):
            file.write(piece.head)
            file.write(piece.tensor.raw_data)
        else:
            file.write(piece)
    return file.getvalue()


def _length(part: Part) -> int:
    if isinstance(part, SourceTensor):
        return len(part.head) + part.size
    return len(part)


def _copy_fields(source: Any, target: Any, without: set[str]) -> None:
    """Copy a message's fields but some, without touching the weights in those."""
    for field, value in source.ListFields():
        if field.name in without:
            continue
        if hasattr(value, "MergeFrom"):
            getattr(target, field.name).MergeFrom(value)
        else:
            setattr(target, field.name, value)


def _field(number: int, payload: bytes) -> bytes:
    return _tag(number, len(payload)) + payload


def _tag(number: int, length: int) -> bytes:
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the least significant ones first.

    >>> _varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
