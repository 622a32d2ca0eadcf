"""The sensitivities of a job as a table: groups in graph order, one column per choice.

Owns the order and the words; the heat map and the command line show the same table. Works on
records and on the API's shapes alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from search_spaces import LayerInventory, Precision


class Entry(Protocol):
    """What a cell needs to know."""

    @property
    def group(self) -> str:
        """The layer group, or the prunable group."""

    @property
    def precision(self) -> str | None:
        """The precision's short name; None for a prune ratio."""

    @property
    def prune_ratio(self) -> float | None:
        """The fraction of channels; None for a precision."""

    @property
    def mean_kl(self) -> float | None:
        """In nats; None where it is not known."""

    @property
    def is_estimate(self) -> bool:
        """No output was compared."""


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Generic[E]):
    """`cells` by (row, column); a combination that does not exist has none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    n_precisions: int
    cells: dict[tuple[str, str], E]

    def cell(self, row: str, column: str) -> E | None:
        """The entry, if there is one."""
        return self.cells.get((row, column))


def in_order(entries: Iterable[E], inventory: LayerInventory | None) -> list[E]:
    """The entries by group in graph order, precisions by falling bits, then rising ratios.

    Without an inventory, groups come in the order of their first entry.
    """
    listed = list(entries)
    rank: dict[str, int] = {}
    for group in () if inventory is None else inventory.groups:
        # A prunable group bears the name of a layer, which may belong to another group.
        for name in (group.name, *(layer.name for layer in group.layers)):
            rank.setdefault(name, len(rank))
    for entry in listed:
        rank.setdefault(entry.group, len(rank))
    return sorted(listed, key=lambda e: (rank[e.group], e.group, _column_rank(e)))


def table(entries: Sequence[E]) -> Table[E]:
    """The table of entries that are in order."""
    by_column = {column_title(e): e for e in entries}
    columns = sorted(by_column, key=lambda title: _column_rank(by_column[title]))
    return Table(
        rows=tuple(dict.fromkeys(e.group for e in entries)),
        columns=tuple(columns),
        n_precisions=sum(by_column[title].precision is not None for title in columns),
        cells={(e.group, column_title(e)): e for e in entries},
    )


def column_title(entry: Entry) -> str:
    """What the column is called: `w8a8`, `prune 25%`."""
    return entry.precision or f"prune {100 * (entry.prune_ratio or 0.0):g}%"


def cell_text(entry: Entry | None) -> str:
    """The divergence in two digits, `~` before an estimate; `-` where there is none."""
    if entry is None or entry.mean_kl is None:
        return "-"
    return f"{'~' if entry.is_estimate else ''}{entry.mean_kl:.1e}"


def _column_rank(entry: Entry) -> tuple[bool, float, str]:
    if entry.precision is None:
        return True, entry.prune_ratio or 0.0, ""
    precision = Precision.parse(entry.precision)
    # Weights first: they are what the columns fall by; activations break the tie.
    return False, -(100 * precision.weight_bits + precision.activation_bits), entry.precision
