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

        In a pool the online device seen last is preferred. None where nothing fits.
        """
        devices = self._repository.list_devices()
        if selector is not None:
            named = [d for d in devices if selector in (d.id, d.name)]
            devices = named or [d for d in devices if d.pool == selector]
        else:
            devices = [d for d in devices if self.is_online(d)]
        newest_first = sorted(devices, key=lambda d: d.last_seen_at, reverse=True)
        return next(iter(newest_first), None)

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
        """Measure each order on its device in one quiet window, all devices at once.

        Yields the position of an order with its finished record, whatever its outcome, in the
        order in which they end. A request that was queued before a restart is found again by
        its id and not repeated. An outcome that speaks of the moment (unstable, lost) is tried
        once more, and so is a report that is not steady.

        Raises:
            Stopped: `should_stop` became true.
            DeviceAway: a device is offline; what is open is withdrawn and made again later.
        """
        shares_host = any(self.shares_host(device) for device, _ in orders)
        pursuits = [
            _Pursuit(index=index, device=device, order=order)
            for index, (device, order) in enumerate(orders)
        ]
        with self._window.quiet(shares_host=shares_host):
            try:
                for pursuit in pursuits:
                    self._pursue(job, pursuit)
                while pursuits:
                    seen = self.changes
                    ended = [p for p in pursuits if self._has_ended(job, p)]
                    for pursuit in ended:
                        pursuits.remove(pursuit)
                        yield pursuit.index, pursuit.record
                    if ended:
                        continue
                    if should_stop():
                        raise Stopped
                    self._require_online(pursuits)
                    self.wait_for_change(seen)
            finally:
                if pursuits:
                    # Withdrawn, or an agent would measure it when nobody keeps quiet.
                    self._repository.cancel_measurements(job.id)

    def _pursue(self, job: JobRecord, pursuit: _Pursuit) -> None:
        """Find the order's latest request that counts, or queue the next one."""
        while True:
            found = self._existing(pursuit.order, pursuit.device, pursuit.attempt)
            pursuit.attempt += 1
            if found is None:
                pursuit.n_queued += 1
                found = self._enqueue(job, pursuit.device, pursuit.order, pursuit.attempt - 1)
            elif _speaks_of_the_moment(found):
                continue
            pursuit.latest = found
            return

    def _has_ended(self, job: JobRecord, pursuit: _Pursuit) -> bool:
        record = pursuit.latest = self._repository.get_measurement(pursuit.record.id)
        if record.state is not MeasurementState.DONE:
            return False
        if not _speaks_of_the_moment(record) or pursuit.n_queued == _TRIES:
            return True
        self._pursue(job, pursuit)
        return False

    def _require_online(self, pursuits: Sequence[_Pursuit]) -> None:
        for device_id in {p.device.id for p in pursuits}:
            device = self._repository.get_device(device_id)
            if not self.is_online(device):
                raise DeviceAway(absence(device.name, device))

    def _existing(
        self, order: MeasurementOrder, device: DeviceRecord, attempt: int
    ) -> MeasurementRecord | None:
        try:
            return self._repository.get_measurement(_measurement_id(order, device, attempt))
        except NotFound:
            return None

    def _enqueue(
        self, job: JobRecord, device: DeviceRecord, order: MeasurementOrder, attempt: int
    ) -> MeasurementRecord:
        return self._repository.enqueue_measurement(
            job_id=job.id,
            trial_id=order.trial_id,
            device_id=device.id,
            request=MeasurementRequest(
                measurement_id=_measurement_id(order, device, attempt),
                artifact=order.artifact,
                reference=order.reference,
                runtime=_runtime_request(order.runtime),
                reference_runtime=_runtime_request(order.reference_runtime),
                plan=order.plan,
            ),
        )


def absence(selector: str | None, device: DeviceRecord | None) -> str:
    """Why a job waits, and what to do: for the user."""
    if device is not None:
        return f"device {device.name} is offline; the job goes on when its agent is back"
    if selector is None:
        return "no device is online; start an agent (`autotune device enroll`)"
    return (
        f"no device or pool is called {selector!r}; enrol it (`autotune device enroll`) and the "
        "job goes on, or cancel the job"
    )


def _speaks_of_the_moment(record: MeasurementRecord) -> bool:
    unsteady = record.report is not None and not record.report.is_steady
    return record.outcome in _OF_THE_MOMENT or unsteady


def _runtime_request(options: RuntimeOptions) -> RuntimeRequest:
    return RuntimeRequest(
        runtime=options.runtime, provider=options.provider, threads=options.threads
    )


def _measurement_id(order: MeasurementOrder, device: DeviceRecord, attempt: int) -> str:
    """The same order gets the same id again, before and after a restart."""
    identity = ":".join(
        (
            order.trial_id,
            device.id,
            order.artifact.sha256,
            repr(order.runtime),
            order.plan.kind,
            str(order.plan.seed),
            str(attempt),
        )
    )
    return "m-" + hashlib.sha256(identity.encode()).hexdigest()[:16]
