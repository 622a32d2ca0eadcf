"""A model of the accuracy drop: what divergence tells, and how drops differ from that.

Owns the two stages. Divergence from FP32's answers resolves what counts of answers cannot: on 300
samples a drop is a multiple of a third of a point, and which answers flip is luck. The first
regression is of the divergence, as a drop; the second of what the drops have beside it; the sum
predicts (autoregressive cokriging: Kennedy and O'Hagan 2000, "Predicting the output from a
complex computer code when fast approximations are available", section 2). Each is a `Surrogate`,
and the whole reads like one. What to try next is `improvement.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autotune.search.features import Features
from autotune.search.surrogate import Energy, Surrogate

_BESIDE = 0.5
"""How strongly a choice may bear on the drop beside its divergence, as a share of its scale: of
two pruned and quantized choices with the same divergence one may lose nothing."""

_LUCK = 0.4
"""Of sqrt(drop / samples), a drop's standard deviation around what the models expect. A drop is
the difference of two counts, whose variance is that of the answers that flip (McNemar 1947):
sqrt(flips) / samples, and about as many answers flip as drop and divergence say. Neighbouring
candidates flip the same ones, so that less than half is luck; 0.4 to 0.6 find as much of the
front (`tests.benchmarks.search`)."""

_ACCURACY = 0.1
"""Of one sample's worth of drop: how sure a mean divergence is, which all samples share in."""

_BEYOND = 0.3
"""Of the drop beyond the ceiling: how bad a useless candidate is must not bend the models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drops:
    """What was measured of accuracy at the points of a model, each `(n,)`.

    `measured` drops are not below 0; `diverged` are mean divergences as the drops that they are
    worth; `errors` are standard deviations of the drops where samples were left out, 0 elsewhere.
    Drops beyond `ceiling` count little.
    """

    measured: np.ndarray
    diverged: np.ndarray
    errors: np.ndarray
    n_samples: int
    ceiling: float


class DropModel:
    """The model, fitted: `Surrogate` for a figure with two stages.

    Args:
        features: of the factors and links, whose effects are drops.
        points: measured points, `(n, n_factors)`, at least one.
        drops: what was measured there.
    """

    base = 0.0

    def __init__(self, features: Features, points: np.ndarray, drops: Drops) -> None:
        self.features = features
        self._n_samples, self._measured = drops.n_samples, drops.measured
        beyond = _BEYOND * np.maximum(drops.diverged - drops.ceiling, 0.0) + drops.errors
        self._diverged = Surrogate(
            features, points, drops.diverged, beyond + _ACCURACY / drops.n_samples, base=0.0
        )
        self._beside = Surrogate(
            _beside(features),
            points,
            drops.measured - drops.diverged,
            beyond + self._luck(drops.diverged),
            base=0.0,
        )

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of a drop as it would be measured, each `(n,)`."""
        mean, deviation = self.weigh(self.features.rows(points))
        return mean, np.hypot(deviation, self._luck(mean))

    def weigh(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of parts of it, without luck: `rows` as `Surrogate.weigh` takes them."""
        (first, sure), (second, surer) = (
            self._diverged.weigh(rows),
            self._beside.weigh(_rows_beside(rows)),
        )
        return first + second, np.hypot(sure, surer)

    def unmeasured(self, rows: np.ndarray) -> np.ndarray:
        """The standard deviation that such parts would have without any measurement, `(n,)`."""
        found: np.ndarray = np.hypot(
            self._diverged.unmeasured(rows), self._beside.unmeasured(_rows_beside(rows))
        )
        return found

    def told(self) -> np.ndarray:
        """The drops of the measured points as they are: luck is theirs to keep."""
        return self._measured

    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Each drop less what the other points predict for it, and that one's deviation, `(n,)`."""
        (first, sure), (second, surer) = self._diverged.left_out(), self._beside.left_out()
        return first + second, np.hypot(sure, surer)

    def energy(self) -> Energy:
        """The mean of `predict` as tables."""
        return self._diverged.energy() + self._beside.energy()

    def believing(self, point: np.ndarray) -> DropModel:
        """The model after a measurement that gives what is predicted."""
        other = object.__new__(DropModel)
        other.features, other._n_samples = self.features, self._n_samples
        other._measured = np.append(self._measured, self.predict(point[None])[0])
        other._diverged = self._diverged.believing(point)
        other._beside = self._beside.believing(point)
        return other

    def _luck(self, drops: np.ndarray) -> np.ndarray:
        least = 1.0 / self._n_samples
        found: np.ndarray = _LUCK * np.sqrt(np.maximum(drops, least) * least)
        return found


Model = Surrogate | DropModel
"""Of either figure: both are read alike."""


def _beside(features: Features) -> Features:
    """The same choices, thought to do nothing beside their divergence, and to do less."""
    return Features(
        [
            replace(f, effects=np.zeros(f.n_options), scale=_BESIDE * f.scale)
            for f in features.factors
        ],
        [replace(link, scale=_BESIDE * link.scale, price=0.0) for link in features.links],
    )


def _rows_beside(rows: np.ndarray) -> np.ndarray:
    """Rows of the one features as rows of the others."""
    found = _BESIDE * rows
    found[:, -1] = 0.0
    return found
