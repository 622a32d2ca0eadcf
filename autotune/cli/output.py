"""Printing data: `table` for people, `json`, `jsonl` and `csv` for programs.

Owns the four formats, not what they show: `views.py` says which columns a noun has. The
machine formats are stable: JSON is the API's own shape, CSV has one plain figure per column
with the unit in its name.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TextIO, TypeVar

Row = TypeVar("Row")
Scalar = str | float | int | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column(Generic[Row]):
    """A column for people: a title with the unit, and the text of a row."""

    title: str
    text: Callable[[Row], str]
    right: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Field(Generic[Row]):
    """A column for programs: a name that ends in the unit, and the bare value of a row."""

    name: str
    value: Callable[[Row], Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class View(Generic[Row]):
    """How rows of one kind are shown. `style` colours a row on a terminal."""

    columns: Sequence[Column[Row]]
    fields: Sequence[Field[Row]]
    document: Callable[[Row], dict[str, Any]]
    style: Callable[[Row], str | None] = lambda _row: None


def print_rows(view: View[Row], rows: Sequence[Row], *, output_format: str, to: TextIO) -> None:
    """Write the rows; an empty sequence is an empty list, or a header alone."""
    if output_format == "json":
        _write_json([view.document(row) for row in rows], to)
    elif output_format == "jsonl":
        for row in rows:
            to.write(json.dumps(view.document(row), ensure_ascii=False) + "\n")
    elif output_format == "csv":
        _write_csv(view, rows, to)
    else:
        _write_table(view, rows, to)


def print_one(view: View[Row], row: Row, *, output_format: str, to: TextIO) -> None:
    """Write a single row: as an object in JSON, as lines `title  text` in a table."""
    if output_format == "json":
        _write_json(view.document(row), to)
    elif output_format == "table":
        lines = [(column.title, column.text(row)) for column in view.columns]
        width = max((cell_width(title) for title, _ in lines), default=0)
        for title, text in lines:
            to.write(f"{pad(title, width)}  {text}".rstrip() + "\n")
    else:
        print_rows(view, [row], output_format=output_format, to=to)


def _write_json(document: object, to: TextIO) -> None:
    to.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _write_csv(view: View[Row], rows: Sequence[Row], to: TextIO) -> None:
    writer = csv.writer(to, lineterminator="\n")
    writer.writerow([field.name for field in view.fields])
    for row in rows:
        writer.writerow([_csv_cell(field.value(row)) for field in view.fields])


def _csv_cell(value: Scalar) -> Scalar:
    """Booleans as JSON writes them; a missing figure is an empty cell, never 0."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value


def _write_table(view: View[Row], rows: Sequence[Row], to: TextIO) -> None:
    if to.isatty():
        _write_rich_table(view, rows, to)
        return
    titles = [column.title for column in view.columns]
    cells = [[column.text(row) for column in view.columns] for row in rows]
    widths = [max(map(cell_width, column)) for column in zip(titles, *cells, strict=True)]
    for line in [titles, *cells]:
        padded = [
            pad(text, width, right=column.right)
            for text, width, column in zip(line, widths, view.columns, strict=True)
        ]
        to.write("  ".join(padded).rstrip() + "\n")


def _write_rich_table(view: View[Row], rows: Sequence[Row], to: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in view.columns:
        justify = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        cells = [Text(column.text(row)) for column in view.columns]
        table.add_row(*cells, style=view.style(row))
    Console(file=to).print(table)


def cell_width(text: str) -> int:
    """Columns that the text takes on a terminal; wide characters take two, accents none."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def pad(text: str, width: int, *, right: bool = False) -> str:
    """The text filled with blanks up to `width` columns."""
    blanks = " " * max(0, width - cell_width(text))
    return blanks + text if right else text + blanks
