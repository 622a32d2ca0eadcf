"""Devices and their enrolment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autotune.api_types import Device, EnrolmentToken, Interval, Quarantined
from autotune.cli import figures
from autotune.cli.output import Column, Field, View

_LONGEST = 60


def _runtimes(device: Device) -> str:
    builds = device.description.get("runtimes", [])
    return ", ".join(f"{build.get('name')} {build.get('version')}" for build in builds)


def _told(key: str) -> Callable[[Device], str]:
    def text(device: Device) -> str:
        value = device.description.get(key)
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value)) or figures.MISSING
        return figures.MISSING if value is None else str(value)

    return text


def _presence(device: Device) -> str:
    if device.drained_because is not None:
        return f"drained: {device.drained_because}"
    return (
        "online" if device.is_online else f"offline for {figures.seconds(device.last_seen_s_ago)}"
    )


def _shortly(device: Device) -> str:
    """For a list: `show` has the whole reason."""
    text = _presence(device)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rsplit(' ', 1)[0]} ..."


def _canary(device: Device) -> str:
    ratio = device.canary_ratio
    if ratio is None or device.canary_s_ago is None:
        return figures.MISSING
    return (
        f"{ratio.value:.3f} of its pool's latency ({ratio.low:.3f} to {ratio.high:.3f}), "
        f"{figures.seconds(device.canary_s_ago)} ago"
    )


_DEVICE_FIELDS: list[Field[Device]] = [
    Field(name="device", value=lambda d: d.id),
    Field(name="name", value=lambda d: d.name),
    Field(name="pool", value=lambda d: d.pool),
    Field(name="is_online", value=lambda d: d.is_online),
    Field(name="last_seen_s_ago", value=lambda d: d.last_seen_s_ago),
    Field(name="drained_because", value=lambda d: d.drained_because),
    Field(name="canary_ratio", value=lambda d: d.canary_ratio.value if d.canary_ratio else None),
    Field(name="architecture", value=lambda d: d.description.get("architecture")),
    Field(name="cpu_model", value=lambda d: d.description.get("cpu_model")),
    Field(name="logical_cpus", value=lambda d: d.description.get("logical_cpus")),
    Field(name="memory_bytes", value=lambda d: d.description.get("memory_bytes")),
    Field(name="fingerprint", value=lambda d: d.fingerprint),
]


DEVICES: View[Device] = View(
    columns=[
        Column(title="device", text=lambda d: d.id),
        Column(title="name", text=lambda d: d.name),
        Column(title="pool", text=lambda d: d.pool or figures.MISSING),
        Column(title="presence", text=_shortly),
        Column(title="architecture", text=_told("architecture")),
        Column(title="CPU", text=_told("cpu_model")),
        Column(title="runtimes", text=_runtimes, secondary=True),
    ],
    fields=_DEVICE_FIELDS,
    document=lambda device: device.model_dump(mode="json"),
    style=lambda device: None if device.is_online else "dim",
)


DEVICE: View[Device] = View(
    columns=[
        *DEVICES.columns[:3],
        Column(title="presence", text=_presence),
        Column(title="canary", text=_canary),
        Column(title="architecture", text=_told("architecture")),
        Column(title="CPU", text=_told("cpu_model")),
        Column(title="CPU flags", text=_told("cpu_flags")),
        Column(title="logical CPUs", text=_told("logical_cpus")),
        Column(title="memory", text=lambda d: figures.size(d.description.get("memory_bytes"))),
        Column(title="operating system", text=_told("operating_system")),
        Column(title="kernel", text=_told("kernel")),
        Column(title="python", text=_told("python")),
        Column(title="agent", text=_told("agent_version")),
        Column(title="runtimes", text=_runtimes),
        Column(title="fingerprint", text=lambda d: d.fingerprint),
    ],
    fields=_DEVICE_FIELDS,
    document=lambda device: device.model_dump(mode="json"),
)


def _speed(speed: dict[str, Any]) -> str:
    if speed.get("ratio") is None:
        return f"not measured: {speed.get('missing')}"
    return figures.interval(
        Interval(value=speed["ratio"], low=speed["ratio_low"], high=speed["ratio_high"])
    )


KERNEL_SPEEDS: View[dict[str, Any]] = View(
    columns=[
        Column(title="runtime", text=lambda s: str(s["runtime"])),
        Column(title="operator", text=lambda s: str(s["operator"])),
        Column(title="precision", text=lambda s: str(s["precision"])),
        Column(title="x FP32 [95 %]", text=_speed),
    ],
    fields=[
        Field(name="runtime", value=lambda s: s["runtime"]),
        Field(name="operator", value=lambda s: s["operator"]),
        Field(name="precision", value=lambda s: s["precision"]),
        Field(name="fp32_ratio", value=lambda s: s["ratio"]),
    ],
    document=dict,
)


ENROLMENTS: View[tuple[str, EnrolmentToken]] = View(
    columns=[Column(title="command", text=lambda row: row[0])],
    fields=[
        Field(name="command", value=lambda row: row[0]),
        Field(name="token", value=lambda row: row[1].token),
        Field(name="expires_in_s", value=lambda row: row[1].expires_in_s),
    ],
    document=lambda row: {"command": row[0], **row[1].model_dump(mode="json")},
)


QUARANTINE: View[Quarantined] = View(
    columns=[
        Column(title="artifact", text=lambda q: q.artifact_sha256[:12]),
        Column(title="runtime", text=lambda q: q.runtime),
        Column(title="on devices like", text=lambda q: q.fingerprint[:12]),
        Column(title="since", text=lambda q: f"{q.created_at:%F %T}"),
        Column(title="because", text=lambda q: q.reason),
    ],
    fields=[
        Field(name="artifact_sha256", value=lambda q: q.artifact_sha256),
        Field(name="runtime", value=lambda q: q.runtime),
        Field(name="fingerprint", value=lambda q: q.fingerprint),
        Field(name="reason", value=lambda q: q.reason),
        Field(name="job", value=lambda q: q.job_id),
        Field(name="created_at", value=lambda q: q.created_at.isoformat()),
    ],
    document=lambda entry: entry.model_dump(mode="json"),
)
