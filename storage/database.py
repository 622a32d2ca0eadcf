"""The one door to the database: opening, ownership, transactions, and errors of its driver.

Owns the engine and what a transaction means on each back end. Which rows exist is said in
`tables.py`, how they come to be in `schema.py`, what is done with them in `repository.py`.

SQLite: write-ahead log, every commit synced (`synchronous=FULL`), writers take the write lock
when they begin (`BEGIN IMMEDIATE`), one owning process per file. PostgreSQL: read committed,
rows locked by the statements that need it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, UOWTransaction, sessionmaker

from storage.errors import DatabaseFull, DatabaseLocked, DatabaseUnavailable, StorageError
from storage.ownership import Claim, FileOwnership
from storage.schema import migrate
from storage.tables import Base

BUSY_TIMEOUT_S: Final = 30.0  # other processes may read a file while its owner writes it
CONNECT_TIMEOUT_S: Final = 10
_RETRY_S: Final = 0.01
POOL_SIZE: Final = 8
POOL_OVERFLOW: Final = 32  # Starlette serves sync routes from 40 threads

_FULL: Final = ("database or disk is full", "no space left", "disk quota exceeded")
_FULL_SQLITE: Final = "SQLITE_IOERR_SHMSIZE"  # "disk I/O error": no room beside the file
_LOCKED: Final = ("database is locked", "database table is locked")


class Database:
    """An open database; safe to use from many threads; close it, or use it with `with`."""

    def __init__(self, engine: Engine, *, ownership: FileOwnership | None = None) -> None:
        self._engine = engine
        self._ownership = ownership
        self._name = engine.url.render_as_string(hide_password=True)
        self._read = sessionmaker(engine, expire_on_commit=False, autoflush=False)
        writing = engine.execution_options(sqlite_begin="IMMEDIATE")
        self._write = sessionmaker(writing, expire_on_commit=False)
        event.listen(self._write, "after_flush", _note_topics)
        in_memory = isinstance(engine.pool, StaticPool)
        # Writers of this process queue here and not in SQLite, whose waiting is a sleep; in
        # memory there is one connection, so that readers queue too.
        gate = threading.Lock() if engine.dialect.name == "sqlite" else contextlib.nullcontext()
        self._write_gate: contextlib.AbstractContextManager[Any] = gate
        self._read_gate: contextlib.AbstractContextManager[Any] = (
            gate if in_memory else contextlib.nullcontext()
        )

    @property
    def url(self) -> str:
        """Where the database is, without its password."""
        return self._name

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that sees one state of the database and changes nothing.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        with self._translating(), self._read_gate, self._read() as session:
            yield session

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction, committed at the end of the block, undone when the block raises.

        Raises:
            DatabaseUnavailable: the database does not answer, or its disk is full.
            DatabaseLocked: another process kept the write lock for too long.
        """
        with self._translating(), self._write_gate, self._write.begin() as session:
            yield session

    @property
    def may_be_shared(self) -> bool:
        """Other processes may write to it, too; a SQLite file has one owner."""
        return self._engine.dialect.name != "sqlite"

    def claim(self, what: str) -> Claim | None:
        """The right to do `what`, which one process has at a time; None where another has it.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        with self._translating():
            return Claim.acquire(self._engine, what)

    def close(self) -> None:
        """Close every connection and give up the ownership of the file."""
        self._engine.dispose()
        if self._ownership is not None:
            self._ownership.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise _translate(error, self._name) from error


def changed_topics(session: Session) -> list[str]:
    """The topics of the rows that a writing session added or changed, in alphabetical order."""
    return sorted(session.info.get("topics", ()))


def open_database(url: str, *, exclusive: bool = True) -> Database:
    """Open a database and bring it to this release's schema.

    Args:
        url: `sqlite:///PATH` (folders are made), `sqlite://` (in memory, for tests) or
            `postgresql+psycopg://USER:PASSWORD@HOST/NAME`.
        exclusive: Own the SQLite file until `close`, as a service does. PostgreSQL takes any
            number of clients, so there it changes nothing.

    Raises:
        DatabaseLocked: another process owns this SQLite file.
        DatabaseUnavailable: wrong URL, no answer, not a database, or a newer schema.
    """
    location = _parse(url)
    path = _sqlite_path(location)
    ownership = FileOwnership.acquire(path) if path is not None and exclusive else None
    name = location.render_as_string(hide_password=True)
    engine: Engine | None = None
    try:
        engine = _sqlite_engine(location) if _is_sqlite(location) else _server_engine(location)
        migrate(engine)
    except BaseException as error:
        if engine is not None:
            engine.dispose()
        if ownership is not None:
            ownership.release()
        if isinstance(error, SQLAlchemyError):
            raise _translate(error, name) from error
        raise
    return Database(engine, ownership=ownership)


def _parse(url: str) -> URL:
    hint = "use sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
    try:
        location = make_url(url)
    except ArgumentError as error:
        # The text is not repeated: it may hold a password.
        raise DatabaseUnavailable(f"the database URL cannot be read; {hint}") from error
    if location.get_backend_name() not in ("sqlite", "postgresql"):
        raise DatabaseUnavailable(
            f"{location.get_backend_name()!r} is not a database this project keeps; {hint}"
        )
    if _is_sqlite(location) and location.query:
        raise DatabaseUnavailable(f"a SQLite URL takes no options; {hint}")
    return location


def _is_sqlite(location: URL) -> bool:
    return location.get_backend_name() == "sqlite"


def _sqlite_path(location: URL) -> Path | None:
    if not _is_sqlite(location) or location.database in (None, "", ":memory:"):
        return None
    path = Path(str(location.database)).absolute()
    if path.is_dir():
        raise DatabaseUnavailable(f"{path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnavailable(f"cannot make the folder {path.parent}: {error}") from error
    return path


def _sqlite_engine(location: URL) -> Engine:
    arguments: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    if _sqlite_path(location) is None:
        arguments["poolclass"] = StaticPool
        arguments["connect_args"]["check_same_thread"] = False
    else:
        arguments |= {"pool_size": POOL_SIZE, "max_overflow": POOL_OVERFLOW}
    engine = create_engine(location, **arguments)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # The driver's own transactions begin late and not before DDL; None leaves BEGIN to us.
    connection.isolation_level = None
    _write_ahead(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _write_ahead(connection: Any) -> None:
    """Switch to the write-ahead log, however many switch a new file at the same time.

    Of connections that each read the file and want it for themselves SQLite refuses all but one
    at once, without the busy timeout: waiting would be a deadlock (sqlite.org/c3ref/busy_handler).
    """
    give_up_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if str(error) not in _LOCKED or time.monotonic() > give_up_s:
                raise
        time.sleep(_RETRY_S)


def _begin_sqlite(connection: Connection) -> None:
    kind = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
    connection.exec_driver_sql(f"BEGIN {kind}")


def _server_engine(location: URL) -> Engine:
    if location.drivername == "postgresql":
        location = location.set(drivername="postgresql+psycopg")
    try:
        return create_engine(
            location,
            pool_size=POOL_SIZE,
            max_overflow=POOL_OVERFLOW,
            pool_pre_ping=True,
            connect_args={"connect_timeout": CONNECT_TIMEOUT_S},
        )
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise DatabaseUnavailable(
            f"no driver for {location.drivername}; install edge-autotune[postgresql]"
        ) from error


def _note_topics(session: Session, _: UOWTransaction) -> None:
    changed = [*session.new, *(row for row in session.dirty if session.is_modified(row))]
    topics = {topic for row in changed if isinstance(row, Base) for topic in row.topics()}
    session.info.setdefault("topics", set()).update(topics)


def _translate(error: SQLAlchemyError, name: str) -> StorageError:
    # The driver's own words: SQLAlchemy's would add the statement and its parameters.
    cause = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    lowered = cause.lower()
    code = getattr(getattr(error, "orig", None), "sqlite_errorname", None)
    if code == _FULL_SQLITE or any(words in lowered for words in _FULL):
        return DatabaseFull(f"no room for {name}: {cause}; free some space and resume")
    if any(words in lowered for words in _LOCKED):
        return DatabaseLocked(f"{name} stayed locked for {BUSY_TIMEOUT_S:g} s: {cause}")
    if isinstance(error, DBAPIError | PoolTimeout):
        return DatabaseUnavailable(f"{name}: {cause}")
    return StorageError(f"{name}: {cause}")
