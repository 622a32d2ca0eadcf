"""Artifacts on the device, by sha256: verified, bounded, safe against a kill at any moment.

Owns the files and which of them go when there is no room. Where the bytes come from is the
caller's business (`connection.py`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from device_agents.errors import ArtifactCorrupt, DeviceDiskFull
from device_agents.files import durable_file, remove_parts

DEFAULT_MAX_BYTES = 2 * 2**30


class ArtifactCache:
    """A folder of artifacts that holds at most `max_bytes`; the least recently used go first."""

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        remove_parts(folder)

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
        os.utime(path)
        return path

    def put(
        self,
        sha256: str,
        chunks: Iterable[bytes],
        *,
        size_bytes: int,
        keep: Iterable[str] = (),
    ) -> Path:
        """Store an artifact that arrives in chunks.

        `keep` names artifacts that must not be evicted to make room.

        Raises:
            ArtifactCorrupt: the bytes do not have that digest or size; nothing is stored.
            DeviceDiskFull: it does not fit, on the disk or within the bound.
        """
        self._make_room(size_bytes, keep={sha256, *keep})
        digest, n_bytes = hashlib.sha256(), 0
        path = self._folder / sha256
        with durable_file(path) as file:
            for chunk in chunks:
                n_bytes += len(chunk)
                if n_bytes > size_bytes:
                    raise ArtifactCorrupt(
                        f"{sha256[:8]} is longer than the {size_bytes} bytes promised"
                    )
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256:
                raise ArtifactCorrupt(
                    f"{n_bytes} bytes arrived with sha256 {digest.hexdigest()[:8]}..., promised "
                    f"were {size_bytes} bytes with {sha256[:8]}..."
                )
        return path

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
            if path.name not in keep:
                path.unlink(missing_ok=True)
