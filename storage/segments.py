"""Segments of an artifact: the parts that two candidates of a job have in common.

Owns where an ONNX file is cut. Candidates of one base differ in the weights and nodes of a few
groups; an agent that has one of them needs only the segments that it has never seen. Cuts
follow the content (each large constant alone, small fields gathered up to a cut that their own
bytes decide), so that a change in one place leaves the other segments as they were. Whether an
agent assembled the right file is decided by the file's sha256 alone, never by a segment's.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterator

from device_agents.segments import Segment

# Field numbers of onnx.proto: ModelProto.graph; a graph's nodes and constants are its fields.
_MODEL_GRAPH = 7
_BYTES = 2  # protobuf's wire type of everything with a length
_LARGE_BYTES = 1024
"""A field of this size is a segment of its own; its line in the list costs 3 % of it."""
_CUT_EVERY = 8
"""Small fields between two cuts, on average: about a kilobyte of nodes."""
_IDENTITY_DIGITS = 16
"""64 bits name a segment; should two ever share a name, the file's sha256 tells."""


def find_segments(data: bytes) -> tuple[Segment, ...]:
    """The segments whose concatenation is `data`; a file that is no ONNX model is one segment."""
    try:
        cuts = sorted({0, *_cuts(data), len(data)})
    except (IndexError, ValueError):
        cuts = [0, len(data)]
    view = memoryview(data)
    return tuple(
        _segment(view[start:end]) for start, end in itertools.pairwise(cuts) if end > start
    )


def _segment(part: memoryview) -> Segment:
    digest = hashlib.sha256(part).hexdigest()
    return Segment(identity=digest[:_IDENTITY_DIGITS], size_bytes=len(part))


def _cuts(data: bytes) -> Iterator[int]:
    """Where segments end, beside the file's own end."""
    for number, _, body, end in _fields(data, 0, len(data)):
        if number != _MODEL_GRAPH:
            continue
        yield body
        for _, field_start, _, field_end in _fields(data, body, end):
            if field_end - field_start >= _LARGE_BYTES:
                yield field_start
                yield field_end
            elif zlib.crc32(data[field_start:field_end]) % _CUT_EVERY == 0:
                yield field_end
        yield end


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, start, start of the content and end of each protobuf field.

    Raises:
        ValueError: this is not protobuf.
        IndexError: it ends in the middle of a field.
    """
    while start < end:
        tag, position = _varint(data, start)
        kind = tag & 7
        if kind == _BYTES:
            length, position = _varint(data, position)
            stop = position + length
        elif kind == 0:
            _, stop = _varint(data, position)
        elif kind in (1, 5):
            stop = position + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind} is none of protobuf 3")
        if stop > end:
            raise IndexError(stop)
        yield tag >> 3, start, position, stop
        start = stop


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A varint's value and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint has at most ten bytes")
