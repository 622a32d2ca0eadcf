"""Energy that the device spends, where a board can tell.

Owns one small class per source behind one interface: a counter of joules that only grows.
What is charged to which model is `sampling.py`'s. A device without a sensor has no meter, and
its reports say None with the reason.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

ROOT = Path("/")
ACCELERATED = ("CUDA", "Tensorrt")
"""How providers begin that run on an NVIDIA device."""


class NoEnergySensor(Exception):
    """This device cannot tell; the message says why."""


class EnergyMeter(Protocol):
    """A counter of energy. `covers` says of what: a package, a board, an accelerator."""

    covers: str

    def joules(self) -> float:
        """Energy so far; only differences mean something."""
        ...


@dataclass(slots=True, kw_only=True)
class Rapl:
    """Intel's and AMD's package counters (Linux powercap, intel-rapl), microjoules that wrap."""

    root: Path = ROOT
    covers: str = "processor package"
    _zones: list[Path] = field(default_factory=list)
    _last: list[int] = field(default_factory=list)
    _total: float = 0.0

    def __post_init__(self) -> None:
        found = sorted((self.root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        # Packages have one colon; sub-zones (cores, uncore) are part of their package.
        self._zones = [zone for zone in found if zone.name.count(":") == 1]
        if not self._zones:
            raise NoEnergySensor("no RAPL counter: not an x86 with powercap, or a virtual machine")
        try:
            self._last = [_integer(zone / "energy_uj") for zone in self._zones]
        except PermissionError as error:
            raise NoEnergySensor(
                "the RAPL counters are readable for root alone; `chmod a+r energy_uj` opens them"
            ) from error

    def joules(self) -> float:
        """Energy of all packages since this meter was made."""
        now = [_integer(zone / "energy_uj") for zone in self._zones]
        for zone, before, after in zip(self._zones, self._last, now, strict=True):
            wrapped = after < before
            self._total += (
                after - before + (_integer(zone / "max_energy_range_uj") if wrapped else 0)
            )
        self._last = now
        return self._total / 1e6


@dataclass(slots=True, kw_only=True)
class PowerMonitor:
    """A board's INA sensor (Jetson's INA3221 on VDD_IN, others through hwmon).

    It tells power, not energy: each reading is held since the one before, so a meter has to be
    read often. Power in microwatts (`power1_input`), or millivolts times milliamperes.
    """

    root: Path = ROOT
    covers: str = "board"
    now_s: Callable[[], float] = time.monotonic
    _rails: list[tuple[Path, ...]] = field(default_factory=list)
    _last_s: float = 0.0
    _total: float = 0.0

    def __post_init__(self) -> None:
        monitors = [
            folder
            for folder in sorted((self.root / "sys/class/hwmon").glob("hwmon*"))
            if _name(folder).startswith("ina")
        ]
        self._rails = [rail for folder in monitors if (rail := _rail(folder))][:1]
        if not self._rails:
            raise NoEnergySensor("no INA power monitor among the hwmon sensors")
        try:
            _watts(self._rails[0])  # one that cannot be read is not offered
        except (OSError, ValueError) as error:
            raise NoEnergySensor(f"the INA power monitor cannot be read: {error}") from error
        self._last_s = self.now_s()

    def joules(self) -> float:
        """Power now times the time since the last reading, summed."""
        now_s = self.now_s()
        watts = sum(_watts(rail) for rail in self._rails)
        self._total += watts * (now_s - self._last_s)
        self._last_s = now_s
        return self._total


@dataclass(slots=True, kw_only=True)
class Nvml:
    """An NVIDIA accelerator's own counter (NVML, nvmlDeviceGetTotalEnergyConsumption, mJ)."""

    covers: str = "NVIDIA GPU"
    library: str = "libnvidia-ml.so.1"
    _nvml: ctypes.CDLL | None = None
    _device: ctypes.c_void_p = field(default_factory=ctypes.c_void_p)

    def __post_init__(self) -> None:
        try:
            self._nvml = ctypes.CDLL(self.library)
        except OSError as error:
            raise NoEnergySensor("no NVIDIA driver") from error
        if self._nvml.nvmlInit_v2() != 0:
            raise NoEnergySensor("the NVIDIA driver does not answer")
        if self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)) != 0:
            raise NoEnergySensor("the NVIDIA driver sees no device")
        self.joules()

    def joules(self) -> float:
        """Energy of the first device since the driver was loaded.

        Raises:
            NoEnergySensor: the device has no such counter (before Volta).
        """
        millijoules = ctypes.c_ulonglong()
        nvml = self._nvml
        if nvml is None or nvml.nvmlDeviceGetTotalEnergyConsumption(
            self._device, ctypes.byref(millijoules)
        ):
            raise NoEnergySensor("the NVIDIA device counts no energy")
        return millijoules.value / 1000


def open_meter(root: Path = ROOT, *, on_gpu: bool = False) -> EnergyMeter:
    """The meter that covers most of what an inference costs: the board, else the package.

    `on_gpu`: the model runs on an NVIDIA device, whose own counter is asked where there is no
    sensor for the board.

    Raises:
        NoEnergySensor: there is none; the message names what was looked for.
    """
    sources: Sequence[Callable[[], EnergyMeter]] = [
        lambda: PowerMonitor(root=root),
        *([Nvml] if on_gpu else []),
        lambda: Rapl(root=root),
    ]
    reasons = []
    for source in sources:
        try:
            return source()
        except (NoEnergySensor, OSError, ValueError) as error:
            reasons.append(str(error))
    raise NoEnergySensor("; ".join(reasons))


def _rail(folder: Path) -> tuple[Path, ...]:
    """The files of the rail that feeds the board: VDD_IN where it is named, else the first."""
    if (folder / "power1_input").is_file():
        return (folder / "power1_input",)
    inputs = sorted(p for p in folder.glob("in[0-9]*_input") if _current_of(p).is_file())
    named = [p for p in inputs if _label(p).upper() in ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0")]
    chosen = (named or inputs)[:1]
    return (chosen[0], _current_of(chosen[0])) if chosen else ()


def _watts(rail: tuple[Path, ...]) -> float:
    if len(rail) == 1:
        return _integer(rail[0]) / 1e6
    return _integer(rail[0]) * _integer(rail[1]) / 1e6


def _current_of(voltage: Path) -> Path:
    return voltage.with_name(voltage.name.replace("in", "curr", 1))


def _label(voltage: Path) -> str:
    path = voltage.with_name(voltage.name.replace("_input", "_label"))
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _name(folder: Path) -> str:
    path = folder / "name"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _integer(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
