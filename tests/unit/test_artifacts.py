"""The artifact store: complete or not at all, and never the wrong bytes."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.artifacts import STALE_PART_S, ArtifactStore
from storage.errors import ArtifactDamaged, ArtifactStoreFull, NotFound, StorageError

DATA = b"a model" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def files(store: ArtifactStore) -> list[str]:
    """Every file below the store's folder, parts included."""
    return sorted(path.name for path in store.root.rglob("*") if path.is_file())


def test_what_is_put_is_read_back_under_its_sha256(store: ArtifactStore) -> None:
    stored = store.put(DATA)
    assert (stored.sha256, stored.size_bytes) == (SHA256, len(DATA))
    assert store.read(SHA256) == store.path(SHA256).read_bytes() == DATA
    assert store.has(SHA256)


def test_nothing_is_a_file_too(store: ArtifactStore) -> None:
    assert store.read(store.put(b"").sha256) == b""


def test_a_file_is_copied_in(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(DATA)
    assert store.put_file(source).sha256 == SHA256
    source.write_bytes(b"changed afterwards")
    assert store.read(SHA256) == DATA


def test_a_source_that_is_not_there_is_not_found(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.onnx"):
        store.put_file(tmp_path / "none.onnx")
    with pytest.raises(StorageError, match="cannot read"):
        store.put_file(tmp_path)


def test_the_same_bytes_are_kept_once(store: ArtifactStore) -> None:
    inode = store.path(store.put(DATA).sha256).stat().st_ino
    store.put(DATA)
    assert store.path(SHA256).stat().st_ino == inode
    assert files(store) == [SHA256]


def test_many_threads_may_put_the_same_bytes(store: ArtifactStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = {stored.sha256 for stored in pool.map(store.put, [DATA] * 16)}
    assert names == {SHA256}
    assert files(store) == [SHA256]


@pytest.mark.parametrize("name", ["0" * 64, "", "../../etc/passwd", SHA256.upper(), SHA256 + "\n"])
def test_what_the_store_does_not_have_is_not_found(store: ArtifactStore, name: str) -> None:
    store.put(DATA)
    assert not store.has(name)
    for ask in (store.path, store.read):
        with pytest.raises(NotFound):
            ask(name)


@pytest.mark.parametrize("altered", [DATA[:-1], DATA[:-1] + b"?", b""])
def test_altered_bytes_are_never_handed_out(store: ArtifactStore, altered: bytes) -> None:
    store.put(DATA)
    store.path(SHA256).write_bytes(altered)
    with pytest.raises(ArtifactDamaged, match=SHA256):
        store.read(SHA256)


@pytest.mark.parametrize("altered", [DATA[:-1], DATA[:-1] + b"?"])
def test_putting_the_bytes_again_repairs_a_damaged_file(
    store: ArtifactStore, altered: bytes
) -> None:
    store.put(DATA)
    store.path(SHA256).write_bytes(altered)
    store.put(DATA)
    assert store.read(SHA256) == DATA


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_so_and_leaves_nothing(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_: int) -> None:
        raise OSError(number, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ArtifactStoreFull, match="free some space"):
            store.put(DATA)
    assert not store.has(SHA256)
    assert files(store) == []
    assert store.put(DATA).sha256 == SHA256


def test_another_failure_of_the_disk_is_a_storage_error(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="input/output error") as caught:
        store.put(DATA)
    assert not isinstance(caught.value, ArtifactStoreFull)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        ArtifactStore(tmp_path / "file" / "artifacts")


def test_a_file_is_synced_before_it_appears(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        seen.append(store.has(SHA256))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    store.put(DATA)
    assert seen == [False, True, True]  # the part file, then the folders that name it


def test_parts_of_killed_writers_go_after_a_day_and_not_before(store: ArtifactStore) -> None:
    old, fresh = store.root / "parts" / "old", store.root / "parts" / "fresh"
    for part in (old, fresh):
        part.write_bytes(b"half")
    os.utime(old, (old.stat().st_atime, old.stat().st_mtime - STALE_PART_S - 60))
    ArtifactStore(store.root)
    assert files(store) == ["fresh"]
