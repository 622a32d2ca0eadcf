"""What happened to the device during a pair of blocks: throttling, another clock, preemption.

Owns the readings between blocks and what taints a pair. They are taken every few milliseconds,
so a source that takes long to answer is left out here (`conditions.py` still reads it before
and after). What becomes of a tainted pair is `sampling.py`'s decision.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from device_agents.throttling import FirmwareFlags, NoThrottlingSource, ThrottleCounts

Value = TypeVar("Value")

LONGEST_READING_S = 0.001
"""A tenth of the shortest block (`sampling.BLOCK_NS`)."""
FREQUENCY_CHANGE = 0.1
"""Of the clock, between both ends of a pair, that taints it. Turbo moves by a few percent all
the time; a governor's or a firmware's step is larger (Raspberry Pi 4: 1500 to 600 MHz)."""
LOST_SHARE = 0.2
"""Of a pair's time in which the process did not run although it wanted to. A choice: a pair of
20 ms that lost one scheduler slice of 4 ms (Linux, CONFIG_HZ=250) is at the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """The device at one moment; what it does not tell, or tells too slowly, is None.

    `held_back` names live flags, `throttle_events` and `preemptions` only grow. `wall_s` and
    `cpu_s` are this process's.
    """

    held_back: tuple[str, ...] | None = None
    throttle_events: int | None = None
    frequency_mhz: float | None = None
    preemptions: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Watch(Protocol):
    """Whoever can look at the device."""

    def look(self) -> Glimpse:
        """The device now."""
        ...


class DeviceWatch:
    """The device as its kernel shows it; `root` is where its file system begins."""

    def __init__(
        self, root: Path = Path("/"), *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        paths = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*/scaling_cur_freq"))
        self._clock = clock
        self._flags = self._usable(FirmwareFlags(root=root).live)
        self._events = self._usable(ThrottleCounts(root=root).read)
        self._frequency = self._usable(lambda: _highest_mhz(paths)) if paths else None

    def look(self) -> Glimpse:
        """The device now."""
        return Glimpse(
            held_back=_read(self._flags),
            throttle_events=_read(self._events),
            frequency_mhz=_read(self._frequency),
            preemptions=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
            wall_s=self._clock(),
            cpu_s=time.process_time(),
        )

    def _usable(self, read: Callable[[], Value]) -> Callable[[], Value] | None:
        """The source, if it answers, and soon enough: the second answer, with caches warm."""
        if _read(read) is None:
            return None
        before = self._clock()
        _read(read)
        return read if self._clock() - before <= LONGEST_READING_S else None


def taint(before: Glimpse, after: Glimpse) -> str | None:
    """What spoilt the time between two glimpses; None where nothing did.

    Preemption needs both signs: a process that waits for an accelerator does not run either,
    and one that lost the core for a moment lost nothing worth a repetition.
    """
    held = after.held_back or before.held_back
    if held:
        return ", ".join(held)
    if None not in (before.throttle_events, after.throttle_events) and (
        after.throttle_events != before.throttle_events
    ):
        return "throttled"
    if before.frequency_mhz and after.frequency_mhz:
        change = abs(after.frequency_mhz / before.frequency_mhz - 1)
        if change > FREQUENCY_CHANGE:
            return "the clock's frequency changed"
    wall_s = after.wall_s - before.wall_s
    lost_s = wall_s - (after.cpu_s - before.cpu_s)
    if after.preemptions > before.preemptions and lost_s > LOST_SHARE * wall_s:
        return "preempted"
    return None


def _highest_mhz(paths: list[Path]) -> float:
    return max(float(path.read_text(encoding="ascii")) for path in paths) / 1000


def _read(read: Callable[[], Value] | None) -> Value | None:
    if read is None:
        return None
    try:
        return read()
    except (NoThrottlingSource, OSError, ValueError):
        return None
