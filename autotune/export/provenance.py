"""Where a result comes from: the tools' versions, the job, the device, the runtime's build."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from autotune.export.figures import latency_of
from storage.records import DeviceRecord, JobRecord, TrialRecord

TOOLS = ("edge-autotune", "onnxruntime", "onnx", "torch", "torch-pruning", "numpy")


def tool_versions() -> dict[str, str]:
    """Version by tool, of the machine that compressed; a tool that is not there is left out."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def provenance(job: JobRecord, trial: TrialRecord, device: DeviceRecord | None) -> dict[str, Any]:
    """Everything needed to say where an artifact comes from, as plain JSON."""
    latency = latency_of(trial)
    return {
        "job": {
            "id": job.id,
            "name": job.name,
            "created_at": job.created_at.isoformat(),
            "spec": dict(job.spec),
        },
        "source": dict(job.source) if job.source is not None else None,
        "device": None
        if device is None
        else {
            "id": device.id,
            "name": device.name,
            "fingerprint": device.description.fingerprint,
            "description": device.description.model_dump(mode="json"),
        },
        "runtime": None
        if latency is None
        else {**latency.runtime.model_dump(), "version": latency.runtime_version},
        "tools": tool_versions(),
    }
