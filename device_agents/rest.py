"""What a reference model takes on a device at rest, and how long a measurement waits for that.

A calibration may fall into a bad minute, and what it finds out is not what the device does at
rest. An agent remembers what its last measurements found instead. Owns that memory, what counts
as rest, and the most that a measurement waits. Loads neither numpy nor pydantic: the agent's
parent process decides, the timed loop of its child (`sampling.py`) waits.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device_agents.protocol import LatencyReport, MeasurementPlan

RESTLESS = 0.03
"""By which fraction the reference is slower than at rest, at least."""
REST_CAPS = 4
"""Time caps that a measurement may take until the device is at rest. While a neighbour is busy
whole stretches of 8 s have no undisturbed sample, and such stretches last from ten seconds to two
minutes. In two of the worst hours, of 402 and 600 s of pairs of INT8 and FP32 mobilenet_v2 in a
row, one cap gives an interquartile range of 0.34 and 0.35 of that of 20 runs after 10, four give
0.16 and 0.18, and seven and a half 0.17 and 0.15, which take up to a half longer (ten replays of
each). Chosen on these."""
MEMORY = 8
"""Measurements of one reference that are remembered."""
REST_SHARE = 0.25
"""Of these found the device at rest, or better: less than the share of waiting measurements that
find rest in a bad hour (0.7 to 0.9), and of eight two, so that one under a faster clock does not
count. A device that is slower from today on is waited for in vain seven times. Chosen on the same
hours as `REST_CAPS`, where six or twelve give the same; the fastest of all is waited for longer and
gives no better ratios."""
MAX_REFERENCES = 64
"""Of which levels are remembered: more than an agent serves within days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What a measurement is told of rest.

    `reference_ns` is what the reference takes there, as far as known. `cap_s` takes the place of
    the plan's time cap while it takes `RESTLESS` more; None does not wait for rest.
    """

    reference_ns: float | None = None
    cap_s: float | None = None


def is_restless(reference_ns: float, rest_ns: float) -> bool:
    """The reference is slower than at rest, by `RESTLESS` or more.

    >>> is_restless(1.02e6, 1e6), is_restless(1.04e6, 1e6)
    (False, True)
    """
    return reference_ns > (1 + RESTLESS) * rest_ns


class RestMemory:
    """What an agent's measurements found their references to take, of one after the other.

    A reference is named by anything that tells it, run in one way, from all others.
    """

    def __init__(self) -> None:
        self._levels: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def ask(self, reference: Hashable, plan: MeasurementPlan, *, is_reference: bool) -> Rest:
        """What a measurement with this reference has to know.

        It waits for `REST_CAPS` time caps and half of the timeout at most, never less than the
        cap. Not where nothing is known of the reference, nor where the candidate `is_reference`,
        whose ratio to itself is the same in every state; but for a calibration, which is to find
        out what the device takes at rest.
        """
        levels = self._levels.get(reference)
        rest_ns = level_at_rest(levels) if levels else plan.reference_latency_ns
        if rest_ns is None or (is_reference and not plan.is_calibration):
            return Rest(reference_ns=rest_ns)
        cap_s = max(plan.time_cap_s, min(REST_CAPS * plan.time_cap_s, plan.timeout_s / 2))
        return Rest(reference_ns=rest_ns, cap_s=cap_s)

    def learn(
        self,
        reference: Hashable,
        plan: MeasurementPlan,
        report: LatencyReport | None,
        *,
        is_reference: bool,
    ) -> None:
        """Remember what a measurement found its reference to take.

        Nothing of one without a report, nor of one whose candidate `is_reference`, but for a
        calibration and the very first: those that compare devices are short and many. From the
        first one also what the reference was calibrated at, maybe before the agent's start.
        """
        is_known = reference in self._levels
        if report is None or (is_reference and is_known and not plan.is_calibration):
            return
        levels = self._levels.setdefault(reference, deque(maxlen=MEMORY))
        if not levels and plan.reference_latency_ns is not None:
            levels.append(plan.reference_latency_ns)
        levels.append(report.reference_p50_ns)
        self._levels.move_to_end(reference)
        if len(self._levels) > MAX_REFERENCES:
            self._levels.popitem(last=False)


def level_at_rest(levels: deque[float]) -> float:
    """The level that `REST_SHARE` of these reach, or the fastest of four and fewer.

    >>> level_at_rest(deque([1.1, 1.0, 1.4])), level_at_rest(deque([1.4] * 6 + [1.0, 1.1]))
    (1.0, 1.1)
    """
    return sorted(levels)[int(REST_SHARE * (len(levels) - 1))]
