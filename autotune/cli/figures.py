"""Numbers as people read them: with a unit, a spread, and no more digits than are known.

Owns text only. Latencies come in ns, fractions from 0 to 1; a figure that does not exist
is `MISSING`, never 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from autotune.api_types import Interval

MISSING = "-"


def number(value: float, *, spread: float | None = None) -> str:
    """The value with the digits that its spread leaves meaningful, else four of them.

    The spread shows with two significant digits (GUM, JCGM 100:2008, 7.2.6).

    >>> number(2.41234, spread=0.0312), number(1234.5, spread=40), number(0.034567)
    ('2.412', '1234', '0.03457')
    """
    if not math.isfinite(value):
        return str(value)
    if spread is not None and spread > 0 and math.isfinite(spread):
        return f"{value:.{max(0, 1 - math.floor(math.log10(spread)))}f}"
    if value == 0:
        return "0"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def interval(figure: Interval | None, *, scale: float = 1.0) -> str:
    """`value [low, high]` of a 95 % interval, each times `scale`.

    >>> interval(Interval(value=2.4e6, low=2.35e6, high=2.47e6), scale=1e-6)
    '2.400 [2.350, 2.470]'
    >>> interval(None)
    '-'
    """
    if figure is None:
        return MISSING
    spread = (figure.high - figure.low) / 2 * scale
    value, low, high = (
        number(part * scale, spread=spread) for part in (figure.value, figure.low, figure.high)
    )
    return f"{value} [{low}, {high}]" if spread > 0 else value


def milliseconds(figure: Interval | None) -> str:
    """A latency interval in ms, without the unit: the column's title carries it."""
    return interval(figure, scale=1e-6)


def percent(figure: Interval | None) -> str:
    """A fraction's interval in percent with one decimal: samples are hundreds, not millions.

    >>> percent(Interval(value=0.934, low=0.911, high=0.9522))
    '93.4 [91.1, 95.2]'
    """
    if figure is None:
        return MISSING
    return f"{figure.value:.1%} [{figure.low:.1%}, {figure.high:.1%}]".replace("%", "")


def optional(value: float | None) -> str:
    """A bare number that may not exist."""
    return MISSING if value is None else number(value)


def counted(counter: Counter[str]) -> str:
    """How many of each kind, most first.

    >>> counted(Counter(["w8a8", "fp32", "w8a8"]))
    '2 w8a8, 1 fp32'
    """
    return ", ".join(f"{amount} {name}" for name, amount in counter.most_common())


def with_unit(text: str, unit: str, n: int | None) -> str:
    """A figure's text with its unit and sample count; a missing figure stays missing.

    >>> with_unit("93.4 [91.1, 95.2]", "%", 360), with_unit(MISSING, "%", None)
    ('93.4 [91.1, 95.2] %, n=360', '-')
    """
    if text == MISSING:
        return MISSING
    return f"{text} {unit}" if n is None else f"{text} {unit}, n={n}"


def latency(ns: float | None) -> str:
    """A duration with the unit that suits it.

    >>> latency(812_345.0), latency(2_412_345.0), latency(1.5e9), latency(None)
    ('812.3 µs', '2.412 ms', '1.500 s', '-')
    """
    if ns is None:
        return MISSING
    for scale, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if abs(ns) >= scale:
            return f"{number(ns / scale)} {unit}"
    return f"{number(ns)} ns"


def size(size_bytes: int | None) -> str:
    """A file's size.

    >>> size(9_123_456), size(512), size(None)
    ('9.12 MB', '512 B', '-')
    """
    if size_bytes is None:
        return MISSING
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"


def count(amount: int) -> str:
    """A large whole number.

    >>> count(1_234_567), count(950)
    ('1.23 M', '950')
    """
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= scale:
            return f"{amount / scale:.2f} {unit}"
    return str(amount)


def seconds(duration_s: float | None) -> str:
    """A stretch of time.

    >>> seconds(8.2), seconds(95), seconds(7300), seconds(None)
    ('8 s', '1 min 35 s', '2 h 1 min', '-')
    """
    if duration_s is None:
        return MISSING
    whole = max(0, round(duration_s))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_BARS = "▁▂▃▄▅▆▇█"


def steps(points: Sequence[tuple[float, float]], *, width: int = 24) -> str:
    """A figure that only grows as a line of bars: `(where, figure)` from 0 to the last `where`.

    The highest bar is the last figure. Empty without a point or without an extent.

    >>> steps([(1, 0.1), (2, 0.5), (8, 0.5)], width=8)
    '▂███████'
    """
    if not points or points[-1][0] <= 0 or points[-1][1] <= 0:
        return ""
    end, top = points[-1]
    bars = ""
    for cell in range(1, width + 1):
        reached = [figure for where, figure in points if where <= cell * end / width]
        bars += _BARS[round((len(_BARS) - 1) * reached[-1] / top)] if reached else " "
    return bars
