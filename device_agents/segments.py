"""Which bytes of an artifact are on this device already, as parts of other artifacts.

Owns the plan of a download: pieces to copy from artifacts in the cache and ranges to fetch.
Which bytes are a segment is the service's decision; that the assembled file is right is
decided by its sha256 in `cache.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SMALLEST_COPY_BYTES = 512
"""A shorter local piece between two ranges is fetched with them: a request costs about as much."""
MOST_REQUESTS = 32
"""Each range is a round trip; on a slow line with 100 ms these are 3 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of an artifact, by content."""

    identity: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a segment's bytes lie on this device."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes `start` to `stop` of the artifact; `place` is None where they must be fetched."""

    start: int
    stop: int
    place: Place | None


def places(artifacts: Mapping[Path, Sequence[Segment]]) -> dict[str, Place]:
    """Every segment of the artifacts in a cache."""
    found: dict[str, Place] = {}
    for path, segments in artifacts.items():
        offset = 0
        for segment in segments:
            found.setdefault(segment.identity, Place(path=path, offset=offset))
            offset += segment.size_bytes
    return found


def plan(segments: Iterable[Segment], known: Mapping[str, Place], *, offset: int) -> list[Piece]:
    """The pieces from byte `offset` on, in order; ranges that nearly touch are one."""
    pieces = list(_pieces(segments, known, offset))
    smallest = SMALLEST_COPY_BYTES
    merged = _merged(pieces, smallest)
    while sum(piece.place is None for piece in merged) > MOST_REQUESTS:
        smallest *= 2
        merged = _merged(pieces, smallest)
    return merged


def _pieces(
    segments: Iterable[Segment], known: Mapping[str, Place], offset: int
) -> Iterator[Piece]:
    start = 0
    for segment in segments:
        stop = start + segment.size_bytes
        if stop > offset:
            place, skipped = known.get(segment.identity), max(offset - start, 0)
            if place is not None:
                place = Place(path=place.path, offset=place.offset + skipped)
            yield Piece(start=start + skipped, stop=stop, place=place)
        start = stop


def _merged(pieces: Sequence[Piece], smallest: int) -> list[Piece]:
    """Ranges joined with each other, and with local pieces too short to be worth a gap."""
    merged: list[Piece] = []
    for piece in _joined_copies(pieces):
        is_fetched = piece.place is None or piece.stop - piece.start < smallest
        if is_fetched and merged and merged[-1].place is None:
            merged[-1] = Piece(start=merged[-1].start, stop=piece.stop, place=None)
        else:
            merged.append(
                Piece(start=piece.start, stop=piece.stop, place=None if is_fetched else piece.place)
            )
    return merged


def _joined_copies(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Local pieces that lie side by side in one file, as one."""
    held: Piece | None = None
    for piece in pieces:
        if held is not None and _continues(held, piece):
            held = Piece(start=held.start, stop=piece.stop, place=held.place)
            continue
        if held is not None:
            yield held
        held = piece
    if held is not None:
        yield held


def _continues(before: Piece, after: Piece) -> bool:
    if before.place is None or after.place is None:
        return before.place is after.place
    length = before.stop - before.start
    return (
        before.place.path == after.place.path and before.place.offset + length == after.place.offset
    )
