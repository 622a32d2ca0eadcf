"""Which point promises the most: expected hypervolume improvement over a pool of neighbours.

Owns the two-objective mathematics and the pool of points worth asking about. Everything is
minimized; points are rows of integers as in `surrogate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from autotune.search.surrogate import Energy, Surrogate

_WEIGHTS = 12
"""Weightings of the two figures for which the best point is looked for."""

_SWEEPS = 4
_RANDOM_POINTS = 32
_FLIPS = 256
"""Neighbours whose uncertainty is computed; chosen from all by their means, which cost little."""

_SQRT_2PI = math.sqrt(2.0 * math.pi)


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
    front = front_of(means)
    pool = [
        (point, origin)
        for point, origin in _pool(landscape, points, means, front, reference, rng)
        if tuple(point) not in known
    ]
    while pool and len(chosen) < n:
        if chosen:
            landscape = landscape.believing(chosen[-1].point)
        candidates = np.array([point for point, _ in pool])
        mean, deviation = landscape.predict(candidates)
        gains = expected_improvement(mean, deviation, front, reference)
        best = int(np.argmax(gains))
        point, origin = pool.pop(best)
        chosen.append(Promise(point=point, gain=float(gains[best]), origin=origin))
        front = front_of(np.vstack([front, mean[best]]))
    return chosen


def _pool(
    landscape: Landscape,
    points: np.ndarray,
    means: np.ndarray,
    front: np.ndarray,
    reference: Sequence[float],
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, str]]:
    """Optima of weighted sums, neighbours of the front and of those optima, and random points."""
    members = points[[_is_on_front(means, i) for i in range(len(points))]]
    first, second = landscape.first.energy(), landscape.second.energy()
    optima = weighted_optima(first, second, members, _weights(means))
    starts = np.unique(np.vstack([optima, members]), axis=0)
    flips, predicted = neighbours(first, second, starts)
    _, deviation = landscape.predict(starts)
    about = np.broadcast_to(np.median(deviation, axis=0), predicted.shape)
    gains = expected_improvement(predicted, about, front, reference)
    # Twice as many as are kept: one point is a neighbour of several starts.
    flips = flips[np.argsort(-gains, kind="stable")[: 2 * _FLIPS]]
    found: dict[tuple[int, ...], tuple[np.ndarray, str]] = {}
    drawn = rng.integers(landscape.sizes, size=(_RANDOM_POINTS, len(landscape.sizes)))
    for rows, origin in ((optima, "program"), (flips, "flip"), (drawn, "random")):
        new = {tuple(point): (point, origin) for point in rows if tuple(point) not in found}
        found |= dict(islice(new.items(), _FLIPS))
    return list(found.values())


def _is_on_front(means: np.ndarray, index: int) -> bool:
    own = means[index]
    beats = (means <= own).all(axis=1) & (means < own).any(axis=1)
    return not bool(beats.any())


def neighbours(first: Energy, second: Energy, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All points that differ from a start in one factor, and their two means, `(m, 2)`."""
    own = np.column_stack([first.at(starts), second.at(starts)])
    points, means = [], []
    for column, table in enumerate(first.singles):
        changes = [energy.conditional(starts, column) for energy in (first, second)]
        current = starts[:, column]
        rows = np.arange(len(starts))
        for option in range(len(table)):
            moved = current != option
            other = starts[moved].copy()
            other[:, column] = option
            points.append(other)
            gained = [c[rows, option] - c[rows, current] for c in changes]
            means.append((own + np.column_stack(gained))[moved])
    return np.vstack(points), np.vstack(means)


def _weights(means: np.ndarray) -> np.ndarray:
    """From next to nothing to much: the ratio of the figures' ranges, times 1/30 to 30."""
    width = np.ptp(means, axis=0) + 1e-9
    found: np.ndarray = width[0] / width[1] * np.geomspace(1 / 30, 30, _WEIGHTS)
    return found


def weighted_optima(
    first: Energy, second: Energy, starts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Per weight a point that minimizes first + weight x second, `(n_weights, n_factors)`.

    Coordinate descent on the tables, all weights at once, each from the best of `starts`: no
    change of one factor lowers the sum further, nor one of two that form a pair.
    """
    values = first.at(starts)[None] + weights[:, None] * second.at(starts)[None]
    points: np.ndarray = starts[np.argmin(values, axis=1)].copy()
    rows = np.arange(len(weights))

    def conditional(column: int, but: int = -1) -> np.ndarray:
        found: np.ndarray = first.conditional(points, column, but=but)
        found += weights[:, None] * second.conditional(points, column, but=but)
        return found

    pairs = sorted({*first.pairs, *second.pairs})
    for _ in range(_SWEEPS):
        before = points.copy()
        for column in range(points.shape[1]):
            points[:, column] = np.argmin(conditional(column), axis=1)
        for a, b in pairs:
            joint = conditional(a, b)[:, :, None] + conditional(b, a)[:, None, :]
            for energy, weight in ((first, np.ones_like(weights)), (second, weights)):
                if (a, b) in energy.pairs:
                    joint += weight[:, None, None] * energy.pairs[a, b]
            best = np.argmin(joint.reshape(len(rows), -1), axis=1)
            points[:, a], points[:, b] = np.unravel_index(best, joint.shape[1:])
        if (points == before).all():
            break
    return points
