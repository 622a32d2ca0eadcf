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
from storage.protobuf import fields

# Field numbers of onnx.proto: ModelProto.graph; a graph's nodes and constants are its fields.
_MODEL_GRAPH = 7
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
    except ValueError:
        cuts = [0, len(data)]
    view = memoryview(data)
    return tuple(
        _segment(view[start:end]) for start, end in itertools.pairwise(cuts) if end > start
    )


def _segment(part: memoryview) -> Segment:
    digest = hashlib.sha256(part).hexdigest()
    return Segment(identity=digest[:_IDENTITY_DIGITS], size_bytes=len(part))


def _cuts(data: bytes) -> Iterator[int]:
    """Where segments end, beside the file's own end.

    Raises:
        ValueError: this is no protobuf message.
    """
    start = 0
    for field in fields(memoryview(data)):
        end = start + len(field.whole)
        if field.number == _MODEL_GRAPH:
            yield from _cuts_in_graph(field.content, end - len(field.content))
            yield end
        start = end


def _cuts_in_graph(graph: memoryview, start: int) -> Iterator[int]:
    """Cuts in the file, in which the graph begins at `start`."""
    yield start
    for _, whole, _ in fields(graph):
        end = start + len(whole)
        if len(whole) >= _LARGE_BYTES:
            yield start
            yield end
        elif zlib.crc32(whole) % _CUT_EVERY == 0:
            yield end
        start = end
