"""The exact minimum of a sum of tables over single choices and pairs of them.

Owns the elimination: one factor after the other is minimized away, which leaves a table over
the factors that it was linked with (bucket elimination, Dechter 1999, "Bucket elimination: a
unifying framework for reasoning", section 3). A network is nearly a chain, so those tables stay
small; where they would not, there is no answer here. Many sums over the same pairs are
minimized at once. What the tables mean is `improvement.py`'s knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

LARGEST_TABLE = 5_000
"""Cells of a table that elimination may make for one sum: some 0.1 ms for a dozen of them."""

_Table = tuple[tuple[int, ...], np.ndarray]
"""The factors that a table is over, and `(n_sums, options, ...)` with an axis for each."""


@lru_cache(maxsize=16)
def elimination_order(
    sizes: tuple[int, ...], pairs: tuple[tuple[int, int], ...]
) -> tuple[int, ...] | None:
    """All factors, the cheapest to eliminate first; None where a table would be too large.

    Kept, because what is linked changes far less often than what the links cost.
    """
    linked: list[set[int]] = [set() for _ in sizes]
    for first, second in pairs:
        linked[first].add(second)
        linked[second].add(first)
    left, order = set(range(len(sizes))), list[int]()
    cost = [_cells(sizes, column, linked) for column in left]
    while left:
        column = min(left, key=lambda c: (cost[c], c))
        if cost[column] > LARGEST_TABLE:
            return None
        order.append(column)
        left.remove(column)
        for other in linked[column]:
            linked[other] |= linked[column] - {other}
            linked[other].discard(column)
        for other in linked[column]:
            cost[other] = _cells(sizes, other, linked)
    return tuple(order)


def _cells(sizes: Sequence[int], column: int, linked: Sequence[set[int]]) -> int:
    return math.prod([sizes[column], *(sizes[other] for other in linked[column])])


def minima(
    singles: Sequence[np.ndarray],
    pairs: Mapping[tuple[int, int], np.ndarray],
    order: Sequence[int],
) -> np.ndarray:
    """Per sum the point at which it is least, `(n_sums, n_factors)`.

    Args:
        singles: per factor `(n_sums, options)`.
        pairs: per pair `(n_sums, options of the first, options of the second)`.
        order: of `elimination_order`.

    >>> single = [np.array([[0.0, 1.0]]), np.array([[0.0, -1.0]])]
    >>> minima(single, {(0, 1): np.array([[[0.0, 3.0], [0.0, 0.0]]])}, [0, 1]).tolist()
    [[0, 0]]
    """
    tables: list[_Table] = [((column,), table) for column, table in enumerate(singles)]
    tables += [(pair, table) for pair, table in pairs.items()]
    holding: list[list[_Table]] = [[] for _ in singles]
    place = {column: number for number, column in enumerate(order)}
    for table in tables:
        holding[min(table[0], key=place.__getitem__)].append(table)
    decided: list[tuple[int, tuple[int, ...], np.ndarray]] = []
    for column in order:
        others = sorted({c for over, _ in holding[column] for c in over} - {column})
        joint = _sum(holding[column], (*others, column))
        best = np.argmin(joint, axis=-1)
        decided.append((column, tuple(others), best))
        if others:
            least = np.take_along_axis(joint, best[..., None], axis=-1)[..., 0]
            holding[min(others, key=place.__getitem__)].append((tuple(others), least))
    rows = np.arange(len(singles[0]))
    points = np.zeros((len(rows), len(singles)), dtype=int)
    for column, others, best in reversed(decided):
        points[:, column] = best[(rows, *(points[:, other] for other in others))]
    return points


def _sum(tables: Sequence[_Table], over: tuple[int, ...]) -> np.ndarray:
    """Their sum as one table over those factors, the last of which every table has."""
    total: np.ndarray | None = None
    for own, table in tables:
        order = sorted(range(len(own)), key=lambda axis: over.index(own[axis]))
        turned = table.transpose(0, *(1 + axis for axis in order))
        shape = [len(table)] + [table.shape[1 + own.index(c)] if c in own else 1 for c in over]
        part = turned.reshape(shape)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a factor without a table cannot be eliminated")
    return total
