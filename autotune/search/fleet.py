"""Measurement requests: from an artifact to an agent's report.

Owns the choice of the device, the waiting, and the quiet window. The agents lease what is
queued here through the service's routes; nothing in this module talks to a device.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from autotune.search.interruption import DeviceAway, Stopped
from device_agents.protocol import (
    ArtifactReference,
    MeasurementPlan,
    MeasurementRequest,
    Outcome,
    RuntimeRequest,
)
from search_spaces import RuntimeOptions
from storage.errors import NotFound
from storage.records import DeviceRecord, JobRecord, MeasurementRecord, MeasurementState
from storage.repository import Repository

ONLINE_WITHIN_S = 10.0
"""A device counts as online this long after its last heartbeat: three heartbeats of 3 s, which
is the default; a service with a longer heartbeat says so."""

_OF_THE_MOMENT = (
    Outcome.UNSTABLE,
    Outcome.LOST,
    Outcome.ARTIFACT_CORRUPT,
    Outcome.ARTIFACT_MISSING,
    Outcome.DEVICE_DISK,
    Outcome.CANCELLED,
)
"""Outcomes that say more about the moment than about the artifact."""

_TRIES = 2

_POLL_S = 0.5


class QuietWindow:
    """Keeps the host either computing or measuring, never both.

    A device agent on the workers' own host would time their cache misses and stolen cycles.
    Devices elsewhere do not care.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The workers may compute; waits for a local measurement to end."""
        with self._lock:
            yield

    @contextmanager
    def quiet(self, *, shares_host: bool) -> Iterator[None]:
        """No worker computes, where the device shares the host."""
        if not shares_host:
            yield
            return
        with self._lock:
            yield


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementOrder:
    """What to measure for a trial."""

    trial_id: str
    artifact: ArtifactReference
    reference: ArtifactReference
    runtime: RuntimeOptions
    reference_runtime: RuntimeOptions
    plan: MeasurementPlan
    profile: bool = False


@dataclass(slots=True, kw_only=True)
class _Pursuit:
    """An order on its way to a result; `latest` is its request that is queued or has ended."""

    index: int
    device: DeviceRecord
    order: MeasurementOrder
    attempt: int = 0
    n_queued: int = 0
    latest: MeasurementRecord | None = None

    @property
    def record(self) -> MeasurementRecord:
        if self.latest is None:
            raise ValueError("nothing is queued for this order yet")
        return self.latest


class Fleet:
    """The devices, seen from the search.

    Args:
        repository: where requests are queued and reports appear.
        host_id: this host's id, to know an agent that measures on it.
        window: the host's quiet window, shared with the workers.
        online_within_s: how long after its last heartbeat a device counts as online.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        host_id: str | None,
        window: QuietWindow,
        online_within_s: float = ONLINE_WITHIN_S,
    ) -> None:
        self._repository = repository
        self._online_within_s = online_within_s
        self._host_id = host_id
        self._window = window
        self._changed = threading.Condition()
        self._changes = 0

    @property
    def changes(self) -> int:
        """How often `wake` was called; read it before looking, and wait with what was read."""
        return self._changes

    def wake(self) -> None:
        """Something about measurements or devices changed."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def find_device(self, selector: str | None) -> DeviceRecord | None:
        """The device of that name, id or pool; without one, the online device seen last.

        In a pool the device seen last that may work is preferred; it stands for the whole pool
        (`members`). None where nothing fits.
        """
        devices = self._repository.list_devices()
        if selector is not None:
            named = [d for d in devices if selector in (d.id, d.name)]
            devices = named or [d for d in devices if d.pool == selector]
        else:
            devices = [d for d in devices if self.is_online(d)]
        newest_first = sorted(devices, key=lambda d: d.last_seen_at, reverse=True)
        return next(iter(sorted(newest_first, key=lambda d: d.drained_by is not None)), None)

    def members(self, job: JobRecord, device: DeviceRecord) -> list[DeviceRecord]:
        """Who measures for a device of the job: itself, or its pool where the job names that.

        The members of a pool that share work are those with the device's own fingerprint.
        """
        if not is_shared(job, device):
            return [self._repository.get_device(device.id)]
        own = (device.pool, device.description.fingerprint)
        devices = self._repository.list_devices()
        return [d for d in devices if (d.pool, d.description.fingerprint) == own]

    def workers_of(self, job: JobRecord, device: DeviceRecord) -> list[DeviceRecord]:
        """The `members` that are online and not drained."""
        members = self.members(job, device)
        return [d for d in members if self.is_online(d) and d.drained_by is None]

    def is_shared(job: JobRecord, device: DeviceRecord) -> bool:
    """The job names the device's pool and not the device."""
    named = job.spec.get("device")
    named = named if isinstance(named, list | tuple) else [named]
    return device.pool in named and device.id not in named and device.name not in named


def absence(selector: str | None) -> str:
    """Why a job waits whose device nobody knows, and what to do: for the user."""
    if selector is None:
        return "no device is online; start an agent (`autotune device enroll`)"
    return (
        f"no device or pool is called {selector!r}; enrol it (`autotune device enroll`) and the "
        "job goes on, or cancel the job"
    )


def is_to_repeat(record: MeasurementRecord) -> bool:
    """The result says more about the moment or the device than about the artifact."""
    unsteady = record.report is not None and not record.report.is_steady
    is_in_doubt = record.distrusted_because is not None or record.outcome is Outcome.RUNTIME_CRASH
    return record.outcome in _OF_THE_MOMENT or unsteady or is_in_doubt


def runtime_request(options: RuntimeOptions) -> RuntimeRequest:
    """The options as an agent is asked for them."""
    return RuntimeRequest(
        runtime=options.runtime, provider=options.provider, threads=options.threads
    )


def _measurement_id(job: JobRecord, pursuit: _Pursuit) -> str:
    """The same order gets the same id again, before and after a restart."""
    order = pursuit.order
    identity = ":".join(
        (
            order.trial_id,
            pursuit.device.id,
            order.artifact.sha256,
            repr(order.runtime),
            order.plan.kind,
            str(order.plan.seed),
            str(pursuit.attempt),
        )
    )
    return "m-" + hashlib.sha256(identity.encode()).hexdigest()[:16]
