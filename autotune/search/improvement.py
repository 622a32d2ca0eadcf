"""Which point promises the most: expected hypervolume improvement over a pool of neighbours.

Owns the two-objective mathematics and the pool of points worth asking about. Everything is
minimized; points are rows of integers as in `features.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from autotune.search.drop_model import Model
from autotune.search.minima import elimination_order, minima
from autotune.search.surrogate import Energy, Surrogate

_WEIGHTS = 24
"""Weightings of the two figures for which the best point is looked for."""

_RANDOM_POINTS = 32
_FLIPS = 160
"""Neighbours whose uncertainty is computed; chosen from all by their means, which cost little."""

TEACHING_RUNS = 24
"""Until so many points are measured, every second one is chosen for what it teaches the model of
the first figure, while that is less sure of a mixture than one measurement is: the mixtures
that a design for the model would have, spread over the search. Without them the points lie so
near to the front that a tenth and more of all mixtures is mispredicted by over 10 %."""

_UNSEEN = 128
"""Random mixtures on which the model is to be sure; those measured for that are of them: points
near the front would teach it less: after 24 runs 0.93 instead of 0.95 of mobilenet_v2's mixtures
are predicted within 10 %, 0.87 instead of 0.89 of efficientnet_b0's (20 seeds); of fifty simulated
groups' 0.93 and 0.92, and 0.75 where nothing is measured to teach (12 seeds)."""

_SQRT_2PI = math.sqrt(2.0 * math.pi)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A point, the hypervolume that it is expected to add, and where it came from.

    `gain` is None where the point is to teach the models and not to add any.
    """

    point: np.ndarray
    gain: float | None
    origin: str


def front_of(figures: np.ndarray) -> np.ndarray:
    """The rows `(n, 2)` that no other dominates, first column rising; empty for none.

    >>> front_of(np.array([[1.0, 1.0], [2.0, 0.0], [2.0, 2.0]])).tolist()
    [[1.0, 1.0], [2.0, 0.0]]
    """
    found: list[np.ndarray] = []
    for row in figures[np.lexsort((figures[:, 1], figures[:, 0]))]:
        if not found or row[1] < found[-1][1]:
            found.append(row)
    return np.array(found).reshape(-1, 2)


def hypervolume(figures: np.ndarray, reference: Sequence[float]) -> float:
    """The area between the front of the rows `(n, 2)` and the reference point.

    >>> hypervolume(np.array([[1.0, 1.0], [2.0, 0.0]]), (3.0, 2.0))
    3.0
    """
    inside = figures[(figures < np.asarray(reference)).all(axis=1)]
    area, right = 0.0, float(reference[0])
    for first, second in front_of(inside)[::-1]:
        area += (right - first) * (reference[1] - second)
        right = first
    return float(area)


def expected_improvement(
    mean: np.ndarray, deviation: np.ndarray, front: np.ndarray, reference: Sequence[float]
) -> np.ndarray:
    """Expected gain of hypervolume, `(n,)`, of independent normal figures, both `(n, 2)`.

    Exact in two dimensions: the box is cut into strips at the front's first figures, and in
    each the expectation is a product (Yang et al. 2019, "Efficient computation of expected
    hypervolume improvement using box decomposition algorithms", section 4).
    """
    inside = front[(front < np.asarray(reference)).all(axis=1)]
    right = np.append(inside[:, 0], reference[0])
    left = inside[:, 0]
    height = np.append(reference[1], inside[:, 1])
    widths = _below(right, mean[:, :1], deviation[:, :1])
    widths[:, 1:] -= _below(left, mean[:, :1], deviation[:, :1])
    gains: np.ndarray = (widths * _below(height, mean[:, 1:], deviation[:, 1:])).sum(axis=1)
    return gains


def _below(limits: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E[max(limit - Y, 0)] for Y normal, `(n, n_limits)`."""
    gap = limits[None, :] - mean
    z = gap / deviation
    density = np.exp(-0.5 * z * z) / _SQRT_2PI
    found: np.ndarray = np.maximum(gap * _cumulative(z, density) + deviation * density, 0.0)
    return found


def _cumulative(z: np.ndarray, density: np.ndarray) -> np.ndarray:
    """The normal distribution function, to 1e-7 (Abramowitz and Stegun 1964, 26.2.17)."""
    t = 1.0 / (1.0 + 0.2316419 * np.abs(z))
    tail = np.zeros_like(z)
    for coefficient in (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530):
        tail = (tail + coefficient) * t
    below: np.ndarray = np.where(z > 0, 1.0 - density * tail, density * tail)
    return below


class Landscape:
    """Two fitted models over the same factors: what is known of (first, second) figure."""

    def __init__(self, first: Surrogate, second: Model) -> None:
        self.first, self.second = first, second

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per factor."""
        return tuple(f.n_options for f in self.first.features.factors)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and deviations, each `(n, 2)`."""
        (m1, s1), (m2, s2) = self.first.predict(points), self.second.predict(points)
        return np.column_stack([m1, m2]), np.column_stack([s1, s2])

    def told(self, n: int) -> np.ndarray:
        """The figures of the first `n` points without their noise, `(n, 2)`.

        The models may have further points behind those, each its own.
        """
        return np.column_stack([self.first.told()[:n], self.second.told()[:n]])

    def believing(self, point: np.ndarray) -> Landscape:
        """Both models after the point gave what they predict."""
        return Landscape(self.first.believing(point), self.second.believing(point))


def most_promising(
    landscape: Landscape,
    points: np.ndarray,
    *,
    reference: Sequence[float],
    n: int,
    rng: np.random.Generator,
    excluded: Sequence[np.ndarray] = (),
    teaching_runs: int = TEACHING_RUNS,
) -> list[Promise]:
    """Up to `n` new points, each the best once those before it are believed.

    The best is what promises the most hypervolume or, where it is time for that, what teaches
    the first model most.

    `points` `(m, n_factors)` were measured, the first that the models were fitted to; nor is any
    of `excluded` proposed. Once `teaching_runs` are measured none is chosen only to teach. The
    front that counts is that of their figures less their noise, so that a lucky measurement hides
    little.
    """
    chosen: list[Promise] = []
    known = {_key(row) for row in (*points, *excluded)}
    means = landscape.told(len(points))
    front = front_of(means)
    found = _pool(landscape, points, means, front, reference, rng)
    unseen = rng.integers(landscape.sizes, size=(_UNSEEN, len(landscape.sizes)))
    pool = [pair for key, pair in found.items() if key not in known]
    while pool and len(chosen) < n:
        if chosen:
            landscape = landscape.believing(chosen[-1].point)
            front = front_of(np.vstack([front, landscape.predict(chosen[-1].point[None])[0]]))
        have = known | {_key(promise.point) for promise in chosen}
        mixtures = [point for point in unseen if _key(point) not in have]
        n_measured = len(points) + len(chosen)
        is_time = n_measured < teaching_runs and n_measured % 2 == 1
        if mixtures and is_time and _is_unsure(landscape.first, unseen):
            lessons = landscape.first.lessons(np.array(mixtures), unseen)
            point = mixtures[int(np.argmax(lessons))]
            pool = [pair for pair in pool if _key(pair[0]) != _key(point)]
            chosen.append(Promise(point=point, gain=None, origin="random"))
            continue
        mean, deviation = landscape.predict(np.array([point for point, _ in pool]))
        gains = expected_improvement(mean, deviation, front, reference)
        best = int(np.argmax(gains))
        point, origin = pool.pop(best)
        chosen.append(Promise(point=point, gain=float(gains[best]), origin=origin))
    return chosen


def _is_unsure(model: Surrogate, unseen: np.ndarray) -> bool:
    """Whether the model is less sure of a mixture than one measurement is."""
    mean, deviation = model.predict(unseen)
    return float(np.sqrt(((deviation / mean) ** 2).mean())) > model.noise_share


def _pool(
    landscape: Landscape,
    points: np.ndarray,
    means: np.ndarray,
    front: np.ndarray,
    reference: Sequence[float],
    rng: np.random.Generator,
) -> dict[bytes, tuple[np.ndarray, str]]:
    """Optima of weighted sums, neighbours of the front and of those optima, and random points.

    Each once, by its key, with where it came from.
    """
    energies = landscape.first.energy(), landscape.second.energy()
    members = points[[_is_on_front(means, i) for i in range(len(points))]]
    optima = weighted_optima(*energies, members, _weights(means))
    flips = Flips(*energies, np.unique(np.vstack([optima, members]), axis=0))
    _, deviation = landscape.predict(optima)
    about = np.broadcast_to(np.median(deviation, axis=0), flips.means.shape)
    gains = expected_improvement(flips.means, about, front, reference)
    # Twice as many as are kept: one point is a neighbour of several starts.
    nearby = flips.points(np.argsort(-gains, kind="stable")[: 2 * _FLIPS])
    drawn = rng.integers(landscape.sizes, size=(_RANDOM_POINTS, len(landscape.sizes)))
    found: dict[bytes, tuple[np.ndarray, str]] = {}
    for rows, origin in ((optima, "program"), (nearby, "flip"), (drawn, "random")):
        new = {key: (row, origin) for row in rows if (key := _key(row)) not in found}
        found |= dict(islice(new.items(), _FLIPS))
    return found


def _key(point: np.ndarray) -> bytes:
    return point.astype(np.int64).tobytes()


def _is_on_front(means: np.ndarray, index: int) -> bool:
    own = means[index]
    beats = (means <= own).all(axis=1) & (means < own).any(axis=1)
    return not bool(beats.any())


class Flips:
    """All points that differ from one of `starts` in one factor, and their two `means`, `(m, 2)`.

    They are many, so that their rows are made for those alone that are asked for.
    """

    def __init__(self, first: Energy, second: Energy, starts: np.ndarray) -> None:
        self._starts = starts
        own = np.column_stack([first.at(starts), second.at(starts)])
        rows = np.arange(len(starts))
        which, means = [], []
        for column, table in enumerate(first.singles):
            current, options = starts[:, column], np.arange(len(table))
            changes = [energy.conditional(starts, column) for energy in (first, second)]
            gained = [c - c[rows, current][:, None] for c in changes]
            moved = np.flatnonzero(current[:, None] != options)
            start, option = np.divmod(moved, len(table))
            which.append(np.stack([start, np.full(len(moved), column), option]))
            means.append(own[start] + np.stack([g.ravel()[moved] for g in gained], axis=1))
        self._which = np.concatenate(which, axis=1)
        self.means: np.ndarray = np.vstack(means)

    def points(self, chosen: np.ndarray) -> np.ndarray:
        """The rows of those numbers, `(n, n_factors)`."""
        start, column, option = self._which[:, chosen]
        found: np.ndarray = self._starts[start].copy()
        found[np.arange(len(found)), column] = option
        return found


def _weights(means: np.ndarray) -> np.ndarray:
    """From next to nothing to much: the ratio of the figures' ranges, times 1/30 to 30."""
    width = np.ptp(means, axis=0) + 1e-9
    found: np.ndarray = width[0] / width[1] * np.geomspace(1 / 30, 30, _WEIGHTS)
    return found


def weighted_optima(
    first: Energy, second: Energy, starts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Per weight the point that minimizes first + weight x second, `(n_weights, n_factors)`.

    Exact, by elimination, all weights at once. Where the links tie too many factors together
    for that, those with the most links stay as they are in the best of `starts`.
    """
    sums = _Sums(first, second, weights)
    values = first.at(starts)[None] + weights[:, None] * second.at(starts)[None]
    best = starts[np.argmin(values, axis=1)]
    held: list[int] = []
    while (order := elimination_order(sums.sizes, tuple(sums.pairs))) is None:
        ends = np.bincount(np.array(list(sums.pairs), dtype=int).ravel())
        held.append(int(np.argmax(ends)))
        sums.hold(held[-1], best[:, held[-1]])
    points = minima(sums.singles, sums.pairs, order)
    points[:, held] = best[:, held]
    return points


class _Sums:
    """first + weight x second as tables, with an axis of the weights before all others."""

    def __init__(self, first: Energy, second: Energy, weights: np.ndarray) -> None:
        self.singles = [
            a + weights[:, None] * b for a, b in zip(first.singles, second.singles, strict=True)
        ]
        self.pairs: dict[tuple[int, int], np.ndarray] = {}
        one = np.ones_like(weights)
        for energy, weight in ((first, one), (second, weights)):
            for pair, table in energy.pairs.items():
                own = weight[:, None, None] * table
                self.pairs[pair] = self.pairs[pair] + own if pair in self.pairs else own

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per factor; one where it is held."""
        return tuple(table.shape[1] for table in self.singles)

    def hold(self, column: int, options: np.ndarray) -> None:
        """Leave one factor at these options, one per weight."""
        rows = np.arange(len(options))
        for first, second in [pair for pair in self.pairs if column in pair]:
            table = self.pairs.pop((first, second))
            if column == first:
                self.singles[second] = self.singles[second] + table[rows, options]
            else:
                self.singles[first] = self.singles[first] + table[rows, :, options]
        self.singles[column] = np.zeros((len(options), 1))
