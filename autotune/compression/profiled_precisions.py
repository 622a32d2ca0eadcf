"""Effective precision by a device's own profile, which wins over what the service looked at.

Owns what the kernels of a layer group tell of it; which kernel belongs to which group is
`layer_times.py`'s, what is known without a profile `effective.py`'s and `shipped_runtime.py`'s.
A runtime whose kernels are not named as onnxruntime's tells nothing, and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from autotune.compression.kernel_names import (
    BLOCK_KERNELS,
    FLOAT_CONVOLUTIONS,
    FLOAT_KERNELS,
    INTEGER_KERNELS,
)
from device_agents.protocol import Profile
from search_spaces import FP32, INT8, LayerGroup, LayerPattern, Precision

SEEN_IN = "the device's profile"
_WITHOUT_WEIGHTS = 2
"""Products in an attention group that are no layers: queries with keys, weights with values."""


def seen_by_device(
    entries: Iterable[Mapping[str, Any]], profile: Profile, groups: Iterable[LayerGroup]
) -> list[dict[str, Any]]:
    """A trial's `groups` as the device executed them; those that its kernels leave open stay.

    `profile` names the groups of its kernels (`layer_times.with_groups`).
    """
    kernels: dict[str, Counter[str]] = {}
    for kernel in profile.kernels:
        if kernel.group is not None:
            kernels.setdefault(kernel.group, Counter())[kernel.operator] += 1
    known = {group.name: group for group in groups}
    return [
        {**entry, **_executed(Precision.parse(entry["planned"]), known[name], kernels[name])}
        if (name := entry["group"]) in kernels and name in known
        else dict(entry)
        for entry in entries
    ]


def _executed(
    planned: Precision, group: LayerGroup, operators: Mapping[str, int]
) -> dict[str, Any]:
    """What the kernels say; nothing where they may not be all that compute the layers."""
    n_layers = len(group.layers)
    n_integer, n_float, n_blocked = (
        sum(operators.get(name, 0) for name in names)
        for names in (INTEGER_KERNELS, FLOAT_KERNELS, BLOCK_KERNELS)
    )
    if group.pattern is LayerPattern.ATTENTION:
        n_float = max(n_float - _WITHOUT_WEIGHTS, 0)
    if n_integer + n_float + n_blocked < n_layers:
        return {}
    if planned.is_int8:
        if n_integer >= n_layers and not operators.keys() & FLOAT_CONVOLUTIONS:
            return _verdict(planned)
        return _verdict(FP32, f"the device computes it in {_named(operators, FLOAT_KERNELS)}")
    if planned.is_float:
        # What stands around a layer may be an integer convolution (`hard_swish.py`).
        if n_float >= n_layers:
            return _verdict(planned)
        if n_integer:
            return _verdict(INT8, f"the device computes it in {_named(operators, INTEGER_KERNELS)}")
    if planned.is_weight_only and n_blocked >= n_layers:
        return _verdict(planned)
    return {}


def _verdict(effective: Precision, reason: str | None = None) -> dict[str, Any]:
    return {"effective": effective.name, "reason": reason, "seen_in": SEEN_IN}


def _named(operators: Mapping[str, int], kernels: frozenset[str]) -> str:
    return ", ".join(sorted(operators.keys() & kernels))
