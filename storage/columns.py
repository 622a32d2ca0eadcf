"""Column types: how a value of the program is written in a database, the same on both back ends.

Documents are JSON text and not the back end's own JSON type, so that SQLite and PostgreSQL
keep exactly the same value (PostgreSQL's refuses NaN). Which columns there are is said in
`tables.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol, Self

from pydantic import BaseModel
from sqlalchemy import BigInteger, DateTime, Enum, Integer, String, Text, TypeDecorator
from sqlalchemy.engine import Dialect

from search_spaces.errors import SearchSpaceError
from storage.errors import StorageError

Serial = BigInteger().with_variant(Integer(), "sqlite")  # only INTEGER counts up on SQLite


class Documented(Protocol):
    """A value that writes itself as a JSON document and reads itself back."""

    def to_json(self) -> dict[str, Any]:
        """The document."""
        ...

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The value that `to_json` wrote."""
        ...


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware time, UTC in and out; a naive one is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The time in UTC, as the driver takes it."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; pass an aware time")
        in_utc = value.astimezone(UTC)
        return in_utc.replace(tzinfo=None) if dialect.name == "sqlite" else in_utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The time, aware and in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


class CleanText(TypeDecorator[str]):
    """Text from people and devices.

    What a UTF-8 database cannot hold (NUL on PostgreSQL, lone surrogates) is replaced.
    """

    impl = Text()
    cache_ok = True

    def process_bind_param(self, value: str | None, _: Dialect) -> str | None:
        """The text with what cannot be stored replaced."""
        if value is None:
            return None
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


class Json(TypeDecorator[Any]):
    """A plain JSON document; None is SQL's NULL; NaN and infinities survive."""

    impl = Text()
    cache_ok = True

    def process_bind_param(self, value: Any, _: Dialect) -> str | None:
        """The document as text."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, _: Dialect) -> Any:
        """The document."""
        return None if value is None else json.loads(value)


class Document(TypeDecorator[Any]):
    """A value with `to_json` and `from_json` (candidate, inventory, space, accuracy report)."""

    impl = Text()
    cache_ok = True

    def __init__(self, value_type: type[Documented]) -> None:
        super().__init__()
        self.value_type = value_type

    def process_bind_param(self, value: Documented | None, _: Dialect) -> str | None:
        """The value's document as text."""
        return None if value is None else json.dumps(value.to_json(), separators=(",", ":"))

    def process_result_value(self, value: str | None, _: Dialect) -> Any:
        """The value.

        Raises:
            StorageError: a newer release wrote it, or it was altered.
        """
        if value is None:
            return None
        with _reading(self.value_type):
            return self.value_type.from_json(json.loads(value))


class Documents(TypeDecorator[Any]):
    """A tuple of values with `to_json` and `from_json`."""

    impl = Text()
    cache_ok = True

    def __init__(self, value_type: type[Documented]) -> None:
        super().__init__()
        self.value_type = value_type

    def process_bind_param(self, value: Iterable[Documented] | None, _: Dialect) -> str:
        """The values' documents as a JSON array."""
        return json.dumps([entry.to_json() for entry in value or ()], separators=(",", ":"))

    def process_result_value(self, value: str | None, _: Dialect) -> Any:
        """The values.

        Raises:
            StorageError: a newer release wrote them, or they were altered.
        """
        with _reading(self.value_type):
            return tuple(self.value_type.from_json(entry) for entry in json.loads(value or "[]"))


class Message(TypeDecorator[Any]):
    """A pydantic message of the agent protocol."""

    impl = Text()
    cache_ok = True

    def __init__(self, message_type: type[BaseModel]) -> None:
        super().__init__()
        self.message_type = message_type

    def process_bind_param(self, value: BaseModel | None, _: Dialect) -> str | None:
        """The message as JSON text."""
        return None if value is None else json.dumps(value.model_dump(mode="json"))

    def process_result_value(self, value: str | None, _: Dialect) -> Any:
        """The message.

        Raises:
            StorageError: a newer release wrote it, or it was altered.
        """
        if value is None:
            return None
        with _reading(self.message_type):
            return self.message_type.model_validate(json.loads(value))


def enum_column(states: type[StrEnum]) -> Enum:
    """An enum stored as its value in a plain text column, so that a new member needs no DDL."""
    return Enum(
        states,
        native_enum=False,
        create_constraint=False,
        length=None,
        values_callable=lambda members: [member.value for member in members],
    )


def text_column() -> String:
    """An id, a digest or another name that this program made."""
    return String()


@contextlib.contextmanager
def _reading(value_type: type) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, SearchSpaceError) as error:
        raise StorageError(
            f"a stored {value_type.__name__} cannot be read ({error}); "
            "was it written by a newer release?"
        ) from error
