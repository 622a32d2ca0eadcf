"""Whether the device holds itself back: what the firmware or the processor counts and flags.

Owns one small class per source, each with a file-system root that tests replace. Live flags
(now) are kept apart from sticky ones (since the device started): only a live one, or a counter
that grew, says something about a measurement. What the figures mean for a result is
`conditions.py`'s and the reader's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_FIRMWARE_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
_CORE_COUNTS = "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"
_OVER_CURRENT_COUNTS = "sys/class/hwmon/hwmon*/oc*_event_cnt"
_STICKY_SHIFT = 16
_FLAGS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bits of the Raspberry Pi's `get_throttled` (documentation of vcgencmd); the sticky ones lie
16 bits higher."""


class NoThrottlingSource(Exception):
    """This device does not tell; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirmwareFlags:
    """The Raspberry Pi's firmware flags (sysfs, raspberrypi-firmware driver)."""

    root: Path = ROOT

    def live(self) -> tuple[str, ...]:
        """What holds the board back at this moment."""
        return self._names(0)

    def sticky(self) -> tuple[str, ...]:
        """What has held it back since it started."""
        return self._names(_STICKY_SHIFT)

    def _names(self, shift: int) -> tuple[str, ...]:
        path = self.root / _FIRMWARE_FLAGS
        if not path.is_file():
            raise NoThrottlingSource("no Raspberry Pi firmware")
        flags = int(path.read_text(encoding="ascii").strip(), 16) >> shift
        return tuple(name for bit, name in _FLAGS.items() if flags >> bit & 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleCounts:
    """How often cores or their package were slowed down for heat or current, so far.

    x86: the kernel's thermal_throttle counters. Jetson: over-current events of the board's
    power monitor (Jetson Linux Developer Guide, "Over-Current Event Status").
    """

    root: Path = ROOT

    def read(self) -> int:
        """The sum of all counters; compare two readings, the value alone means little."""
        paths = [p for pattern in (_CORE_COUNTS, _OVER_CURRENT_COUNTS) for p in self._all(pattern)]
        if not paths:
            raise NoThrottlingSource("the kernel counts no throttling here")
        return sum(int(path.read_text(encoding="ascii")) for path in paths)

    def _all(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern))
