"""How long a measurement waits for a device at rest, and when waiting is given up.

A device is at rest while the reference model takes what it took when it was calibrated. Owns what
counts as that, the most that a measurement waits, and an agent's memory of waits in vain. Loads
neither numpy nor pydantic: the agent's parent process decides, the timed loop of its child
(`sampling.py`) waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device_agents.protocol import LatencyReport, MeasurementPlan

RESTLESS = 0.03
"""By which fraction the reference is slower than when it was calibrated, at least."""
REST_CAPS = 4
"""Time caps that a measurement may take until the device is at rest. While a neighbour is busy
whole stretches of 8 s have no undisturbed sample: of three sets of measurements of INT8
mobilenet_v2 in a calm, a restless and a bad hour, with a calibrated latency as in the fastest
quarter of the hour, the interquartile range was 0.29, 0.20 and 0.56 of that of 20 runs after 10
with one cap, 0.26, 0.16 and 0.44 with two and 0.22, 0.15 and 0.38 with four, which took 2.0, 1.5
and 1.6 times as long. Chosen on these."""
MAX_IN_VAIN = 2
"""Measurements in a row that waited in vain; the next ones do not wait until one finds rest. A
neighbour's minute is waited for, a device that is slower today than when it was calibrated is not:
its bounds are wider by that instead (`latency.state_uncertainty`). A choice."""


def is_restless(reference_ns: float, calibrated_ns: float) -> bool:
    """The reference is slower than when it was calibrated, by `RESTLESS` or more.

    >>> is_restless(1.02e6, 1e6), is_restless(1.04e6, 1e6)
    (False, True)
    """
    return reference_ns > (1 + RESTLESS) * calibrated_ns


class Patience:
    """Decides for one measurement after the other whether it waits for the device at rest."""

    def __init__(self) -> None:
        self._in_vain = 0

    def rest_cap_s(self, plan: MeasurementPlan, *, is_reference: bool) -> float | None:
        """What takes the place of the plan's time cap while the device is not at rest.

        `REST_CAPS` of these and half of the timeout at most, never less than the cap; None does
        not wait: nothing is calibrated yet, those before waited in vain, or the candidate
        `is_reference`, whose ratio to itself is the same in every state.
        """
        if plan.reference_latency_ns is None or is_reference or self._in_vain >= MAX_IN_VAIN:
            return None
        return max(plan.time_cap_s, min(REST_CAPS * plan.time_cap_s, plan.timeout_s / 2))

    def learn(
        self, plan: MeasurementPlan, report: LatencyReport | None, *, rest_cap_s: float | None
    ) -> None:
        """Take note of how a measurement found the device, that waited to `rest_cap_s` or not.

        One without a report says nothing, and one that did not wait nothing of waiting.
        """
        if report is None or plan.reference_latency_ns is None:
            return
        if not is_restless(report.reference_p50_ns, plan.reference_latency_ns):
            self._in_vain = 0
        elif rest_cap_s is not None:
            self._in_vain += 1
