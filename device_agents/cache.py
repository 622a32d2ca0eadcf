"""Artifacts on the device, by sha256: verified, bounded, safe against a kill at any moment.

Owns the files, the parts of those that are still arriving, and which of them go when there is
no room. Where the bytes come from is the caller's business (`connection.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from device_agents.errors import ArtifactCorrupt, DeviceDiskFull
from device_agents.files import PART_SUFFIX, disk_errors, durable_file, finish, mark_newest
from device_agents.segments import Place, Segment, places

DEFAULT_MAX_BYTES = 2 * 2**30
LIST_SUFFIX = ".segments"


class ArtifactCache:
    """A folder of artifacts that holds at most `max_bytes`; the least recently used go first.

    More only while one measurement needs more at once: its candidate, its reference and the
    artifacts that lend them parts. The next one to arrive brings it back within the bound.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, sha256: str) -> Path | None:
        """The artifact, verified and marked as just used; None if it is not here.

        A file that no longer has its digest (a worn-out memory card) is deleted and not here.
        """
        path = self._folder / sha256
        if not path.is_file():
            return None
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            path.unlink(missing_ok=True)
            return None
        mark_newest(path)
        return path

    def received_bytes(self, sha256: str) -> int:
        """How much of the artifact has arrived already; 0 where nothing has."""
        part = self._part(sha256)
        return part.stat().st_size if part.is_file() else 0

    def put(
        self,
        sha256: str,
        chunks: Iterable[bytes],
        *,
        size_bytes: int,
        offset: int = 0,
        keep: Iterable[str] = (),
    ) -> Path:
        """Store an artifact that arrives in chunks, from byte `offset` on.

        What has arrived before `chunks` fails is kept for the next try, also over a restart.
        `offset` is 0 or at most `received_bytes`. `keep` names artifacts that must not be
        evicted to make room.

        Raises:
            ArtifactCorrupt: the bytes do not have that digest or size; nothing is kept.
            DeviceDiskFull: it does not fit, on the disk or within the bound.
        """
        self._make_room(size_bytes, keep={sha256, *keep})
        part, path = self._part(sha256), self._folder / sha256
        try:
            with disk_errors(part):
                self._receive(part, chunks, offset=offset, size_bytes=size_bytes)
                self._require_digest(part, sha256, size_bytes)
                finish(part, path)
        except DeviceDiskFull:
            part.unlink(missing_ok=True)
            raise
        mark_newest(path)
        return path

    @staticmethod
    def _receive(part: Path, chunks: Iterable[bytes], *, offset: int, size_bytes: int) -> None:
        with part.open("r+b" if offset else "wb") as file:
            file.truncate(offset)
            file.seek(offset)
            for chunk in chunks:
                file.write(chunk)
                if file.tell() > size_bytes:
                    return  # too long already: the digest will not fit

    def _require_digest(self, part: Path, sha256: str, size_bytes: int) -> None:
        n_bytes = part.stat().st_size
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == sha256:
            return
        part.unlink()
        if n_bytes > size_bytes:
            raise ArtifactCorrupt(f"{sha256[:8]} is longer than the {size_bytes} bytes promised")
        raise ArtifactCorrupt(
            f"{n_bytes} bytes arrived with sha256 {found[:8]}..., promised were {size_bytes} "
            f"bytes with {sha256[:8]}..."
        )

    def _part(self, sha256: str) -> Path:
        return self._folder / f"{sha256}{PART_SUFFIX}"

    def keep_segments(self, sha256: str, segments: Sequence[Segment]) -> None:
        """Remember what an artifact here is made of, for the next one that shares parts."""
        listed = [[segment.identity, segment.size_bytes] for segment in segments]
        with durable_file(self._list_of(sha256)) as file:
            file.write(json.dumps(listed).encode())

    def places(self) -> dict[str, Place]:
        """Where the segments of all artifacts here lie; a list that is damaged is left out."""
        known: dict[Path, list[Segment]] = {}
        for listed in self._folder.glob(f"*{LIST_SUFFIX}"):
            artifact = listed.with_name(listed.name.removesuffix(LIST_SUFFIX))
            with contextlib.suppress(OSError, ValueError, TypeError):
                pairs = json.loads(listed.read_bytes())
                segments = [Segment(identity=str(n), size_bytes=int(size)) for n, size in pairs]
                if artifact.stat().st_size == sum(s.size_bytes for s in segments):
                    known[artifact] = segments
        return places(known)

    def _list_of(self, sha256: str) -> Path:
        return self._folder / f"{sha256}{LIST_SUFFIX}"

    def clear(self) -> None:
        """Delete every artifact."""
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """Bytes of all artifacts here."""
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def _make_room(self, size_bytes: int, *, keep: set[str]) -> None:
        if size_bytes > self._max_bytes:
            raise DeviceDiskFull(
                f"the artifact has {size_bytes} bytes, the cache is bounded to {self._max_bytes}"
            )
        oldest_first = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in oldest_first:
            if self.size_bytes() + size_bytes <= self._max_bytes:
                return
            if path.name.partition(".")[0] not in keep:
                path.unlink(missing_ok=True)
