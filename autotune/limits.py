"""Limits as users write them: a latency, a file's size, memory, energy.

Owns their units and how they are read. What a limit means for a trial is
`search/feasibility.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, get_args

from pydantic import BaseModel, ConfigDict

from device_agents.protocol import Quantile

QUANTILES: tuple[Quantile, ...] = get_args(Quantile)

_BUDGET = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(x|us|µs|ms|s)\s*$")
_NS = {"us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}
_AMOUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-zµ]+)\s*$")
_BYTES = {
    "B": 1.0,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
_JOULES = {"uJ": 1e-6, "µJ": 1e-6, "mJ": 1e-3, "J": 1.0}


class FurtherLimits(TypedDict, total=False):
    """What may be asked of a job's trials beside a budget, by a job file's keys."""

    latency_at: Quantile | None
    max_accuracy_drop: float | None
    max_size: str | None
    max_memory: str | None
    max_energy: str | None


class LatencyBudget(BaseModel):
    """A bound on latency: absolute in ns, or a fraction of the FP32 model's latency.

    >>> LatencyBudget.parse("0.5x").nanoseconds(fp32_latency_ns=4e6)
    2000000.0
    >>> LatencyBudget.parse("3ms").nanoseconds(fp32_latency_ns=4e6)
    3000000.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction_of_fp32: float | None = None
    absolute_ns: float | None = None

    @classmethod
    def parse(cls, text: str) -> LatencyBudget:
        """Read `0.5x`, `2.5ms`, `800us` or `1s`.

        Raises:
            ValueError: the text is neither, or not above zero.
        """
        match = _BUDGET.match(text)
        if match is None or float(match[1]) <= 0:
            raise ValueError(
                f"{text!r} is not a latency budget; write a duration such as 2.5ms or 800us, "
                "or a fraction of the FP32 latency such as 0.5x"
            )
        if match[2] == "x":
            return cls(fraction_of_fp32=float(match[1]))
        return cls(absolute_ns=float(match[1]) * _NS[match[2]])

    def nanoseconds(self, *, fp32_latency_ns: float) -> float:
        """The bound in ns, given the FP32 latency that the device measured."""
        if self.absolute_ns is not None:
            return self.absolute_ns
        return (self.fraction_of_fp32 or 1.0) * fp32_latency_ns


def parse_bytes(text: str) -> float:
    """Bytes of `3MB`, `800kB` or `2MiB`.

    >>> parse_bytes("3MB"), parse_bytes("2MiB")
    (3000000.0, 2097152.0)

    Raises:
        ValueError: the text is no size, or not above zero.
    """
    return _parse(text, _BYTES, "a size; write 3MB, 800kB or 2MiB")


def parse_joules(text: str) -> float:
    """Joules of `5mJ`, `800uJ` or `0.1J`.

    Raises:
        ValueError: the text is no energy, or not above zero.
    """
    return _parse(text, _JOULES, "an energy; write 5mJ, 800uJ or 0.1J")


AMOUNTS: Mapping[str, Callable[[str], float]] = {
    "max_size": parse_bytes,
    "max_memory": parse_bytes,
    "max_energy": parse_joules,
}
"""The limits of a job beside its latency budget and accuracy drop, by their keys in its file."""


def amounts(spec: Mapping[str, Any]) -> dict[str, float]:
    """What a job file sets of `AMOUNTS`, in bytes and joules.

    >>> amounts({"max_size": "3MB", "max_energy": None})
    {'max_size': 3000000.0}
    """
    return {key: parse(spec[key]) for key, parse in AMOUNTS.items() if spec.get(key)}


def ms_text(duration_ns: float) -> str:
    """A latency for people.

    >>> ms_text(2.5e6)
    '2.5 ms'
    """
    return f"{duration_ns / 1e6:.3g} ms"


def bytes_text(amount: float) -> str:
    """A size for people.

    >>> bytes_text(3e6), bytes_text(812.0)
    ('3 MB', '812 B')
    """
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= scale:
            return f"{amount / scale:.3g} {unit}"
    return f"{amount:.3g} B"


def joules_text(amount: float) -> str:
    """An energy for people.

    >>> joules_text(0.0052), joules_text(2.0)
    ('5.2 mJ', '2 J')
    """
    for scale, unit in ((1.0, "J"), (1e-3, "mJ")):
        if amount >= scale:
            return f"{amount / scale:.3g} {unit}"
    return f"{amount * 1e6:.3g} µJ"


def _parse(text: str, units: Mapping[str, float], allowed: str) -> float:
    match = _AMOUNT.match(text)
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not {allowed}")
    return float(match[1]) * units[match[2]]
