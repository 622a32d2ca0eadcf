"""Printing data: `table` for people, `json`, `jsonl` and `csv` for programs.

Owns the four formats, not what they show: `views.py` says which columns a noun has. The
machine formats are stable: JSON is the API's own shape, CSV has one plain figure per column
with the unit in its name.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TextIO, TypeVar

Row = TypeVar("Row")
Scalar = str | float | int | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column(Generic[Row]):
    """A column for people: a title with the unit, and the text of a row.

    A secondary column is the first to go where a terminal is too narrow.
    """

    title: str
    text: Callable[[Row], str]
    right: bool = False
    secondary: bool = False


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
        write_json([view.document(row) for row in rows], to)
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
        write_json(view.document(row), to)
    elif output_format == "table":
        lines = [(column.title, column.text(row)) for column in view.columns]
        width = max((cell_width(title) for title, _ in lines), default=0)
        for title, text in lines:
            to.write(f"{pad(title, width)}  {text}".rstrip() + "\n")
    else:
        print_rows(view, [row], output_format=output_format, to=to)


def write_json(document: object, to: TextIO) -> None:
    """Write one document, as the machine format has it."""
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
    columns = [
        _Filled(column=column, cells=[column.text(row) for row in rows]) for column in view.columns
    ]
    if to.isatty():
        _write_rich_table(columns, [view.style(row) for row in rows], to)
        return
    for number in range(-1, len(rows)):
        padded = [
            pad(filled.line(number), filled.width, right=filled.column.right) for filled in columns
        ]
        to.write("  ".join(padded).rstrip() + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filled:
    """A column with its cells."""

    column: Column[Any]
    cells: Sequence[str]

    def line(self, number: int) -> str:
        """The cell of that row; the title where it is -1."""
        return self.column.title if number < 0 else self.cells[number]

    @property
    def width(self) -> int:
        """The width of the widest line in it."""
        texts = [self.column.title, *self.cells]
        return max(cell_width(line) for text in texts for line in text.split("\n"))

    def stacked(self) -> _Filled:
        """The same with intervals below their figures and lists one entry to a line."""
        column = replace(self.column, title=_BREAKS.sub("\n", self.column.title))
        return _Filled(column=column, cells=[_BREAKS.sub("\n", cell) for cell in self.cells])


# Before a bracket, after one, and after a comma that is in none.
_BREAKS = re.compile(r" (?=[\[(])|(?<=\]) |(?<=,) (?![^\[]*\])")
_GAP = 2


def _write_rich_table(columns: Sequence[_Filled], styles: Sequence[str | None], to: TextIO) -> None:
    """A table that fits the terminal: in one line per row, else stacked, else with less in it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=to)
    shown, dropped = _fitted(columns, console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for filled in shown:
        justify = "right" if filled.column.right else "left"
        title = Text(filled.column.title)
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for number, style in enumerate(styles):
        table.add_row(*(Text(filled.line(number)) for filled in shown), style=style)
    console.print(table)
    if dropped:
        console.print(f"no room for: {', '.join(dropped)}; -o csv has everything", style="dim")


def _fitted(columns: Sequence[_Filled], width: int) -> tuple[list[_Filled], list[str]]:
    """The columns as they fit into `width`, and the titles of those that do not."""

    def fits(some: Sequence[_Filled]) -> bool:
        return sum(filled.width + _GAP for filled in some) <= width

    if fits(columns):
        return list(columns), []
    shown = [filled.stacked() for filled in columns]
    dropped: list[str] = []
    while not fits(shown):
        secondary = [n for n, filled in enumerate(shown) if filled.column.secondary]
        if not secondary:
            break
        title = shown.pop(secondary[-1]).column.title
        dropped.insert(0, title.partition("\n")[0])
    return shown, dropped


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
