"""One owner per SQLite file, held by a lock on a side file.

The lock is the kernel's (`flock`): it ends with the process, also after SIGKILL, so there is
nothing to clean up. The side file stays, because removing it would let two processes lock two
files of the same name; its text (who owns the database) is for people.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import Self

from storage.errors import DatabaseLocked, DatabaseUnavailable


class FileOwnership:
    """The right to write one database file."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor: int | None = descriptor
        self.path = path

    @classmethod
    def acquire(cls, database: Path) -> Self:
        """Take the lock beside the database, without waiting.

        Raises:
            DatabaseLocked: another process has it.
            DatabaseUnavailable: the side file cannot be written.
        """
        path = database.with_name(database.name + ".lock")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DatabaseUnavailable(f"cannot open {path}: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise DatabaseLocked(
                f"{database} belongs to another service ({owner or 'starting'}); "
                "stop it, use it through its URL, or give this one another --database-url"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return cls(descriptor, path)

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
