"""`autotune-agent doctor`: what on this device would spoil or stop a measurement.

Owns one small function per check. A check never raises; `warn` costs precision or time, `fail`
means that the device cannot measure. Each finding that is not `ok` names its repair.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from device_agents.conditions import ROOT, read_conditions
from device_agents.connection import ServiceConnection
from device_agents.device import probe_runtimes
from device_agents.energy import NoEnergySensor, open_meter
from device_agents.errors import DeviceAgentError
from device_agents.isolation import can_leave_network
from device_agents.protocol import RuntimeBuild

Status = Literal["ok", "warn", "fail"]

DISK_FAIL_BYTES, DISK_WARN_BYTES = 200_000_000, 1_000_000_000
"""A model, its reference and a result need some 100 MB; the cache is 2 GB by default."""
MEMORY_FAIL_BYTES, MEMORY_WARN_BYTES = 150_000_000, 400_000_000
"""The agent takes 41 MB; a process that measures a small INT8 mobilenet_v2 peaks at 74 MB."""
LOAD_WARN = 0.5
"""Half of a core busy with something else: the interval gets wider, measurements take longer."""
STEADY_GOVERNORS = frozenset({"performance", "schedutil", "userspace"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    status: Status
    text: str


def examine(
    *,
    state_dir: Path,
    service: str | None,
    root: Path = ROOT,
    probe: Callable[[], Sequence[RuntimeBuild]] = probe_runtimes,
) -> list[Finding]:
    """All checks, in the order in which one would repair. `service` None leaves it out."""
    conditions = read_conditions(root)
    findings = [
        Finding(check="python", status="ok", text=sys.version.partition(" ")[0]),
        _runtimes(probe()),
        _state_dir(state_dir),
        _memory(conditions.get("available_memory_bytes")),
        _governor(conditions.get("governor")),
        _load(conditions.get("load_1m")),
        _throttling(conditions.get("throttled_now"), conditions.get("throttled_since_boot")),
        _energy(root),
        _isolation(),
    ]
    return findings if service is None else [*findings, _service(service)]


def _runtimes(builds: Sequence[RuntimeBuild]) -> Finding:
    real = [build for build in builds if build.name != "simulated"]
    if not real:
        return Finding(
            check="runtimes",
            status="fail",
            text="no runtime loads here; try `python -m device_agents.runtimes onnxruntime`",
        )
    text = ", ".join(f"{b.name} {b.version} ({', '.join(b.providers)})" for b in real)
    return Finding(check="runtimes", status="ok", text=text)


def _state_dir(folder: Path) -> Finding:
    present = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        probe = present / ".autotune-agent-doctor"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return Finding(
            check="state folder",
            status="fail",
            text=f"{present} cannot be written ({error.strerror}); choose another --state-dir",
        )
    free = shutil.disk_usage(present).free
    status: Status = "ok" if free >= DISK_WARN_BYTES else "warn"
    status = status if free >= DISK_FAIL_BYTES else "fail"
    repair = "" if status == "ok" else "; free some, or run the agent with a smaller --cache-gb"
    text = f"{folder}, {free / 1e9:.1f} GB free{repair}"
    return Finding(check="state folder", status=status, text=text)


def _memory(available: int | None) -> Finding:
    if available is None:
        return Finding(check="memory", status="warn", text="the kernel does not tell what is free")
    status: Status = "ok" if available >= MEMORY_WARN_BYTES else "warn"
    status = status if available >= MEMORY_FAIL_BYTES else "fail"
    repair = "" if status == "ok" else "; end other programs, or models will end as oom"
    return Finding(
        check="memory", status=status, text=f"{available / 1e6:.0f} MB available{repair}"
    )


def _governor(governor: str | None) -> Finding:
    if governor is None:
        text = "set by firmware or hypervisor; each measurement alternates with a reference"
        return Finding(check="clock", status="ok", text=text)
    if set(governor.split("+")) <= STEADY_GOVERNORS:
        return Finding(check="clock", status="ok", text=f"governor {governor}")
    return Finding(
        check="clock",
        status="warn",
        text=f"governor {governor} changes the clock in the middle of a measurement; "
        "`cpupower frequency-set -g performance` keeps it",
    )


def _load(load: float | None) -> Finding:
    if load is None:
        return Finding(check="load", status="warn", text="the kernel does not tell")
    if load > LOAD_WARN:
        text = f"{load:.2f} over the last minute: something else is running; stop it"
        return Finding(check="load", status="warn", text=text)
    return Finding(check="load", status="ok", text=f"{load:.2f} over the last minute")


def _throttling(now: Sequence[str] | None, since_boot: Sequence[str] | None) -> Finding:
    if now:
        text = f"{', '.join(now)} at this moment; a better power supply or a heat sink helps"
        return Finding(check="throttling", status="fail", text=text)
    if since_boot:
        text = f"{', '.join(since_boot)} since the device started, not now; watch its supply"
        return Finding(check="throttling", status="warn", text=text)
    text = "none" if now is not None else "no firmware flags on this device"
    return Finding(check="throttling", status="ok", text=text)


def _energy(root: Path) -> Finding:
    try:
        covers = open_meter(root).covers
    except NoEnergySensor as error:
        return Finding(check="energy", status="ok", text=f"not measured: {error}")
    return Finding(check="energy", status="ok", text=f"measured for the {covers}")


def _isolation() -> Finding:
    if can_leave_network():
        return Finding(check="isolation", status="ok", text="models run without a network")
    return Finding(
        check="isolation",
        status="warn",
        text="the kernel lets models keep the network; allow unprivileged user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1)",
    )


def _service(url: str) -> Finding:
    connection = ServiceConnection(url)
    try:
        connection.greet()
    except DeviceAgentError as error:
        return Finding(check="service", status="fail", text=str(error))
    finally:
        connection.close()
    return Finding(check="service", status="ok", text=f"{url} answers")
