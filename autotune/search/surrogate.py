"""A model of one figure (latency, accuracy drop) over the choices, fitted on measured trials.

Owns the regression: an additive Gaussian process over single choices and over pairs of linked
ones, which is Bayesian ridge regression with one coefficient per (factor, option) and per
(link, option, option), and one for what those of a kind have in common. Points are rows of
integers, one per factor; what the factors mean is `landscape.py`'s, what to try next
`improvement.py`'s. Deterministic; nothing is random here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autotune.search.features import Features

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
                own = own + (w[-2] + trust * link.relative_price) * table[..., 0]
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
