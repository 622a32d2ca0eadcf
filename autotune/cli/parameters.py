"""Types of command-line values: fractions, limits, digests, counts, times, shapes.

A mistake is a usage error that shows the value and what is allowed.
"""

from __future__ import annotations

from typing import Any

import click

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Fraction(click.ParamType[float]):
    """A share written as `1%` or `0.01`."""

    name = "fraction"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The share as a number from 0 to 1."""
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            number = -1.0
        if not 0.0 <= number <= 1.0:
            self.fail(f"{value!r} is not a share from 0 to 1; write 1% or 0.01", param, ctx)
        return number


class Budget(click.ParamType[str]):
    """A latency budget such as `3ms`, `800us` or `0.5x`."""

    name = "latency"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, once it is known to be readable."""
        from autotune.limits import LatencyBudget

        try:
            LatencyBudget.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value).strip()


class Amount(click.ParamType[str]):
    """One of a job file's `max_size`, `max_memory` (`3MB`) and `max_energy` (`5mJ`)."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.name = key.removeprefix("max_")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, once it is known to be readable."""
        from autotune.limits import AMOUNTS

        try:
            AMOUNTS[self.key](str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value).strip()


class Digest(click.ParamType[str]):
    """The beginning of a sha256, as lists show it."""

    name = "digest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Its digits in lower case."""
        text = str(value).strip().lower()
        if not 6 <= len(text) <= 64 or not set(text) <= set("0123456789abcdef"):
            self.fail(
                f"{value!r} does not begin a sha256; write 6 to 64 of its digits (0-9, a-f) as "
                "the list shows them",
                param,
                ctx,
            )
        return text


class Count(click.ParamType[int]):
    """How many more, written `+50` or `50`."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, 1 or more."""
        text = str(value).strip()
        if not text.removeprefix("+").isdecimal() or int(text) < 1:
            self.fail(f"{value!r} is not how many more; write a whole number as +50", param, ctx)
        return int(text)


class Seconds(click.ParamType[float]):
    """A length of time such as `90s`, `20m` or `1.5h`; a bare number is seconds."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The time in seconds."""
        text = str(value).strip()
        unit = _UNITS_S.get(text[-1:], 1.0)
        try:
            seconds = float(text.rstrip("smh")) * unit
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            self.fail(f"{value!r} is not a length of time; write 90s, 20m or 1.5h", param, ctx)
        return seconds


class Shape(click.ParamType["tuple[int, ...]"]):
    """A shape without its batch axis, such as `3,224,224`."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The axes."""
        if isinstance(value, tuple):
            return value
        try:
            axes = tuple(int(part) for part in str(value).replace("x", ",").split(","))
        except ValueError:
            axes = ()
        if not axes or min(axes) < 1:
            self.fail(f"{value!r} is not a shape; write the axes as 3,224,224", param, ctx)
        return axes


FRACTION = Fraction()
BUDGET = Budget()
COUNT = Count()
DIGEST = Digest()
SECONDS = Seconds()
SHAPE = Shape()

WARM_START = (
    "Begin with what this earlier job measured (its name or id), or with nothing (none).  "
    "[default: the job file's; without one the newest job of the same model]"
)
