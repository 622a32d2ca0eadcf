"""The fields of a serialized protobuf message, found without parsing what is in them.

Owns reading the encoding (Protocol Buffers documentation, "Encoding"). An ONNX file of hundreds
of megabytes is taken apart by it without a copy of its weights: `segments.py` cuts files for
transfer, `autotune.compression` reads models. Writing fields is `autotune.compression.wire`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_LONGEST_VARINT = 10  # bytes of a 64-bit number


class Field(NamedTuple):
    """One field of a message; both views share the message's memory.

    `whole` is the field with its tag, `content` what stands behind tag and length.
    """

    number: int
    whole: memoryview
    content: memoryview


def fields(message: memoryview) -> Iterator[Field]:
    """The message's fields in order; joined, their `whole` is the message.

    Raises:
        ValueError: these bytes are no protobuf message, or one that was cut off.
    """
    start, length = 0, len(message)
    while start < length:
        tag, content = _varint(message, start)
        kind = tag & 7
        if kind == _BYTES:
            size, content = _varint(message, content)
            end = content + size
        elif kind == _VARINT:
            _, end = _varint(message, content)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            end = content + (8 if kind == _EIGHT_BYTES else 4)
        else:
            raise ValueError(f"wire type {kind} is none of protobuf 3's: 0, 1, 2 and 5")
        if end > length:
            raise ValueError(f"a field ends at byte {end} of a message of {length} bytes")
        yield Field(tag >> 3, message[start:end], message[content:end])
        start = end


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at that place, and the place behind it."""
    value = 0
    for place, byte in enumerate(message[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError(f"the number at byte {at} does not end within {_LONGEST_VARINT} bytes")
