"""ONNX files assembled from parts that are already bytes.

A candidate differs from another in a few nodes and weights; copying every weight through
protobuf objects costs more than all the rest. Serialized protobuf fields may be joined, so
each part is serialized once and kept. The encoding is protobuf's own ("Encoding", Protocol
Buffers documentation: tag = number << 3 | 2 for bytes, then a varint length). Owns where the
bytes lie in memory too: beside the FP32 file they are nearly all that building one takes.
"""

from __future__ import annotations

import ctypes
import io
import mmap
from collections.abc import Iterable, Sequence
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
_OWN_PAGES_BYTES = 64 * 1024
_FRESH_PAGES_BYTES = 32 * 1024 * 1024
"""glibc never keeps a freed buffer from this size on (mallopt(3), M_MMAP_THRESHOLD's maximum)."""
_libc = ctypes.CDLL(None)

Part = bytes | memoryview


def node_field(node: onnx.NodeProto) -> bytes:
    """The node as a part of a graph."""
    return field(_GRAPH_NODE, node.SerializeToString(deterministic=True))


def initializer_field(tensor: onnx.TensorProto) -> bytes:
    """The constant as a part of a graph."""
    return field(_GRAPH_INITIALIZER, tensor.SerializeToString(deterministic=True))


def array_field(array: np.ndarray, name: str) -> Part:
    """`initializer_field` of an array's tensor, without the copies that making one takes.

    A large one has pages of its own, which the system takes back with it. Those who keep and
    drop such fields would else fill the heap with holes that no whole file fits into.
    """
    if array.dtype.isbuiltin != 1 or array.size == 0:
        return initializer_field(numpy_helper.from_array(array, name))
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    rest = onnx.TensorProto(dims=array.shape, data_type=data_type, name=name)
    head, values = _head(rest, data.nbytes), data.view(np.uint8).data
    if data.nbytes < _OWN_PAGES_BYTES:
        return head + values
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, len(head) + data.nbytes, flags=private)
    pages[: len(head)] = head
    pages[len(head) :] = values
    return memoryview(pages)


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
    length = len(graph) + sum(len(part) for part in held)
    return _joined((outer, _tag(_MODEL_GRAPH, length), graph, *held))


def settle_allocator(largest_bytes: int) -> None:
    """Have candidates of up to that size share one place in memory, one after the other.

    glibc gives a buffer above a threshold pages of its own, and raises the threshold to that
    buffer's size when it is freed (mallopt(3), M_MMAP_THRESHOLD). Candidates of growing size
    would lie now beside the heap, now in it, and the heap would keep the room of the largest
    one all the while: 15 MB more for mobilenet_v2. Pages that nobody writes to cost nothing.
    """
    room = bytes(largest_bytes) if largest_bytes < _FRESH_PAGES_BYTES else b""
    del room


def _joined(pieces: Sequence[Part]) -> bytes:
    """The pieces in one buffer of the right size.

    A large one lies on pages that the process never had before, and asking for 45 MB of those
    4 KiB at a time takes four times as long (20 against 5 ms) as filling them in huge pages.
    """
    size = sum(len(piece) for piece in pieces)
    if size < _FRESH_PAGES_BYTES:
        return b"".join(pieces)
    room = bytes(size)  # not touched yet
    _advise_huge_pages(room)
    file = io.BytesIO(room)
    del room  # it is the file's alone, which writes into it instead of a copy
    for piece in pieces:
        file.write(piece)
    return file.getvalue()


def _advise_huge_pages(room: bytes) -> None:
    """Ask for huge pages under a buffer (madvise(2)); where there are none, nothing happens."""
    madvise, advice = getattr(_libc, "madvise", None), getattr(mmap, "MADV_HUGEPAGE", None)
    if madvise is None or advice is None:
        return
    start = ctypes.cast(ctypes.c_char_p(room), ctypes.c_void_p).value or 0
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + len(room)) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _copy_fields(source: Any, target: Any, without: set[str]) -> None:
    """Copy a message's fields but some, without touching the weights in those."""
    for described, value in source.ListFields():
        if described.name in without:
            continue
        if hasattr(value, "MergeFrom"):
            getattr(target, described.name).MergeFrom(value)
        else:
            setattr(target, described.name, value)


def field(number: int, payload: bytes) -> bytes:
    """A field that has a length: a message, a text or bytes."""
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
