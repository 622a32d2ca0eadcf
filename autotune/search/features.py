"""The choices as a model sees them: factors, what links them, and the rows of a regression.

Owns the encoding of choices as columns: which coefficients there are, and which of them vary
together. What is thought of them beforehand is `priors.py`'s, what measurements make of them
`surrogate.py`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_SAME_FACTOR = 0.5
"""Correlation of a factor's options: leaving FP32 at all costs a group about as much whichever
precision it goes to (its float neighbours must be converted either way). A choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One choice: `n_options` of them, option 0 leaves the model as it is.

    `effects` is what each option is thought to add to the figure, `(n_options,)`, 0 first;
    `scale` how far the truth may be from it (a standard deviation). Options that are
    `is_ordered` differ the more the further they are apart, as prune ratios do.

    Factors of one `kind` have options of the same meaning: what is wrongly thought of one is so
    of the others, and of what links them likewise; two such errors correlate by a half. A kernel
    that is slow at 8 bits in one group is slow in others: after 24 runs (`tests.benchmarks.search`)
    the mean squared error on unseen mixtures is 5 % less on resnet18 and efficientnet_b0 and the
    same on mobilenet_v2 (100 seeds), 20 % less on the simulated fifty groups (40 seeds; within
    10 % are 0.955 of them instead of 0.934). A factor without a kind stands alone, as do damages.
    """

    n_options: int
    effects: np.ndarray
    scale: float
    is_ordered: bool = False
    kind: Hashable = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Two factors whose choices bear on each other; `scale` is how strongly, a standard deviation.

    With `is_boundary` a conversion stands between them wherever one alone is at option 0;
    `price` is what that is thought to add.
    """

    first: int
    second: int
    scale: float
    is_boundary: bool = False
    price: float = 0.0

    @property
    def relative_price(self) -> float:
        """What a crossing is thought to add, as a multiple of its column in a row."""
        return self.price / self.scale if self.scale > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alike:
    """Tables of one shape, read at once: one per factor, or one per pair of them.

    `tables` is `(n_tables, n_cells, n_columns)`, a pair's cells row by row; `where` are the
    tables' columns of a row, one table's behind the other's. `common` are the columns that all
    of them share, one for each that a table has but the first `n_apart`.
    """

    tables: np.ndarray
    where: slice
    common: slice
    n_apart: int
    factors: tuple[np.ndarray, ...]
    n_second: int = 1

    def parts(self, points: np.ndarray) -> np.ndarray:
        """What each table has for each point, `(n, n_tables, n_columns)`."""
        cells = points[:, self.factors[0]]
        if len(self.factors) == 2:
            cells = cells * self.n_second + points[:, self.factors[1]]
        found: np.ndarray = self.tables[np.arange(len(self.tables)), cells]
        return found


class Features:
    """Points as rows of numbers whose weighted sum is the figure.

    Three blocks: single choices, pairs, and the figure thought of beforehand. Their columns are
    scaled so that weights of one block have the same standard deviation. `slices` are the
    columns of each factor and, behind those, of each link; columns that those of a kind share
    stand behind their own, and the price of all boundaries behind all.
    """

    def __init__(self, factors: Sequence[Factor], links: Sequence[Link]) -> None:
        self.factors, self.links = tuple(factors), tuple(links)
        roots = [_root(f.n_options, f.is_ordered) for f in factors]
        self.singles = [f.scale * root for f, root in zip(factors, roots, strict=True)]
        self.pairs = [
            link.scale * _pair_table(roots[link.first], roots[link.second], link.is_boundary)
            for link in links
        ]
        self._effects = [
            (np.stack([self.factors[c].effects for c in own]), np.array(own))
            for own in _together([f.n_options for f in factors])
        ]
        self._alike_of, self.slices, end = self._arranged()
        self._kinds = list({id(alike): alike for alike in self._alike_of}.values())
        # The last column but one joins all boundaries: one price per byte, whichever they are.
        self.width = end + 2
        self.block = np.full(self.width, 1)
        for alike in self._kinds:
            if len(alike.factors) == 1:
                self.block[alike.where] = self.block[alike.common] = 0
        self.block[-1] = 2
        starts = [self.slices[len(factors) + i].start for i, x in enumerate(links) if x.is_boundary]
        self._boundaries = np.array(starts, dtype=int)
        self._prices = np.array([link.relative_price for link in links if link.is_boundary])

    def rows(self, points: np.ndarray) -> np.ndarray:
        """`(n, width)` for points `(n, n_factors)`."""
        found = np.zeros((len(points), self.width))
        for alike in self._kinds:
            parts = alike.parts(points)
            found[:, alike.where] = parts.reshape(len(points), -1)
            found[:, alike.common] = parts[..., alike.n_apart :].sum(axis=1)
        crossings = found[:, self._boundaries]
        found[:, -2] = crossings.sum(axis=1)
        found[:, -1] = crossings @ self._prices
        for effects, own in self._effects:
            found[:, -1] += effects[np.arange(len(own)), points[:, own]].sum(axis=1)
        return found

    def of_links(self, rows: np.ndarray, links: Iterable[int]) -> np.ndarray:
        """What those links alone make up of rows `(n, width)`; the rest of them is 0."""
        found = np.zeros_like(rows)
        for index in links:
            number = len(self.factors) + index
            where, alike = self.slices[number], self._alike_of[number]
            found[:, where] = rows[:, where]
            found[:, alike.common] += rows[:, where][:, alike.n_apart :]
            if self.links[index].is_boundary:
                crossing = rows[:, where.start]
                found[:, -2] += crossing
                found[:, -1] += crossing * self.links[index].relative_price
        return found

    def own_weights(self, weights: np.ndarray) -> list[np.ndarray]:
        """Of each factor and, behind those, each link, with what it has in common with others."""
        found = []
        for where, alike in zip(self.slices, self._alike_of, strict=True):
            own = weights[where].copy()
            own[alike.n_apart :] += weights[alike.common]
            found.append(own)
        return found

    def _arranged(self) -> tuple[list[_Alike], list[slice], int]:
        """Of each factor and link its kind and its columns; and how many there are in all."""
        n, end = len(self.singles), 0
        tables = [*self.singles, *self.pairs]
        slices = [slice(0)] * len(tables)
        kinds: list[tuple[int, _Alike]] = []
        for own in _together(self._kind_names()):
            *options, width = tables[own[0]].shape
            # Counted, because a choice of one option has no columns to tell it by.
            start, cells = end, math.prod(options)
            for index in own:
                slices[index] = slice(end, end + width)
                end += width
            ends = [self.links[i - n] for i in own if i >= n]
            first, second = [x.first for x in ends] or own, [x.second for x in ends]
            n_apart = int(ends[0].is_boundary) if ends else 0
            # What one alone has in common with its kind is no other than its own.
            n_apart = width if len(own) == 1 or not self._is_alike(own[0]) else n_apart
            where, end = slice(start, end), end + width - n_apart
            alike = _Alike(
                tables=np.stack([tables[i].reshape(cells, width) for i in own]),
                where=where,
                common=slice(where.stop, end),
                n_apart=n_apart,
                factors=(np.array(first), *([np.array(second)] if second else [])),
                n_second=tables[own[0]].shape[1],
            )
            kinds += [(index, alike) for index in own]
        return [alike for _, alike in sorted(kinds, key=lambda x: x[0])], slices, end

    def _is_alike(self, number: int) -> bool:
        """Whether a factor or, behind those, a link has a part in common with others."""
        n = len(self.factors)
        link = self.links[number - n] if number >= n else None
        ends = (number,) if link is None else (link.first, link.second)
        return all(self.factors[end].kind is not None for end in ends)

    def _kind_names(self) -> list[Hashable]:
        """Of each factor and, behind those, of each link."""
        own = [(f.n_options, f.is_ordered, f.kind) for f in self.factors]
        links = [(own[x.first], own[x.second], x.is_boundary) for x in self.links]
        return [*own, *links]


def _together(kinds: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of those that are equal."""
    found: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return list(found.values())


@functools.cache
def _root(n_options: int, is_ordered: bool) -> np.ndarray:
    """A root of the options' covariance, `(n_options, n_options - 1)`; option 0 is certain."""
    n = n_options - 1
    if n <= 0:
        return np.zeros((1, 0))
    steps = np.arange(1, n + 1)
    covariance = (
        np.minimum.outer(steps, steps) / n
        if is_ordered
        else _SAME_FACTOR + (1 - _SAME_FACTOR) * np.eye(n)
    )
    return np.vstack([np.zeros(n), np.linalg.cholesky(covariance)])


def _pair_table(first: np.ndarray, second: np.ndarray, is_boundary: bool) -> np.ndarray:
    """`(options, options, columns)`: the boundary first, then the products of both."""
    products = np.einsum("ia,jb->ijab", first, second) * math.sqrt(0.5)
    table: np.ndarray = products.reshape(len(first), len(second), -1)
    if not is_boundary:
        return table
    moved = [np.arange(len(root)) > 0 for root in (first, second)]
    crossing = np.not_equal.outer(*moved).astype(float)
    return np.concatenate([crossing[..., None], table], axis=-1)
