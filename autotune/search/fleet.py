"""Measurement requests: from an artifact to an agent's report.

Owns the choice of the device, the waiting, and the quiet window. The agents lease what is
queued here through the service's routes; nothing in this module talks to a device.
"""

from __future__ import annotations

import hashlib
import json
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
from storage.identifiers import MEASUREMENT
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

UNTIMED_RUNTIMES = frozenset({"simulated"})
"""Runtimes that compute nothing: their agents do not disturb each other on one machine."""

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
    """An order on its way to a result; `latest` is its request that is queued or has ended.

    `attempt` numbers its requests; `n_queued` of them were queued by this call and count.
    """

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

    def capacity(self, job: JobRecord, devices: Sequence[DeviceRecord]) -> int:
        """How many measurements each of the job's devices can be at, summed over them."""
        return sum(len(self.workers_of(job, device)) for device in devices)

    def absence(
        self, job: JobRecord, selector: str | None, device: DeviceRecord | None
    ) -> str | None:
        """Why nobody can measure for a device that the job names; None where somebody can."""
        if device is None:
            return absence(selector)
        if self.workers_of(job, device):
            return None
        members = self.members(job, device)
        drained = [d for d in members if d.drained_because is not None]
        for member in drained:
            if len(members) == 1 or self.is_online(member):
                return (
                    f"device {member.name} is drained: {member.drained_because}; the job goes on "
                    f"after `autotune device resume {member.name}`"
                )
        if len(members) > 1:
            return f"no device of pool {device.pool} is online; the job goes on when one is back"
        return f"device {device.name} is offline; the job goes on when its agent is back"

    def is_online(self, device: DeviceRecord) -> bool:
        """The device's agent was heard of lately."""
        silent_s = (datetime.now(UTC) - device.last_seen_at).total_seconds()
        return silent_s <= self._online_within_s

    def shares_host(self, device: DeviceRecord) -> bool:
        """The device is the host that the workers compute on."""
        return self._host_id is not None and device.description.host_id == self._host_id

    def wait_for_change(self, seen: int, timeout_s: float = _POLL_S) -> None:
        """Return when something changed since `changes` was `seen`, or after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != seen, timeout_s)

    def measure(
        self,
        job: JobRecord,
        device: DeviceRecord,
        order: MeasurementOrder,
        *,
        should_stop: Callable[[], bool],
    ) -> MeasurementRecord:
        """`measure_all` for one order."""
        ((_, record),) = self.measure_all(job, [(device, order)], should_stop=should_stop)
        return record

    def measure_all(
        self,
        job: JobRecord,
        orders: Sequence[tuple[DeviceRecord, MeasurementOrder]],
        *,
        should_stop: Callable[[], bool],
    ) -> Iterator[tuple[int, MeasurementRecord]]:
        """Measure each order on its device, or its device's pool, all at once, in a quiet window.

        Yields the position of an order with its finished record, whatever its outcome, in the
        order in which they end. A request that was queued before a restart is found again by
        its id and not repeated. An outcome that speaks of the moment (unstable, lost) is tried
        once more, and so is a report that is not steady. One that crashed is tried again, on
        another device of the pool if there is one, until it goes well or is quarantined.

        Raises:
            Stopped: `should_stop` became true.
            DeviceAway: nobody can measure for one of the devices: offline, or drained. What is
                open is withdrawn and made again later.
        """
        waiting = [
            _Pursuit(index=index, device=device, order=order)
            for index, (device, order) in enumerate(orders)
        ]
        at_once = self._at_once(job, orders)
        under_way: list[_Pursuit] = []
        with self._window.quiet(shares_host=any(self.shares_host(d) for d, _ in orders)):
            try:
                while waiting or under_way:
                    seen = self.changes
                    for pursuit in waiting[: at_once - len(under_way)]:
                        waiting.remove(pursuit)
                        under_way.append(pursuit)
                        self._pursue(job, pursuit)
                    ended = [p for p in under_way if self._has_ended(job, p)]
                    for pursuit in ended:
                        under_way.remove(pursuit)
                        yield pursuit.index, pursuit.record
                    if ended:
                        continue
                    if should_stop():
                        raise Stopped
                    self._require_workers(job, under_way)
                    self.wait_for_change(seen)
            finally:
                if under_way:
                    # Withdrawn, or an agent would measure it when nobody keeps quiet.
                    self._repository.cancel_measurements(job.id)

    def _at_once(
        self, job: JobRecord, orders: Sequence[tuple[DeviceRecord, MeasurementOrder]]
    ) -> int:
        """How many orders may be under way: one where two agents would time each other here."""
        here = {
            member.id
            for target in {device.id: device for device, _ in orders}.values()
            for member in self.members(job, target)
            if self.shares_host(member)
        }
        is_timed = any(order.runtime.runtime not in UNTIMED_RUNTIMES for _, order in orders)
        return 1 if len(here) > 1 and is_timed else len(orders)

    def _pursue(self, job: JobRecord, pursuit: _Pursuit, *, crashed_on: str | None = None) -> None:
        """Find the order's latest request that counts, or queue the next one."""
        while True:
            found = self._existing(pursuit)
            if found is None:
                pursuit.n_queued += 1
                found = self._enqueue(job, pursuit, crashed_on=crashed_on)
            elif is_to_repeat(found):
                pursuit.attempt += 1
                continue
            pursuit.latest = found
            return

    def _has_ended(self, job: JobRecord, pursuit: _Pursuit) -> bool:
        record = pursuit.latest = self._repository.get_measurement(pursuit.record.id)
        if record.state is not MeasurementState.DONE:
            return False
        is_crash = record.outcome is Outcome.RUNTIME_CRASH
        if is_crash or record.distrusted_because is not None:
            pursuit.n_queued -= 1  # the quarantine ends it, or the next device is better
        elif not is_to_repeat(record) or pursuit.n_queued == _TRIES:
            return True
        pursuit.attempt += 1
        self._pursue(job, pursuit, crashed_on=record.device_id if is_crash else None)
        return False

    def _require_workers(self, job: JobRecord, pursuits: Sequence[_Pursuit]) -> None:
        for device in {p.device.id: p.device for p in pursuits}.values():
            away = self.absence(job, None, device)
            if away is not None:
                raise DeviceAway(away)
        for pursuit in pursuits:
            avoided = pursuit.record.avoid_device_id
            workers = self.workers_of(job, pursuit.device) if avoided is not None else ()
            if avoided is not None and all(worker.id == avoided for worker in workers):
                raise DeviceAway("the other devices of the pool went offline")

    def _existing(self, pursuit: _Pursuit) -> MeasurementRecord | None:
        try:
            return self._repository.get_measurement(_measurement_id(pursuit))
        except NotFound:
            return None

    def _enqueue(
        self, job: JobRecord, pursuit: _Pursuit, *, crashed_on: str | None
    ) -> MeasurementRecord:
        order, device = pursuit.order, pursuit.device
        others = [d for d in self.workers_of(job, device) if d.id != crashed_on]
        request = MeasurementRequest(
            measurement_id=_measurement_id(pursuit),
            artifact=order.artifact,
            reference=order.reference,
            runtime=runtime_request(order.runtime),
            reference_runtime=runtime_request(order.reference_runtime),
            plan=order.plan,
            profile=order.profile,
        )
        return self._repository.enqueue_measurement(
            job_id=job.id,
            trial_id=order.trial_id,
            device_id=device.id,
            request=request,
            is_shared=is_shared(job, device),
            avoid_device_id=crashed_on if others else None,
        )


def is_shared(job: JobRecord, device: DeviceRecord) -> bool:
    """The job names the device's pool and not the device."""
    named = job.spec.get("device")
    named = named if isinstance(named, list | tuple) else [named]
    if device.pool is None:
        return False
    return device.pool in named and device.id not in named and device.name not in named


def absence(selector: str | None) -> str:
    """Why a job waits whose device nobody knows, and what to do: for the user."""
    if selector is None:
        return "no device is online; start an agent (`autotune device enroll`)"
    return (
        f"no device or pool is called {selector!r}; enroll it (`autotune device enroll`) and the "
        "job goes on, or cancel the job"
    )


def is_to_repeat(record: MeasurementRecord) -> bool:
    """The result says more about the moment or the device than about the artifact."""
    unsteady = record.report is not None and not record.report.is_steady
    is_in_doubt = record.distrusted_because is not None or record.outcome is Outcome.RUNTIME_CRASH
    return record.outcome in _OF_THE_MOMENT or unsteady or is_in_doubt


def runtime_request(options: RuntimeOptions) -> RuntimeRequest:
    """The options as an agent is asked for them."""
    return RuntimeRequest.model_validate(options.to_json())


def _measurement_id(pursuit: _Pursuit) -> str:
    """The same order gets the same id again, before and after a restart."""
    order = pursuit.order
    identity = ":".join(
        (
            order.trial_id,
            pursuit.device.id,
            order.artifact.sha256,
            json.dumps(order.runtime.to_json()),
            order.plan.kind,
            str(order.plan.seed),
            str(pursuit.attempt),
        )
    )
    return f"{MEASUREMENT}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
