"""ONNX files assembled from parts that are already bytes.

A candidate differs from another in a few nodes and weights; copying every weight through
protobuf objects costs more than all the rest. Serialized protobuf fields may be joined, so
each part is serialized once and kept. The encoding is protobuf's own ("Encoding", Protocol
Buffers documentation: tag = number << 3 | 2 for bytes, then a varint length).
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.node and GraphProto.initializer.
_MODEL_GRAPH = 7
_GRAPH_NODE = 1
_GRAPH_INITIALIZER = 5


def node_field(node: onnx.NodeProto) -> bytes:
    """The node as a part of a graph."""
    return _field(_GRAPH_NODE, node.SerializeToString(deterministic=True))


def initializer_field(tensor: onnx.TensorProto) -> bytes:
    """The constant as a part of a graph."""
    return _field(_GRAPH_INITIALIZER, tensor.SerializeToString(deterministic=True))


def shell(model: onnx.ModelProto) -> tuple[bytes, bytes]:
    """The model without its graph, and the graph without nodes, constants and shapes."""
    outer = onnx.ModelProto()
    outer.CopyFrom(model)
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    outer.ClearField("graph")
    for name in ("node", "initializer", "value_info"):
        graph.ClearField(name)
    return outer.SerializeToString(deterministic=True), graph.SerializeToString(deterministic=True)


def assemble(outer: bytes, graph: bytes, parts: Iterable[bytes]) -> bytes:
    """The file: `shell`'s two halves with nodes and constants in the given order."""
    body = b"".join((graph, *parts))
    return b"".join((outer, _tag(_MODEL_GRAPH, len(body)), body))


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
