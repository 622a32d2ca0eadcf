"""Files that are either there in full or not at all, also after a power cut.

Owns the one way this package writes durable files: part file, fsync, rename, fsync of the
folder; and what makes a file the newest of its folder. Used by the artifact cache, the outbox and
the identity.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from device_agents.errors import DeviceDiskFull

PART_SUFFIX = ".part"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What an `OSError` bears where the disk is full or the quota is used up."""
NO_ROOM_EXIT = os.EX_CANTCREAT
"""How a measuring child ends whose report found no room (sysexits.h)."""


@contextmanager
def durable_file(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` once the block ends without an error.

    Raises:
        DeviceDiskFull: no room, or the quota is used up; nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")
    with disk_errors(path):
        try:
            with os.fdopen(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb"
            ) as file:
                yield file
            finish(part, path)
        finally:
            part.unlink(missing_ok=True)


def finish(part: Path, path: Path) -> None:
    """Make a complete part file durable and give it its name."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def mark_newest(path: Path) -> None:
    """Give a file a later time than every other in its folder, whatever the clock says.

    A board without a clock of its own starts in the past until the network tells it the time.
    """
    others = (other.stat().st_mtime_ns for other in path.parent.iterdir() if other != path)
    stamp_ns = max(time.time_ns(), max(others, default=0) + 1)
    os.utime(path, ns=(stamp_ns, stamp_ns))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk, in the words of this package.

    Raises:
        DeviceDiskFull: no room, or the quota is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DeviceDiskFull(
                f"no room left in {path.parent}: free some space or lower the cache bound"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; a rename alone may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Delete what a killed process left half written."""
    for part in folder.glob(f"*{PART_SUFFIX}"):
        part.unlink(missing_ok=True)
