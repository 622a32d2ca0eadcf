"""The device's momentary state: load, frequency, temperature, throttling, memory, steal.

Owns one small class per source, each with a file-system root that tests replace, and
`read_conditions`, which asks them all. What a device does not have is None with a reason,
never 0. Only the standard library: the measuring child reads its conditions here.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_agents.throttling import FirmwareFlags, NoThrottlingSource, ThrottleCounts

ROOT = Path("/")


class NotAvailable(Exception):
    """This device does not tell; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAverage:
    """Processes that wanted to run, averaged over a minute (proc(5), loadavg)."""

    root: Path = ROOT

    def read(self) -> float:
        """The one-minute load average."""
        return float(_text(self.root / "proc/loadavg").split()[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFrequency:
    """The clock of the fastest core now: cpufreq where there is a driver, else /proc/cpuinfo."""

    root: Path = ROOT

    def read(self) -> float:
        """In MHz; the highest over all cores, because that core is the busy one."""
        cpus = self.root / "sys/devices/system/cpu"
        kilohertz = [float(_text(p)) for p in sorted(cpus.glob("cpu*/cpufreq/scaling_cur_freq"))]
        if kilohertz:
            return max(kilohertz) / 1000
        lines = _text(self.root / "proc/cpuinfo").splitlines()
        megahertz = [float(x.partition(":")[2]) for x in lines if x.startswith("cpu MHz")]
        if not megahertz:
            raise NotAvailable("no cpufreq driver, and /proc/cpuinfo names no frequency")
        return max(megahertz)


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """The hottest thermal zone (Linux thermal sysfs; millidegrees)."""

    root: Path = ROOT

    def read(self) -> float:
        """In degrees Celsius. Zones that cannot be read or are below freezing are left out."""
        zones = sorted((self.root / "sys/class/thermal").glob("thermal_zone*/temp"))
        degrees = [value / 1000 for zone in zones if (value := _number(zone)) is not None]
        plausible = [value for value in degrees if 0 < value < 150]
        if not plausible:
            raise NotAvailable("the kernel shows no thermal zone with a plausible value")
        return max(plausible)


@dataclass(frozen=True, slots=True, kw_only=True)
class Governor:
    """Which policy chooses the clock (`performance`, `ondemand`, ...)."""

    root: Path = ROOT

    def read(self) -> str:
        """The governor; different ones on different cores are joined by `+`."""
        cpus = self.root / "sys/devices/system/cpu"
        names = {_text(p).strip() for p in cpus.glob("cpu*/cpufreq/scaling_governor")}
        if not names:
            raise NotAvailable("no cpufreq driver: the firmware or the hypervisor sets the clock")
        return "+".join(sorted(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Main memory (proc(5), meminfo)."""

    root: Path = ROOT

    def read(self) -> int:
        """Bytes that a new program could use without swapping."""
        return self.field("MemAvailable")

    def total(self) -> int:
        """Bytes of main memory."""
        return self.field("MemTotal")

    def field(self, name: str) -> int:
        """One line of meminfo, in bytes."""
        for line in _text(self.root / "proc/meminfo").splitlines():
            key, _, rest = line.partition(":")
            if key == name:
                return int(rest.split()[0]) * 1024
        raise NotAvailable(f"/proc/meminfo has no {name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTicks:
    """Time that all cores spent so far, and the part that the hypervisor took away."""

    total: int
    steal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StolenTime:
    """Time that the hypervisor gave to others (proc(5), stat, the eighth column)."""

    root: Path = ROOT

    def ticks(self) -> CpuTicks:
        """The counters now."""
        fields = [int(x) for x in _text(self.root / "proc/stat").splitlines()[0].split()[1:]]
        if len(fields) < 8:
            raise NotAvailable("/proc/stat has no steal column")
        return CpuTicks(total=sum(fields[:8]), steal=fields[7])

    def fraction(self, since: CpuTicks | None) -> float:
        """The stolen share of all CPU time since then; None: since the device started."""
        now = self.ticks()
        total = now.total - (since.total if since else 0)
        if total <= 0:
            raise NotAvailable("no clock tick has passed since the last reading")
        return (now.steal - (since.steal if since else 0)) / total


def cpu_ticks(root: Path = ROOT) -> CpuTicks | None:
    """The counters to compare a later reading with; None where the kernel has none."""
    try:
        return StolenTime(root=root).ticks()
    except (NotAvailable, OSError, ValueError):
        return None


def read_conditions(root: Path = ROOT, *, since: CpuTicks | None = None) -> dict[str, Any]:
    """The state now, with the keys of `protocol.Conditions`.

    `steal_fraction` is the share since `since`, or since the device started.
    """
    sources: dict[str, Callable[[], Any]] = {
        "load_1m": LoadAverage(root=root).read,
        "cpu_frequency_mhz": CpuFrequency(root=root).read,
        "temperature_celsius": Temperature(root=root).read,
        "governor": Governor(root=root).read,
        "available_memory_bytes": Memory(root=root).read,
        "steal_fraction": lambda: StolenTime(root=root).fraction(since),
        "throttled_now": FirmwareFlags(root=root).live,
        "throttled_since_boot": FirmwareFlags(root=root).sticky,
        "throttle_events": ThrottleCounts(root=root).read,
        "involuntary_switches": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
    }
    values: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for field, read in sources.items():
        try:
            values[field] = read()
        except (NotAvailable, NoThrottlingSource) as error:
            missing[field] = str(error)
        except (OSError, ValueError, IndexError) as error:
            missing[field] = f"cannot be read: {error}"
    return values | {"missing": missing}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except (OSError, ValueError):
        return None
