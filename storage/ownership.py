"""Who may do what only one may: write a SQLite file, or run a job of a shared database.

A SQLite file has one owner, held by a lock on a side file. The lock is the kernel's (`flock`): it
ends with the process, also after SIGKILL, so there is nothing to clean up. The side file stays,
because removing it would let two processes lock two files of the same name; its text (who owns
the database) is for people. In PostgreSQL, which any number of services may use, each job is
claimed by itself, with a lock that ends with the service's connection.
"""

from __future__ import annotations

import fcntl
import os
import socket
import zlib
from pathlib import Path
from typing import Self

from sqlalchemy import Connection, Engine, func, select

from storage.errors import DatabaseLocked, DatabaseUnavailable

_CLAIMS = 1
"""The first of the two numbers of a claim's lock; the second says what is claimed."""


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


class Claim:
    """What this process alone does until `release`, the end of a `with` block, or its own end."""

    def __init__(self, connection: Connection | None) -> None:
        self._connection = connection

    @classmethod
    def acquire(cls, engine: Engine, what: str) -> Self | None:
        """Claim `what`, without waiting; None where another process has it.

        It takes a connection of its own, whose session has the lock. A SQLite file's owner has
        claimed all of it.
        """
        if engine.dialect.name != "postgresql":
            return cls(None)
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            # Migrations and turns lock single numbers; two numbers are another space of locks.
            key = zlib.crc32(what.encode()) - 2**31
            is_ours = connection.scalar(select(func.pg_try_advisory_lock(_CLAIMS, key)))
            if is_ours:
                # The pool may have another one: this one is closed with the claim.
                connection.detach()
                return cls(connection)
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
