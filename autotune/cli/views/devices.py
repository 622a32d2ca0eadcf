"""Devices and their enrolment."""

from __future__ import annotations

from collections.abc import Callable

from autotune.api_types import Device, EnrolmentToken
from autotune.cli import figures
from autotune.cli.output import Column, Field, View


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
    return (
        "online" if device.is_online else f"offline for {figures.seconds(device.last_seen_s_ago)}"
    )


_DEVICE_FIELDS: list[Field[Device]] = [
    Field(name="device", value=lambda d: d.id),
    Field(name="name", value=lambda d: d.name),
    Field(name="pool", value=lambda d: d.pool),
    Field(name="is_online", value=lambda d: d.is_online),
    Field(name="last_seen_s_ago", value=lambda d: d.last_seen_s_ago),
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
        Column(title="presence", text=_presence),
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
        *DEVICES.columns[:4],
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


ENROLMENTS: View[tuple[str, EnrolmentToken]] = View(
    columns=[Column(title="command", text=lambda row: row[0])],
    fields=[
        Field(name="command", value=lambda row: row[0]),
        Field(name="token", value=lambda row: row[1].token),
        Field(name="expires_in_s", value=lambda row: row[1].expires_in_s),
    ],
    document=lambda row: {"command": row[0], **row[1].model_dump(mode="json")},
)
