"""What is thought before anything is measured: of groups, as factors and links; by earlier jobs.

Owns the scales: how far effects may lie from what kernel times and sensitivities tell, and how
strongly neighbours bear on each other. Knows groups as rows of numbers; what a job's candidates
are is `landscape.py`'s knowledge, the regression `surrogate.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from autotune.search.features import Factor, Link
from storage.latency_model import LatencyModel
from storage.records import TrialRecord
from storage.sensitivity import Sensitivity

EFFECT_SCALE = 0.5
"""How far a group's true effect may lie from the one thought of, as a share of its time."""

LEAST_SHARE = 0.01
"""Of the time, for a group that hardly computes: launching its kernels takes time too."""

BOUNDARY_SCALE = 0.5
"""The price of converting all activations once, as a share of FP32's time. A choice."""

BOUNDARY_BY_BYTES = 1 / 3
"""The part of it that goes with the tensors' bytes; the rest is alike for all boundaries, because
converting takes a kernel of its own however small the tensor is. In the measured tables of ten
groups (`tests.benchmarks`) a boundary costs, of FP32's latency, 0.0061 + 0.125 per MB on
mobilenet_v2, 0.0070 + 0.238 on mobilenet_v3_small, 0.0053 + 0.025 on efficientnet_b0: two thirds
and more do not. Against all by bytes, after 24 runs 0.95 instead of 0.92, 1.00 and 1.00, 0.89
instead of 0.87 of their mixtures, and 0.99 and 1.00 of resnet18's, are predicted within 10 % (20
seeds)."""

BASE_SCALE = 0.3
"""How far a pruned base's time may lie from the one thought of, as a share of FP32's. A choice."""

_DAMAGE_SCALE = 0.7
_LEAST_DAMAGE = 1e-4

_DISTANT_LINKS = 36
"""Pairs of groups that are no neighbours and yet reinforce each other's damage: all of ten
groups, of more those that matter most. On the measured tables of ten groups (`tests.benchmarks`)
they bring the share of divergence's variance that sums explain from 0.90 to 0.997 (resnet18)."""


def profiled(kernel_ns: np.ndarray, latency: float) -> np.ndarray:
    """Each group's part of a file's latency, in its unit, `(n_groups,)`.

    `kernel_ns` `(n_groups,)` is the file's profile. It says which part is large and not how fast
    the file is: noting it costs every kernel the same few microseconds, and 8-bit files have
    more kernels.
    """
    found: np.ndarray = kernel_ns * (latency / max(float(kernel_ns.sum()), 1e-9))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """Results of earlier jobs that a job begins with; none is a trial of its own.

    `latencies` are trials whose latency holds here, `drops` those of them whose accuracy does
    too, `front` those that no other of them beat. `sensitivity` is of the same data. `taught` is
    what jobs on this device taught about it, whatever their models were.
    """

    latencies: tuple[TrialRecord, ...] = ()
    drops: tuple[TrialRecord, ...] = ()
    front: tuple[TrialRecord, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    taught: LatencyModel | None = None


NOTHING = Earlier()


def time_scales(shares: np.ndarray, spreads: np.ndarray | float = EFFECT_SCALE) -> np.ndarray:
    """How far each group's effect on latency may lie from the one thought of, `(n_groups,)`.

    `spreads` `(n_groups,)` are the same as shares of the group's own time.
    """
    found: np.ndarray = spreads * np.maximum(shares, LEAST_SHARE)
    return found


def time_factors(
    shares: np.ndarray,
    savings: Sequence[np.ndarray],
    spreads: np.ndarray | float = EFFECT_SCALE,
    *,
    kinds: Sequence[Hashable] | None = None,
) -> list[Factor]:
    """Per group what its options do to the latency, as a ratio to FP32's.

    `shares` `(n_groups,)` are the groups' parts of FP32's time; `savings` has for each group
    `(n_options,)`, the part of its own time that an option saves: 0 for FP32, below 0 where an
    option is slower. `spreads` `(n_groups,)` are how far the savings may be off where earlier
    jobs of the device have taught that. Groups of one kind have the same options; without
    `kinds`, those that have as many.
    """
    kinds = kinds or [len(saving) for saving in savings]
    scales = time_scales(shares, spreads)
    return [
        Factor(n_options=len(saving), effects=-share * saving, scale=scale, kind=kind)
        for share, saving, scale, kind in zip(shares, savings, scales, kinds, strict=True)
    ]


def boundary_links(tensor_sizes: np.ndarray, *, price: float = 0.0) -> list[Link]:
    """A link from each group to the next one, the stronger the larger the tensor between them is.

    `tensor_sizes` `(n_groups - 1,)` in any unit; `price` is what converting all of them once is
    thought to add to the ratio.
    """
    total = tensor_sizes.sum() or 1.0
    alike = (1 - BOUNDARY_BY_BYTES) / max(len(tensor_sizes), 1)
    return [
        Link(
            first=column,
            second=column + 1,
            scale=BOUNDARY_SCALE * (alike + BOUNDARY_BY_BYTES * float(size) / total),
            is_boundary=True,
            price=price * float(size) / total,
        )
        for column, size in enumerate(tensor_sizes)
    ]


def damage_factors(damages: Sequence[np.ndarray]) -> list[Factor]:
    """Per group what its options do to the accuracy: `damages` are drops, `(n_options,)` each."""
    return [
        Factor(
            n_options=len(damage),
            effects=damage,
            scale=_DAMAGE_SCALE * max(float(damage.max()), _LEAST_DAMAGE),
        )
        for damage in damages
    ]


def damage_links(factors: Sequence[Factor]) -> list[Link]:
    """A link from each group to the next one and between those that damage most, wherever.

    Divergence is to second order a quadratic form of what the choices do to the answers, so that
    every two of them have a term, as large as the root of both damages' product.
    """
    n = len(factors)
    neighbours = [(column, column + 1) for column in range(n - 1)]
    others = [(first, second) for first in range(n) for second in range(first + 2, n)]
    others.sort(key=lambda pair: -factors[pair[0]].scale * factors[pair[1]].scale)
    return [
        Link(
            first=first,
            second=second,
            scale=math.sqrt(factors[first].scale * factors[second].scale),
        )
        for first, second in (*neighbours, *others[:_DISTANT_LINKS])
    ]
