"""What one job teaches about its device's latency, so that the next model starts ahead.

Owns the regression from measured mixtures to costs per operator and precision, and what those
costs let expect of other groups. The costs are portable: a share of FP32's time for each
(operator, precision), nanoseconds per multiply-accumulate and per byte for FP32 itself, and
nanoseconds per byte that is converted at a boundary. A job's own model, with coefficients of its
own groups, is `surrogate.py`'s; it begins with what is expected here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autotune.search.priors import BASE_SCALE, BOUNDARY_SCALE, EFFECT_SCALE
from search_spaces import LayerGroup, LayerKind, RuntimeOptions
from storage.latency_model import LatencyModel, OperatorCost

_GROUP_SPREAD = 0.25
"""How far a group's own factor lies from its operator's, a standard deviation: shapes decide how
well a kernel does. A choice: half of what nothing known is given."""

_MODEL_SPREAD = 0.1
"""How far an operator's factor in another model may lie from the one learnt, beyond its error."""

_PROFILE_ERROR = 0.15
"""Of a factor by kernel times: profiling slows short kernels more than long ones."""

_MISFIT = 0.02
"""Of a mixture's ratio beyond its noise: what is not a sum of groups and boundaries."""

_FEW_CHANNELS = 8
"""Input channels below which a convolution cannot fill the lanes of a SIMD register."""

_LEARNT = 0.9
"""A factor counts as learnt when its deviation has fallen below this share of what it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixtures:
    """A model's groups and the measured mixtures of their precisions, as numbers.

    Args:
        operators: of each group, `operator_of`.
        options: the precisions of each group by name, FP32 first.
        shares: each group's part of FP32's time, `(n_groups,)`.
        boundary_bytes: of the tensor between a group and the next in FP32, `(n_groups - 1,)`.
        fp32_ns: FP32's latency.
        points: which option each group has, `(n, n_groups)`.
        ratios: latency over FP32's, `(n,)`.
        noise: its standard deviation, `(n,)`.
        bases: which pruned base each mixture is of, 0 for none, `(n,)`.
        saved: what each base is thought to save, as a share of the time, 0 for none, first.
        profiled: by (group, precision), its time as a share of FP32's, by kernel times.
        work: multiply-accumulates and bytes of each group, `(n_groups, 2)`, and `fp32_group_ns`
            its kernel time in FP32, `(n_groups,)`; empty where no profile told it.
    """

    operators: Sequence[str]
    options: Sequence[Sequence[str]]
    shares: np.ndarray
    boundary_bytes: np.ndarray
    fp32_ns: float
    points: np.ndarray
    ratios: np.ndarray
    noise: np.ndarray
    bases: np.ndarray
    saved: Sequence[float] = (0.0,)
    profiled: Mapping[tuple[int, str], float] = field(default_factory=dict)
    work: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    fp32_group_ns: np.ndarray = field(default_factory=lambda: np.zeros(0))


def operator_of(group: LayerGroup) -> str:
    """What a group mostly computes: the kind of its heaviest layer and the class of its shape.

    `conv`, `pointwise` (1x1), `few_channels` (an image's convolution), `depthwise_conv`,
    `conv_transpose`, `gemm` or `matmul`.
    """
    layer = max(group.layers, key=lambda layer: layer.macs)
    if layer.kind is not LayerKind.CONV:
        return layer.kind.value
    _, channels, *kernel = (*layer.weight_shape, 1, 1)[: max(len(layer.weight_shape), 2)]
    if channels < _FEW_CHANNELS:
        return "few_channels"
    return "pointwise" if all(size == 1 for size in kernel) else "conv"


def learn(
    mixtures: Mixtures,
    prior: LatencyModel | None,
    *,
    runtime: RuntimeOptions,
    runtime_version: str,
    thought: Mapping[tuple[str, str], float],
) -> LatencyModel:
    """The device's costs after those mixtures.

    Bayesian linear regression (Bishop 2006, section 3.3) of ratio - 1 on one coefficient per
    (operator, precision), one per (group, precision) for how far the group lies from it, one
    price per boundary byte and one level per pruned base. `prior` is what earlier jobs taught;
    `thought` the factor of an (operator, precision) where they taught nothing, 1 where left out.
    """
    kinds = sorted(
        {
            (o, p)
            for o, own in zip(mixtures.operators, mixtures.options, strict=True)
            for p in own[1:]
        }
    )
    columns = _Columns(mixtures, kinds)
    mean, deviation = columns.prior(prior, thought)
    rows, values, noise = columns.observations()
    scaled = rows * deviation
    inverse = np.linalg.inv(scaled @ scaled.T + np.diag(noise**2))
    gain = deviation[:, None] * scaled.T @ inverse
    after = mean + gain @ (values - rows @ mean)
    left = deviation * np.sqrt(
        np.maximum(1.0 - np.einsum("ij,ji->i", scaled.T @ inverse, scaled), 0.0)
    )
    costs = {(c.operator, c.precision): c for c in (prior.operators if prior else ())}
    costs |= _fp32_costs(mixtures)
    for index, kind in enumerate(kinds):
        if left[index] < _LEARNT * deviation[index]:
            costs[kind] = _cost(kind, 1.0 + after[index], left[index], mixtures, costs)
    price, error = (prior.boundary_ns_per_byte, prior.boundary_deviation) if prior else (None, None)
    where = len(kinds)
    if left[where] < _LEARNT * deviation[where]:
        per_byte = columns.ns_per_byte
        price, error = max(after[where], 0.0) * per_byte, left[where] * per_byte
    return LatencyModel(
        runtime=runtime,
        runtime_version=runtime_version,
        operators=tuple(costs[kind] for kind in sorted(costs)),
        boundary_ns_per_byte=None if price is None else float(price),
        boundary_deviation=None if error is None else float(error),
        n_trials=len(mixtures.ratios) + (prior.n_trials if prior else 0),
    )


class _Columns:
    """The regression's coefficients: operators, the boundary, groups, bases; in this order."""

    def __init__(self, mixtures: Mixtures, kinds: Sequence[tuple[str, str]]) -> None:
        self._mixtures, self._kinds = mixtures, kinds
        names = [(g, p) for g, own in enumerate(mixtures.options) for p in own[1:]]
        first = len(kinds) + 1
        self._own = {name: first + index for index, name in enumerate(names)}
        self._bases = first + len(names)
        self._width = self._bases + len(mixtures.saved) - 1
        self._kind = {kind: index for index, kind in enumerate(kinds)}

    @property
    def ns_per_byte(self) -> float:
        """What a boundary's price as a share of FP32's time is per byte."""
        total = float(self._mixtures.boundary_bytes.sum()) or 1.0
        return self._mixtures.fp32_ns / total

    def prior(
        self, known: LatencyModel | None, thought: Mapping[tuple[str, str], float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each coefficient."""
        mean, deviation = np.zeros(self._width), np.full(self._width, _GROUP_SPREAD)
        for kind, index in self._kind.items():
            cost = known.cost(*kind) if known else None
            mean[index] = (cost.factor if cost else thought.get(kind, 1.0)) - 1.0
            spread = math.hypot(cost.deviation, _MODEL_SPREAD) if cost else EFFECT_SCALE
            deviation[index] = spread
        where = len(self._kinds)
        deviation[where] = BOUNDARY_SCALE
        if known and known.boundary_ns_per_byte is not None:
            mean[where] = known.boundary_ns_per_byte / self.ns_per_byte
            deviation[where] = math.hypot(
                (known.boundary_deviation or 0.0) / self.ns_per_byte, _MODEL_SPREAD
            )
        mean[self._bases :] = [-saved for saved in self._mixtures.saved[1:]]
        deviation[self._bases :] = BASE_SCALE
        return mean, deviation

    def observations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows `(n, n_coefficients)`, values and noise, `(n,)`: mixtures, then profiled groups."""
        m = self._mixtures
        rows = np.zeros((len(m.ratios) + len(m.profiled), self._width))
        sizes = m.boundary_bytes / (m.boundary_bytes.sum() or 1.0)
        levels = [int(base) for base in m.bases]
        for row, point, base in zip(rows, m.points, levels, strict=False):
            left = 1.0 - m.saved[base]
            for group in np.flatnonzero(point).tolist():
                precision = m.options[group][int(point[group])]
                self._add(row, group, precision, m.shares[group] * left)
            crossing = (point[1:] > 0) != (point[:-1] > 0)
            row[len(self._kinds)] = left * (sizes * crossing).sum()
            if base:
                row[self._bases + base - 1] = 1.0
        values, noise = list(m.ratios - 1.0), [math.hypot(x, _MISFIT) for x in m.noise]
        for row, ((group, precision), factor) in zip(
            rows[len(m.ratios) :], m.profiled.items(), strict=True
        ):
            self._add(row, group, precision, 1.0)
            values.append(factor - 1.0)
            noise.append(_PROFILE_ERROR)
        return rows, np.array(values), np.array(noise)

    def _add(self, row: np.ndarray, group: int, precision: str, share: float) -> None:
        row[self._kind[self._mixtures.operators[group], precision]] += share
        row[self._own[group, precision]] += share


def _cost(
    kind: tuple[str, str],
    factor: float,
    deviation: float,
    mixtures: Mixtures,
    known: Mapping[tuple[str, str], OperatorCost],
) -> OperatorCost:
    operator, precision = kind
    before, fp32 = known.get(kind), known.get((operator, "fp32"))
    factor = max(float(factor), 0.01)

    def scaled(ns: float | None) -> float | None:
        return None if ns is None else ns * factor

    return OperatorCost(
        operator=operator,
        precision=precision,
        factor=factor,
        deviation=float(deviation),
        ns_per_mac=scaled(fp32.ns_per_mac) if fp32 else None,
        ns_per_byte=scaled(fp32.ns_per_byte) if fp32 else None,
        n_groups=sum(
            o == operator and precision in own
            for o, own in zip(mixtures.operators, mixtures.options, strict=True)
        )
        + (before.n_groups if before else 0),
    )


def _fp32_costs(mixtures: Mixtures) -> dict[tuple[str, str], OperatorCost]:
    """Nanoseconds per multiply-accumulate and per byte of each operator, by the FP32 profile.

    Least squares of the relative error, so that small groups count; neither may be below 0.
    """
    found = {}
    for operator in sorted(set(mixtures.operators)) if len(mixtures.fp32_group_ns) else ():
        own = np.array([o == operator for o in mixtures.operators]) & (mixtures.fp32_group_ns > 0)
        if not own.any():
            continue
        rates = mixtures.work[own] / mixtures.fp32_group_ns[own, None]
        both = np.linalg.lstsq(rates, np.ones(len(rates)), rcond=None)[0]
        if len(rates) < 2 or (both < 0).any():
            fits = [_single(rates, column) for column in (0, 1)]
            both = min(fits, key=lambda fit: float(((rates @ fit - 1.0) ** 2).sum()))
        found[operator, "fp32"] = OperatorCost(
            operator=operator,
            precision="fp32",
            factor=1.0,
            deviation=0.0,
            ns_per_mac=float(both[0]),
            ns_per_byte=float(both[1]),
            n_groups=int(own.sum()),
        )
    return found


def _single(rates: np.ndarray, column: int) -> np.ndarray:
    """The fit with one of the two alone."""
    fit, squares = np.zeros(2), float((rates[:, column] ** 2).sum())
    fit[column] = rates[:, column].sum() / squares if squares else 0.0
    return fit


def expected_saving(model: LatencyModel | None, operator: str, precision: str) -> float | None:
    """The share of its time that a group saves; below 0 it is slower. None where unknown."""
    cost = model.cost(operator, precision) if model else None
    return None if cost is None else 1.0 - cost.factor


def expected_spread(model: LatencyModel | None, operator: str, precision: str) -> float | None:
    """How far a group's saving may lie from that, a standard deviation; None where unknown."""
    cost = model.cost(operator, precision) if model else None
    if cost is None:
        return None
    return math.hypot(cost.deviation, _MODEL_SPREAD, _GROUP_SPREAD)


def expected_ns(
    model: LatencyModel | None, operator: str, macs: float, n_bytes: float
) -> float | None:
    """The time of a group in FP32; None where unknown."""
    cost = model.cost(operator, "fp32") if model else None
    if cost is None or cost.ns_per_mac is None or cost.ns_per_byte is None:
        return None
    return cost.ns_per_mac * macs + cost.ns_per_byte * n_bytes
