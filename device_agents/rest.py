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
with one cap, 0.26, 0.16 and 0.44 with two and 0.22, 0.15 and 0.32 with four, which took 2.0, 1.5
and 1.7 times as long. Chosen on these."""
MAX_IN_VAIN = 2
"""Measurements in a row that found no rest; the next ones do not wait until one finds it. A
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

    def rest_cap_s(self, plan: MeasurementPlan) -> float | None:
        """What takes the place of the plan's time cap while the device is not at rest.

        `REST_CAPS` of these, with half of the timeout to spare; None does not wait: nothing is
        calibrated yet, or those before waited in vain.
        """
        if plan.reference_latency_ns is None or self._in_vain >= MAX_IN_VAIN:
            return None
        return max(plan.time_cap_s, min(REST_CAPS * plan.time_cap_s, plan.timeout_s / 2))

    def learn(self, plan: MeasurementPlan, report: LatencyReport | None) -> None:
        """Take note of how a measurement found the device; one without a report says nothing."""
        if report is None or plan.reference_latency_ns is None:
            return
        restless = is_restless(report.reference_p50_ns, plan.reference_latency_ns)
        self._in_vain = self._in_vain + 1 if restless else 0
