"""What the modules of the nouns share: rows to records, references to rows, locks on rows.

Nothing here begins or ends a transaction; `repository.py` does.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.errors import NotFound
from storage.tables import Base

RowT = TypeVar("RowT", bound=Base)
RecordT = TypeVar("RecordT")


def to_record(record_type: type[RecordT], row: Base) -> RecordT:
    """The frozen record of a row: a row's attributes carry the names of the record's fields."""
    names = [field.name for field in fields(record_type)]  # type: ignore[arg-type]  # dataclasses
    return record_type(**{name: getattr(row, name) for name in names})


def change(row: Base, changes: Mapping[str, Any], *, allowed: Iterable[str]) -> None:
    """Set attributes of a row.

    Raises:
        TypeError: a name is not one of those allowed.
    """
    for name in changes.keys() - set(allowed):
        raise TypeError(f"{type(row).__tablename__}: {name!r} cannot be changed")
    for name, value in changes.items():
        setattr(row, name, value)


def locked(session: Session, row_type: type[RowT], condition: ColumnElement[bool]) -> RowT | None:
    """The one row, locked against other writers until the transaction ends.

    SQLite has locked the whole database by then (`BEGIN IMMEDIATE`). PostgreSQL takes
    `FOR NO KEY UPDATE`, which lets other transactions insert rows that refer to this one.
    """
    statement = select(row_type).where(condition).with_for_update(key_share=True)
    return session.scalars(statement).one_or_none()


def locked_by_id(session: Session, row_type: type[RowT], noun: str, record_id: str) -> RowT:
    """The row of that id, locked.

    Raises:
        NotFound: there is none.
    """
    row = locked(session, row_type, _column(row_type, "id") == record_id)
    if row is None:
        raise NotFound(f"there is no {noun} {record_id!r}")
    return row


def take_turns(session: Session, what: str) -> None:
    """Wait until no other transaction that takes turns on `what` is open.

    SQLite writes one transaction at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(zlib.crc32(what.encode()))))


def referred(session: Session, row_type: type[RowT], noun: str, reference: str) -> RowT:
    """The row that a person means.

    By its id, else by its name (the newest of that name), else by the beginning of its id
    where only one begins so.

    Raises:
        NotFound: nothing, or more than one id, fits; the message names what comes close.
    """
    ids, names = _column(row_type, "id"), _column(row_type, "name")
    newest = select(row_type).order_by(_column(row_type, "serial").desc()).limit(1)
    for condition in (ids == reference, names == reference):
        row = session.scalars(newest.where(condition)).one_or_none()
        if row is not None:
            return row
    rows = by_prefix(session, select(row_type), ids, reference)
    if len(rows) == 1:
        return rows[0]
    if rows:
        fitting = ", ".join(sorted(str(getattr(row, "id", "")) for row in rows))
        raise NotFound(f"{reference!r} begins more than one {noun} id: {fitting}, ...")
    known = {str(value) for pair in session.execute(select(ids, names)) for value in pair}
    raise NotFound(f"there is no {noun} {reference!r}{close_to(reference, known)}")


def by_prefix(
    session: Session, statement: Select[RowT], ids: InstrumentedAttribute[str], prefix: str
) -> list[RowT]:
    """Up to five rows whose id begins so; none for an empty beginning."""
    if not prefix:
        return []
    begins = ids.startswith(prefix.lower(), autoescape=True)
    return list(session.scalars(statement.where(begins).limit(5)))


def close_to(wanted: str, known: Iterable[str]) -> str:
    """What to add to a message about a name that does not exist: the names that come close."""
    close = difflib.get_close_matches(wanted, sorted(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _column(row_type: type[Base], name: str) -> InstrumentedAttribute[Any]:
    column: InstrumentedAttribute[Any] = getattr(row_type, name)
    return column
