"""One artifact onto this device: what is here already is copied, the rest is fetched by range.

Owns the order of the bytes. Storing and verifying them is `cache.py`'s, the requests are
`connection.py`'s, when to try again is `agent.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from device_agents.cache import ArtifactCache
from device_agents.connection import ServiceConnection
from device_agents.protocol import ArtifactReference
from device_agents.segments import Piece, Place, Segment, plan

COPY_BYTES = 1 << 18


class Transfer:
    """Fetches artifacts into a cache; a broken one goes on where it stopped."""

    def __init__(self, connection: ServiceConnection, cache: ArtifactCache) -> None:
        self._connection = connection
        self._cache = cache

    def fetch(
        self, artifact: ArtifactReference, *, keep: Sequence[str] = (), in_parts: bool = True
    ) -> Path:
        """The artifact in the cache, verified. `in_parts`: use what other artifacts here share.

        Raises:
            ServiceUnreachable: the connection broke; what arrived is kept.
            ArtifactCorrupt: the bytes are not the artifact; try again with `in_parts` off.
            ArtifactMissing: the service does not have it.
            DeviceDiskFull: it does not fit.
        """
        sha256, size_bytes = artifact.sha256, artifact.size_bytes
        segments = self._connection.segments(sha256) if in_parts else ()
        if sum(segment.size_bytes for segment in segments) != size_bytes:
            segments = ()
        offset = min(self._cache.received_bytes(sha256), size_bytes)
        whole = (Segment(identity=sha256, size_bytes=size_bytes),)
        known = self._cache.places() if segments else {}
        pieces = plan(segments or whole, known, offset=offset)
        sources = {piece.place.path.name for piece in pieces if piece.place is not None}
        path = self._cache.put(
            sha256,
            (chunk for piece in pieces for chunk in self._bytes(artifact, piece)),
            size_bytes=size_bytes,
            offset=offset,
            keep={*keep, *sources},
        )
        if segments:
            self._cache.keep_segments(sha256, segments)
        return path

    def _bytes(self, artifact: ArtifactReference, piece: Piece) -> Iterator[bytes]:
        if piece.place is not None:
            yield from _copied(piece.place, piece.stop - piece.start)
            return
        stop = None if piece.stop == artifact.size_bytes else piece.stop
        with self._connection.download(artifact.sha256, offset=piece.start, stop=stop) as found:
            # A proxy that knows no ranges sends the file from its start.
            yield from _window(found.chunks, piece.start - found.offset, piece.stop - piece.start)


def _copied(place: Place, length: int) -> Iterator[bytes]:
    with place.path.open("rb") as file:
        file.seek(place.offset)
        while length > 0:
            chunk = file.read(min(length, COPY_BYTES))
            if not chunk:
                return  # shorter than it was: the digest will tell
            length -= len(chunk)
            yield chunk


def _window(chunks: Iterator[bytes], skip: int, length: int) -> Iterator[bytes]:
    """`length` bytes of the stream behind the first `skip`; longer answers are cut."""
    for chunk in chunks:
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        part = chunk[skip : skip + length]
        skip, length = 0, length - len(part)
        yield part
        if length <= 0:
            return
