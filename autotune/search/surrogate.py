"""A model of one figure (latency, accuracy drop) over the choices, fitted on measured trials.

Owns the regression: an additive Gaussian process over single choices and over pairs of linked
ones, which is Bayesian ridge regression with one coefficient per (factor, option) and per
(link, option, option), and one for what those of a kind have in common. Points are rows of
integers, one per factor; what the factors mean is `landscape.py`'s, what to try next
`improvement.py`'s. Deterministic; nothing is random here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SAME_FACTOR = 0.5
"""Correlation of a factor's options: leaving FP32 at all costs a group about as much whichever
precision it goes to (its float neighbours must be converted either way). A choice."""

_BASE_SPREAD = 0.1
"""How far the true base may lie from the measured one, as a share of it: more than a measurement's
noise, so that all figures together tell it and FP32's own counts as one of them. Taken for exact,
its error is an error of every prediction: where a figure's noise is 4 % (efficientnet_b0's table),
0.935 instead of 0.953 of mixtures are predicted within 10 % (difference 0.018 +- 0.005; 100 seeds
of `tests.benchmarks.search`); where noise is 1 or 2 % nothing changes."""

_EXPECTED = (1.0, 0.5, 0.3)
"""Where the scales of single choices, pairs and the error of the prior are expected to lie, as
multiples of what the caller states; their logarithms are normal around it with `_SPREADS`."""

_SPREADS = (1.0, 1.0, 0.7, 1.0)
_MISFIT_SHARE = 0.1
"""Expected standard deviation of what no choice explains, of that of all figures."""

_STEPS = (3.0, 1.7, 1.3)
"""Factors by which the scales are moved, one at a time, while the evidence grows."""


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


class Energy:
    """The predicted mean as a sum of tables: `(n_options,)` per factor, a matrix per pair of them.

    A matrix's rows are the options of the pair's first factor.
    """

    def __init__(
        self,
        base: float,
        singles: Sequence[np.ndarray],
        pairs: Mapping[tuple[int, int], np.ndarray],
    ) -> None:
        self.base, self.singles, self.pairs = base, tuple(singles), dict(pairs)
        self._around: list[list[tuple[int, np.ndarray]]] = [[] for _ in singles]
        for (first, second), table in pairs.items():
            self._around[first].append((second, table.T))
            self._around[second].append((first, table))

    def __add__(self, other: Energy) -> Energy:
        """The sum of both, over the same factors."""
        pairs = dict(self.pairs)
        for pair, table in other.pairs.items():
            pairs[pair] = pairs[pair] + table if pair in pairs else table
        singles = [a + b for a, b in zip(self.singles, other.singles, strict=True)]
        return Energy(self.base + other.base, singles, pairs)

    def conditional(self, points: np.ndarray, column: int) -> np.ndarray:
        """What each option of one factor adds where the others stay, `(n, n_options)`."""
        total = np.empty((len(points), len(self.singles[column])))
        total[:] = self.singles[column]
        for other, table in self._around[column]:
            total += table[points[:, other]]
        return total

    def at(self, points: np.ndarray) -> np.ndarray:
        """The sum at each point, `(n,)`."""
        total = np.full(len(points), self.base)
        for column, table in enumerate(self.singles):
            total += table[points[:, column]]
        for (first, second), table in self.pairs.items():
            total += table[points[:, first], points[:, second]]
        return total


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
        self._prices = np.array([_relative_price(link) for link in links if link.is_boundary])

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
                found[:, -1] += crossing * _relative_price(self.links[index])
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


def _relative_price(link: Link) -> float:
    """What a crossing is thought to add, as a multiple of its column in a row."""
    return link.price / link.scale if link.scale > 0 else 0.0


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


class Surrogate:
    """The model, fitted.

    Args:
        features: of the factors and links.
        points: measured points, `(n, n_factors)`, at least one.
        values: their figures, `(n,)`.
        noise: standard deviation of each figure, `(n,)`.
        base: the figure of the point that is 0 throughout, as it was measured; exact where it is
            0. As an attribute it is what all measurements make of it.
    """

    def __init__(
        self,
        features: Features,
        points: np.ndarray,
        values: np.ndarray,
        noise: np.ndarray,
        *,
        base: float,
    ) -> None:
        self.features, self._given = features, base
        self._rows = features.rows(points)
        self._values = values
        self._residuals = values - base - self._rows[:, -1]
        self._noise = noise
        grams = self._grams()
        self.scales = self._most_likely(grams)
        self._solve(grams)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the figure itself (without its noise), each `(n,)`."""
        mean, deviation = self._weigh(self.features.rows(points), with_base=True)
        return self.base + mean, deviation

    def weigh(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of parts of the figure, without its base.

        `rows` `(n, width)` are columns of `Features.rows`: differences of two points, or some
        columns alone and 0 in the others.
        """
        return self._weigh(rows, with_base=False)

    def _weigh(self, rows: np.ndarray, *, with_base: bool) -> tuple[np.ndarray, np.ndarray]:
        mean = rows[:, -1] + rows @ self._weights
        cross = self._explained @ rows.T
        before = (rows * rows) @ self._variances
        if with_base:
            cross += self._base_explained[:, None]
            before += self._base_variance
        variance = before - np.einsum("ij,ij->j", cross, cross)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def unmeasured(self, rows: np.ndarray) -> np.ndarray:
        """The standard deviation that such parts would have without any measurement, `(n,)`."""
        found: np.ndarray = np.sqrt((rows * rows) @ self._variances)
        return found

    @property
    def noise_share(self) -> float:
        """The standard deviation of a measurement, as a share of its figure: the median."""
        return float(np.median(self._noise / np.abs(self._values)))

    def lessons(self, points: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        """How much measuring each of `points` would teach about `unseen` ones, `(n,)`.

        The mean over those of the variance that goes, as a share of the squared figure: the
        integrated variance of a design (Sacks et al. 1989, "Design and analysis of computer
        experiments", section 5), in closed form for one more measurement.
        """
        rows, others = self.features.rows(points), self.features.rows(unseen)
        half, other_half = (
            self._explained @ own.T + self._base_explained[:, None] for own in (rows, others)
        )
        covariance = (rows * self._variances) @ others.T + self._base_variance - half.T @ other_half
        figures, _ = self.predict(unseen)
        variance = (rows * rows) @ self._variances + self._base_variance
        variance -= np.einsum("ij,ij->j", half, half)
        noise = float(np.median(self._noise)) ** 2 + self.scales[3] ** 2
        found: np.ndarray = ((covariance / figures) ** 2).mean(axis=1) / (variance + noise)
        return found

    def told(self) -> np.ndarray:
        """The figures of the measured points themselves: what was measured, less its noise.

        Unlike `predict`, which knows sums alone, this has what sets a point apart from its sum.
        """
        found: np.ndarray = self._values - self._noise**2 * self._correlated
        return found

    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Each measured figure less what the others predict for it, and that one's deviation.

        Both `(n,)`; the deviation includes the figure's noise. In closed form, with the scales
        of the whole fit (Rasmussen and Williams 2006, eq. 5.12).
        """
        inverse = np.linalg.inv(self._lower @ self._lower.T)
        own = np.diag(inverse)
        return inverse @ self._residuals / own, np.sqrt(1.0 / own)

    def energy(self) -> Energy:
        """The mean of `predict` as tables, so that single choices can be weighed at once."""
        f, w = self.features, self._weights
        n = len(f.singles)
        trust = 1.0 + w[-1]
        pairs: dict[tuple[int, int], np.ndarray] = {}
        weights = f.own_weights(w)
        for link, table, of_link in zip(f.links, f.pairs, weights[n:], strict=True):
            own = table @ of_link
            if link.is_boundary:
                own = own + (w[-2] + trust * _relative_price(link)) * table[..., 0]
            pair = (link.first, link.second)
            pairs[pair] = pairs[pair] + own if pair in pairs else own
        singles = [
            table @ own + trust * factor.effects
            for factor, table, own in zip(f.factors, f.singles, weights[:n], strict=True)
        ]
        return Energy(self.base, singles, pairs)

    def believing(self, point: np.ndarray) -> Surrogate:
        """The model after a measurement that gives what is predicted: the mean stays.

        For several proposals at once ("kriging believer", Ginsbourger et al. 2010).
        """
        other = object.__new__(Surrogate)
        row = self.features.rows(point[None])
        other.features, other._given, other.scales = self.features, self._given, self.scales
        other._rows = np.vstack([self._rows, row])
        moved = self.base - self._given
        other._residuals = np.append(self._residuals, moved + row @ self._weights)
        other._values = np.append(self._values, self.base + row[:, -1] + row @ self._weights)
        other._noise = np.append(self._noise, float(np.median(self._noise)))
        other._solve(other._grams())
        return other

    def _solve(self, grams: Sequence[np.ndarray]) -> None:
        self._variances = _variances(self.features, self.scales)
        self._lower = np.linalg.cholesky(self._kernel(grams, self.scales))
        # Of each column, what the measurements tell: its square is the variance that they take.
        self._explained = np.linalg.solve(self._lower, self._rows * self._variances)
        half = np.linalg.solve(self._lower, self._residuals)
        self._correlated = np.linalg.solve(self._lower.T, half)
        self._weights = self._variances * (self._rows.T @ self._correlated)
        ones = np.ones(len(self._rows))
        self._base_explained = self._base_variance * np.linalg.solve(self._lower, ones)
        self.base = self._given + self._base_variance * float(self._correlated.sum())

    @property
    def _base_variance(self) -> float:
        return (_BASE_SPREAD * self._given) ** 2

    def _grams(self) -> list[np.ndarray]:
        blocks = [self._rows[:, self.features.block == b] for b in range(3)]
        return [block @ block.T for block in blocks]

    def _kernel(self, grams: Sequence[np.ndarray], scales: np.ndarray) -> np.ndarray:
        noise = np.diag(self._noise**2 + scales[3] ** 2)
        noise += self._base_variance
        return sum((s**2 * g for s, g in zip(scales[:3], grams, strict=True)), noise)

    def _most_likely(self, grams: Sequence[np.ndarray]) -> np.ndarray:
        """The scales of the three blocks and of the misfit with the largest posterior density.

        The evidence of a Gaussian process (Rasmussen and Williams 2006, eq. 5.8) with
        log-normal priors, climbed one coordinate at a time.
        """
        spread = max(float(np.std(self._residuals)), 1e-9)
        expected = np.array([*_EXPECTED, _MISFIT_SHARE * spread])
        n, residuals = len(self._residuals), self._residuals
        # With the residuals as one more row, the factor's last row is what solving would give.
        joined = np.empty((n + 1, n + 1))
        joined[n, :n] = joined[:n, n] = residuals
        joined[n, n] = 1.0 + 4.0 * residuals @ residuals / float(self._noise.min()) ** 2

        def loss(scales: np.ndarray) -> float:
            joined[:n, :n] = self._kernel(grams, scales)
            lower = np.linalg.cholesky(joined)
            half = lower[n, :n]
            prior = (np.log(scales / expected) / _SPREADS) ** 2
            determinant = np.log(np.diag(lower)[:n]).sum()
            return float(0.5 * half @ half + determinant + 0.5 * prior.sum())

        best, least = expected, loss(expected)
        for step in _STEPS:
            for index in (0, 1, 2, 3) * 2:
                for change in (step, 1 / step):
                    tried = best.copy()
                    tried[index] *= change
                    found = loss(tried)
                    if found < least:
                        best, least = tried, found
        return best


def _variances(features: Features, scales: np.ndarray) -> np.ndarray:
    found: np.ndarray = scales[features.block] ** 2
    return found
