"""What the device is: its description, its fingerprint, and the runtimes it can load.

Owns the reading of identity and hardware from the file system (root replaceable) and the
probe, which loads each runtime in a child of its own: a runtime that crashes on import is then
a runtime the device does not have. The momentary state is `conditions.py`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from device_agents.conditions import ROOT, Memory, NotAvailable
from device_agents.energy import ACCELERATED, NoEnergySensor, open_meter
from device_agents.protocol import DeviceDescription, KernelSpeed, RuntimeBuild
from device_agents.runtimes import runtime_names

KERNEL_FLAGS = frozenset(
    {
        *("sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8"),
        *("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_int8", "amx_bf16"),
        *("asimd", "neon", "asimdhp", "fphp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
    }
)
"""The CPU flags that inference kernels are chosen by, as Linux names them (x86 and Arm)."""

PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The CPU as /proc/cpuinfo and the device tree name it."""

    root: Path = ROOT

    def model(self) -> str:
        """The marketing name; on boards without one the board's, else the architecture."""
        fields = self._fields()
        board = self.root / "proc/device-tree/model"
        if "model name" in fields:
            return fields["model name"]
        if board.is_file():
            return board.read_text(encoding="utf-8", errors="replace").strip("\x00\n ")
        parts = [fields[key] for key in ("Model", "Hardware", "CPU part") if key in fields]
        return " ".join(parts) or platform.machine()

    def kernel_flags(self) -> tuple[str, ...]:
        """Those of `KERNEL_FLAGS` that this CPU has, sorted."""
        fields = self._fields()
        listed = fields.get("flags", "") or fields.get("Features", "")
        return tuple(sorted(KERNEL_FLAGS & set(listed.split())))

    def _fields(self) -> dict[str, str]:
        try:
            text = (self.root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return {}
        pairs = (line.partition(":") for line in text.splitlines())
        return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def host_id(root: Path = ROOT) -> str:
    """Equal for processes that share one machine; 32 hex digits.

    A digest of the machine id; where the machine has none (a container), of the host name and
    the boot id. It outlives a restart of the machine, because an agent says it only when it
    enrols. Machines cloned from one image may share it, which costs a quiet window too many.
    """
    machine = _first_line(root / "etc/machine-id") or _first_line(root / "var/lib/dbus/machine-id")
    if machine:
        return hashlib.sha256(machine.encode()).hexdigest()[:32]
    boot = _first_line(root / "proc/sys/kernel/random/boot_id")
    text = f"{socket.gethostname()}\n{boot or ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def agent_version() -> str:
    """The installed release; a copied source tree without metadata has none."""
    try:
        return metadata.version("edge-autotune")
    except metadata.PackageNotFoundError:
        return "unknown"


def fingerprint(**fields: Any) -> str:
    """The sha256 of the canonical JSON of these fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def environment(root: Path = ROOT) -> str:
    """A digest of what a description follows from, found without loading a runtime.

    While it stays (the board, the kernel, every installed Python package) a description made
    before holds; a runtime that is no such package shows in its next measurement.
    """
    processor = Processor(root=root)
    # Names and versions by the folders that say them: to read what is in them takes far longer.
    packages = {found.name for place in sys.path for found in Path(place).glob("*.dist-info")}
    return fingerprint(
        host=host_id(root),
        hostname=socket.gethostname(),
        cpu=(processor.model(), processor.kernel_flags(), _usable_cpus(), _memory_bytes(root)),
        system=(platform.release(), platform.python_version(), _operating_system(root)),
        packages=sorted(packages),
    )


def describe_device(
    root: Path = ROOT,
    *,
    probe: Callable[[], Sequence[RuntimeBuild]] | None = None,
    speeds: Callable[[str, Sequence[RuntimeBuild]], Sequence[KernelSpeed]] | None = None,
) -> DeviceDescription:
    """What this device is. `probe` finds the runtimes; None asks `probe_runtimes`.

    `speeds` takes the hardware's fingerprint and the runtimes and measures their kernels; None
    leaves them unmeasured.

    The fingerprint covers what decides about latency: CPU, memory (whole GiB, because kernels
    reserve different amounts of it) and the runtime builds. A new kernel is the same device.
    """
    processor = Processor(root=root)
    runtimes = tuple((probe or probe_runtimes)())
    memory_bytes = _memory_bytes(root)
    decisive = {
        "architecture": platform.machine(),
        "cpu_model": processor.model(),
        "cpu_flags": processor.kernel_flags(),
        "logical_cpus": _usable_cpus(),
    }
    hardware: dict[str, Any] = decisive | {"memory_gib": round(memory_bytes / 2**30)}
    return DeviceDescription(
        hostname=socket.gethostname(),
        host_id=host_id(root),
        memory_bytes=memory_bytes,
        operating_system=_operating_system(root),
        kernel=platform.release(),
        python=platform.python_version(),
        agent_version=agent_version(),
        runtimes=runtimes,
        **_energy(root, runtimes),
        kernel_speeds=tuple(speeds(fingerprint(**hardware), runtimes)) if speeds else (),
        fingerprint=fingerprint(
            **hardware, runtimes=sorted((build.name, build.version) for build in runtimes)
        ),
        **decisive,
    )


def probe_runtimes(names: Sequence[str] | None = None) -> tuple[RuntimeBuild, ...]:
    """The runtimes that load here, each tried in a child process of its own, all at once."""
    wanted = runtime_names() if names is None else tuple(names)
    children = [_start_probe(name) for name in wanted]
    found = (_finish_probe(child) for child in children)
    return tuple(build for build in found if build is not None)


def _start_probe(name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", "device_agents.runtimes", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _finish_probe(child: subprocess.Popen[bytes]) -> RuntimeBuild | None:
    try:
        output, _ = child.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return None
    if child.returncode != 0:
        return None
    # A vendor's library may write lines of its own, on loading and when it is taken down.
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValidationError):
            return RuntimeBuild.model_validate_json(line)
    return None


def _energy(root: Path, runtimes: Sequence[RuntimeBuild]) -> dict[str, str]:
    """What the energy meter covers, or why there is none."""
    on_gpu = any(p.startswith(ACCELERATED) for build in runtimes for p in build.providers)
    try:
        return {"energy_source": open_meter(root, on_gpu=on_gpu).covers}
    except NoEnergySensor as error:
        return {"energy_missing": str(error)}


def _usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _memory_bytes(root: Path) -> int:
    try:
        return Memory(root=root).total()
    except (NotAvailable, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _operating_system(root: Path) -> str:
    try:
        lines = (root / "etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.system()
    names = [x.partition("=")[2].strip("\"'") for x in lines if x.startswith("PRETTY_NAME=")]
    return names[0] if names else platform.system()


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
