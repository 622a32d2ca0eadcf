"""The device that a job measures on, as people should see it: itself, or the pool it stands for.

Which members a pool has and what they do is `autotune.search.fleet`'s.
"""

from __future__ import annotations

from dataclasses import replace

from autotune.search.fleet import is_shared
from storage.records import DeviceRecord, JobRecord
from storage.repository import Repository


def as_measured(repository: Repository, job: JobRecord, device: DeviceRecord) -> DeviceRecord:
    """The device; under its pool's name, and seen when any member was, where those share the job.

    What is said of it holds for all of them: members that share work have one fingerprint.
    """
    if not is_shared(job, device):
        return device
    own = (device.pool, device.description.fingerprint)
    members = [d for d in repository.list_devices() if (d.pool, d.description.fingerprint) == own]
    return replace(
        device,
        name=f"pool {device.pool}",
        last_seen_at=max(member.last_seen_at for member in members),
        drained_by=None,
        drained_because=None,
    )
