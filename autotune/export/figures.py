"""Which figures of a trial to show, and how: with unit, interval and n.

Owns the rule "confirmed and held-out where there is one, else screening and search data", and
the text of a figure. The bundle's README and the report use it alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from device_agents.protocol import LatencyReport
from storage.records import AccuracyReport, TrialOutcome, TrialRecord

NONE = "–"


def latency_of(trial: TrialRecord) -> LatencyReport | None:
    """The confirmed latency where there is one, else the screening's; None before either."""
    return trial.confirmed_latency or trial.latency


def accuracy_of(trial: TrialRecord) -> AccuracyReport | None:
    """The accuracy on held-out data where there is one, else on search data."""
    return trial.held_out_accuracy or trial.accuracy


def metric_text(report: AccuracyReport) -> str:
    """The metric's name as people write it."""
    return {"top1": "top-1 accuracy"}.get(report.metric, report.metric)


def is_ranked(trial: TrialRecord) -> bool:
    """The trial may stand on the front: it ended well, with accuracy and a steady latency."""
    latency = latency_of(trial)
    return (
        trial.outcome == TrialOutcome.OK
        and trial.accuracy is not None
        and latency is not None
        and latency.is_steady
        and math.isfinite(trial.accuracy.value)
        and math.isfinite(latency.p50_ns)
    )


def point(trial: TrialRecord) -> tuple[float, float]:
    """Where a ranked trial stands in the picture: latency in ns, accuracy on search data.

    The accuracy is always the search data's, because all trials have it on the same samples.
    """
    latency = latency_of(trial)
    if latency is None or trial.accuracy is None:
        return math.nan, math.nan
    return latency.p50_ns, trial.accuracy.value


def front_line(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that no other beats in both latency and accuracy, fastest first.

    It is the front that `search` answers budgets with (a test holds them together), found here
    again because a picture must not import a search.
    """

    def order(trial: TrialRecord) -> tuple[float, float, int]:
        latency_ns, accuracy = point(trial)
        return latency_ns, -accuracy, trial.number

    line: list[TrialRecord] = []
    for trial in sorted(filter(is_ranked, trials), key=order):
        if not line or point(trial)[1] > point(line[-1])[1]:
            line.append(trial)
    return line


def duration_text(nanoseconds: float) -> str:
    """A duration with four significant digits.

    >>> duration_text(1_234_567), duration_text(81_300), duration_text(2.5e9)
    ('1.235 ms', '81.30 µs', '2.500 s')
    """
    scale, unit = _unit(nanoseconds)
    value = nanoseconds / scale
    return f"{value:.{_places(value)}f} {unit}"


def duration_interval_text(value: float, low: float, high: float) -> str:
    """A duration with its interval, all in the value's unit.

    >>> duration_interval_text(1_234_567, 1_220_000, 1_250_000)
    '1.235 ms [1.220, 1.250]'
    """
    return f"{duration_text(value)} {bounds_text(value, low, high)}"


def bounds_text(value: float, low: float, high: float) -> str:
    """The bounds of a duration in the value's unit.

    >>> bounds_text(1_034_567, 990_000, 1_250_000)
    '[0.990, 1.250]'
    """
    scale, _ = _unit(value)
    places = _places(value / scale)
    return f"[{low / scale:.{places}f}, {high / scale:.{places}f}]"


def latency_text(report: LatencyReport | None) -> str:
    """The latency with its interval; an unsteady one says so."""
    if report is None:
        return NONE
    text = duration_interval_text(report.p50_ns, report.p50_low_ns, report.p50_high_ns)
    return text if report.is_steady else f"{text} (unsteady: {report.unsteady_reason})"


def ratio_text(report: LatencyReport | None) -> str:
    """Latency over the FP32 model's in the same process; below 1 is faster."""
    if report is None:
        return NONE
    return f"{report.ratio:.3f} [{report.ratio_low:.3f}, {report.ratio_high:.3f}]"


def accuracy_text(report: AccuracyReport | None) -> str:
    """The metric in percent with its interval."""
    if report is None:
        return NONE
    return (
        f"{100 * report.value:.2f} % [{100 * report.value_low:.2f}, {100 * report.value_high:.2f}]"
    )


def drop_text(report: AccuracyReport | None) -> str:
    """Percentage points lost against FP32 on the same samples; negative is a gain."""
    if report is None:
        return NONE
    low, high = 100 * report.drop_low, 100 * report.drop_high
    return f"{100 * report.drop:+.2f} points [{low:+.2f}, {high:+.2f}]"


def size_text(size_bytes: int | None) -> str:
    """A size in decimal units.

    >>> size_text(9_137_554), size_text(812), size_text(None)
    ('9.14 MB', '812 B', '–')
    """
    if size_bytes is None:
        return NONE
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"


def precision_counts(trial: TrialRecord) -> dict[str, int]:
    """Layer groups per effective precision, most frequent first; planned where not yet built.

    Groups whose execution nobody saw count apart, by what was planned. FP32 groups are counted
    only where the compressor reported them: a candidate names none.
    """
    groups = group_precisions(trial)
    if groups:
        names = (g["effective"] or f"unseen (planned {g['planned']})" for g in groups)
        return dict(Counter(names).most_common())
    return dict(Counter(p.name for p in trial.candidate.precisions.values()).most_common())


def precisions_text(trial: TrialRecord) -> str:
    """For example `38 w8a8, 14 fp32`."""
    counts = precision_counts(trial)
    return ", ".join(f"{n} {name}" for name, n in counts.items()) or "fp32"


def prune_text(trial: TrialRecord) -> str:
    """How many groups are pruned and by how much, or that none is."""
    ratios = sorted(trial.candidate.prune_ratios.values())
    if not ratios:
        return "none"
    low, high = f"{100 * ratios[0]:.0f}", f"{100 * ratios[-1]:.0f}"
    span = low if low == high else f"{low} to {high}"
    return f"{len(ratios)} group{'s' if len(ratios) > 1 else ''} by {span} %"


def group_precisions(trial: TrialRecord) -> Sequence[Mapping[str, Any]]:
    """Planned and effective precision per layer group, empty until the file was built."""
    return (trial.compression or {}).get("groups") or ()


def _unit(nanoseconds: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if abs(nanoseconds) >= scale:
            return scale, unit
    return 1.0, "ns"


def _places(value: float) -> int:
    """Decimal places that show four significant digits."""
    return min(max(3 - math.floor(math.log10(abs(value))), 0), 4) if value else 0
