"""The artifact store: files by content, in a folder.

A file is named by the sha256 of its bytes, so that it can neither be overwritten by another
nor change unnoticed. It appears complete or not at all: part file, fsync, rename, fsync of
the folder. What a file is for is noted in the repository (`record_artifact`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from device_agents.files import NO_ROOM
from storage.errors import ArtifactDamaged, ArtifactStoreFull, NotFound, StorageError

CHUNK_BYTES: Final = 1 << 20
STALE_PART_S: Final = 24 * 3600.0  # no file takes a day to write: its writer was killed

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArtifact:
    """A file that the store has."""

    sha256: str
    size_bytes: int


class ArtifactStore:
    """Files below one folder; safe for threads and processes that share it.

    Args:
        root: The folder, made if it is missing.

    Raises:
        StorageError: the folder cannot be made; ArtifactStoreFull where the disk is full.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._parts = self.root / "parts"
        with _translated(self.root):
            self._parts.mkdir(parents=True, exist_ok=True)
            self._remove_stale_parts()

    def put(self, data: bytes) -> StoredArtifact:
        """Keep these bytes; durable when it returns; the same bytes again cost one reading.

        Raises:
            ArtifactStoreFull: the disk is full; nothing was kept.
        """
        return self._keep((data,))

    def put_file(self, path: Path) -> StoredArtifact:
        """Keep a copy of a file of any size.

        Raises:
            NotFound: there is no such file.
            ArtifactStoreFull: the disk is full; nothing was kept.
        """
        try:
            source = Path(path).open("rb")  # noqa: SIM115 - closed by the block below
        except FileNotFoundError as error:
            raise NotFound(f"there is no file {path}") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error}") from error
        with source:
            return self._keep(iter(lambda: source.read(CHUNK_BYTES), b""))

    def path(self, sha256: str) -> Path:
        """Where the file lies; read it, never write it. Not verified: see `read`.

        Raises:
            NotFound: the store does not have it, or this is not a sha256 in lowercase hex.
        """
        path = self._place(sha256)
        if not path.is_file():
            raise NotFound(f"the artifact store has no file {sha256}")
        return path

    def read(self, sha256: str) -> bytes:
        """The bytes, verified.

        Raises:
            NotFound: the store does not have it.
            ArtifactDamaged: the bytes have another sha256.
        """
        path = self.path(sha256)
        with _translated(path):
            data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise ArtifactDamaged(
                f"{path} should have sha256 {sha256} and has {found} ({len(data)} bytes); "
                "remove it and resume the job, which builds it again"
            )
        return data

    def verified_path(self, sha256: str) -> Path:
        """Where the file lies, its bytes read once and verified; for readers of files.

        Raises:
            NotFound: the store does not have it.
            ArtifactDamaged: the bytes have another sha256.
        """
        path = self.path(sha256)
        with _translated(path), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise ArtifactDamaged(
                f"the service's copy of sha256:{sha256} was altered (it has {found} now); submit "
                "the job again, which sends the file anew"
            )
        return path

    def has(self, sha256: str) -> bool:
        """Whether the store has a file of that name; not verified."""
        return _SHA256.fullmatch(sha256) is not None and self._place(sha256).is_file()

    def _place(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise NotFound(f"{sha256!r} is not a sha256 in lowercase hex")
        return self.root / sha256[:2] / sha256

    def _keep(self, chunks: Iterable[bytes]) -> StoredArtifact:
        part = self._parts / f"{os.getpid()}-{secrets.token_hex(8)}"
        with _translated(self.root):
            try:
                stored = _write(part, chunks)
                place = self._place(stored.sha256)
                if not _is_intact(place, stored):
                    place.parent.mkdir(exist_ok=True)
                    part.replace(place)
                    _sync_folder(place.parent)
                    _sync_folder(self.root)
            finally:
                part.unlink(missing_ok=True)
        return stored

    def _remove_stale_parts(self) -> None:
        oldest = time.time() - STALE_PART_S
        for part in self._parts.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process removes them too
                if part.stat().st_mtime < oldest:
                    part.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """A file of a store, for another process that sees the store's folder to read."""

    store: ArtifactStore
    sha256: str

    def read(self) -> bytes:
        """The bytes, verified; raises what `ArtifactStore.read` does."""
        return self.store.read(self.sha256)


def _write(path: Path, chunks: Iterable[bytes]) -> StoredArtifact:
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return StoredArtifact(sha256=digest.hexdigest(), size_bytes=size_bytes)


def _is_intact(path: Path, expected: StoredArtifact) -> bool:
    try:
        if path.stat().st_size != expected.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256
    except FileNotFoundError:
        return False


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise ArtifactStoreFull(
                f"no room for an artifact below {path}; free some space and resume the job"
            ) from error
        raise StorageError(f"cannot use {path}: {error}") from error
