"""Which point promises the most: expected hypervolume improvement over a pool of neighbours.

Owns the two-objective mathematics and the pool of points worth asking about. Everything is
minimized; points are rows of integers as in `surrogate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autotune.search.surrogate import Energy, Surrogate

_WEIGHTS = 12
"""Weightings of the two figures for which the best point is looked for."""

_SWEEPS = 4
_RANDOM_POINTS = 64
_SQRT_2, _SQRT_2PI = math.sqrt(2.0), math.sqrt(2.0 * math.pi)
_erf = np.vectorize(math.erf, otypes=[float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A point, the hypervolume that it is expected to add, and where it came from."""

    point: np.ndarray
    gain: float
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
    found: np.ndarray = gap * 0.5 * (1.0 + _erf(z / _SQRT_2)) + deviation * density
    return found


class Landscape:
    """Two fitted models over the same factors: what is known of (first, second) figure."""

    def __init__(self, first: Surrogate, second: Surrogate) -> None:
        self.first, self.second = first, second

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per factor."""
        return tuple(f.n_options for f in self.first.features.factors)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and deviations, each `(n, 2)`."""
        (m1, s1), (m2, s2) = self.first.predict(points), self.second.predict(points)
        return np.column_stack([m1, m2]), np.column_stack([s1, s2])

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
) -> list[Promise]:
    """Up to `n` new points, each the best once those before it are believed.

    `points` `(m, n_factors)` were measured; nor is any of `excluded` proposed. The front that
    counts is that of the predicted means at the measured points, so that a lucky measurement
    hides nothing.
    """
    chosen: list[Promise] = []
    known = {tuple(row) for row in (*points, *excluded)}
    means, _ = landscape.predict(points)
    pool = [
        (point, origin)
        for point, origin in _pool(landscape, points, means, rng)
        if tuple(point) not in known
    ]
    if not pool:
        return chosen
    candidates = np.array([point for point, _ in pool])
    front = front_of(means)
    for _ in range(min(n, len(pool))):
        mean, deviation = landscape.predict(candidates)
        gains = expected_improvement(mean, deviation, front, reference)
        gains[[tuple(c) in known for c in candidates]] = -1.0
        best = int(np.argmax(gains))
        if gains[best] < 0:
            break
        point = candidates[best]
        chosen.append(Promise(point=point, gain=float(gains[best]), origin=pool[best][1]))
        known.add(tuple(point))
        front = front_of(np.vstack([front, mean[best]]))
        landscape = landscape.believing(point)
    return chosen


def _pool(
    landscape: Landscape, points: np.ndarray, means: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, str]]:
    """Optima of weighted sums, neighbours of the front and of those optima, and random points."""
    seen: set[tuple[int, ...]] = set()

    def new(point: np.ndarray) -> bool:
        key = tuple(point)
        return not (key in seen or seen.add(key))  # type: ignore[func-returns-value]

    front = [points[i] for i in range(len(points)) if _is_on_front(means, i)]
    optima = list(weighted_optima(landscape, front, means))
    for start, origin in ((optima, "program"), (front, "flip")):
        for point in start:
            if new(point):
                yield point, origin
    for start in (front, optima):
        for point in start:
            for neighbour in neighbours(point, landscape.sizes):
                if new(neighbour):
                    yield neighbour, "flip"
    for _ in range(_RANDOM_POINTS):
        point = np.array([rng.integers(size) for size in landscape.sizes])
        if new(point):
            yield point, "random"


def _is_on_front(means: np.ndarray, index: int) -> bool:
    own = means[index]
    beats = (means <= own).all(axis=1) & (means < own).any(axis=1)
    return not bool(beats.any())


def neighbours(point: np.ndarray, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """The points that differ in one factor."""
    for column, size in enumerate(sizes):
        for option in range(size):
            if option != point[column]:
                other = point.copy()
                other[column] = option
                yield other


def weighted_optima(
    landscape: Landscape, starts: Sequence[np.ndarray], means: np.ndarray
) -> Iterator[np.ndarray]:
    """Points that minimize first + weight x second, for weights from next to none to large.

    Coordinate descent on the predicted means, from the best of `starts` and on from one weight
    to the next. The weights span the ratio of the figures' ranges by a factor of 30 either way.
    """
    first, second = landscape.first.energy(), landscape.second.energy()
    width = np.ptp(means, axis=0) + 1e-9
    middle = float(width[0] / width[1])
    current: np.ndarray | None = None
    for weight in middle * np.geomspace(1 / 30, 30, _WEIGHTS):
        joint = _weighted(first, second, float(weight))
        options = [*starts] if current is None else [*starts, current]
        current = min(options, key=lambda p: value_of(joint, p))
        current = descended(joint, current)
        yield current


def _weighted(first: Energy, second: Energy, weight: float) -> Energy:
    pairs = dict(first.pairs)
    for pair, table in second.pairs.items():
        pairs[pair] = pairs[pair] + weight * table if pair in pairs else weight * table
    return Energy(
        base=first.base + weight * second.base,
        singles=tuple(a + weight * b for a, b in zip(first.singles, second.singles, strict=True)),
        pairs=pairs,
    )


def value_of(energy: Energy, point: np.ndarray) -> float:
    """The sum of the tables at that point."""
    total = energy.base + sum(float(t[o]) for t, o in zip(energy.singles, point, strict=True))
    return total + sum(float(t[point[a], point[b]]) for (a, b), t in energy.pairs.items())


def descended(energy: Energy, start: np.ndarray) -> np.ndarray:
    """A point that no change of one or of two linked factors lowers further, from `start`."""
    point = start.copy()
    around: list[list[tuple[int, np.ndarray]]] = [[] for _ in point]
    for (a, b), table in energy.pairs.items():
        around[a].append((b, table))
        around[b].append((a, table.T))

    def conditional(column: int, but: int = -1) -> np.ndarray:
        return energy.singles[column] + sum(
            (table[:, point[other]] for other, table in around[column] if other != but), 0.0
        )

    for _ in range(_SWEEPS):
        before = point.copy()
        for column in range(len(point)):
            point[column] = int(np.argmin(conditional(column)))
        for (a, b), table in energy.pairs.items():
            joint = conditional(a, but=b)[:, None] + conditional(b, but=a)[None, :] + table
            point[a], point[b] = np.unravel_index(int(np.argmin(joint)), joint.shape)
        if (point == before).all():
            break
    return point
