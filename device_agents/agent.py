"""The agent: a small parent that enrols, beats, leases, measures and hands in results.

Owns the loop of the work, and when it is tried again. Crash-only: killed at any point it loses
the running measurement and nothing else, and starts again from its state folder. Beats with
`heartbeat.py`, sends over `connection.py`, measures with `measurement.py`, never loads a runtime.

Two threads beside the caller's: one works (enrol, describe the device, lease, download, measure,
upload), one beats. The caller's only waits, so that a signal ends the agent at once, wherever the
others are.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from device_agents.backoff import Backoff
from device_agents.cache import DEFAULT_MAX_BYTES, ArtifactCache
from device_agents.connection import PATIENT, Acknowledgement, ServiceConnection, Timeouts
from device_agents.device import describe_device, environment
from device_agents.errors import (
    ArtifactCorrupt,
    ArtifactMissing,
    DeviceAgentError,
    DeviceDiskFull,
    EnrolmentRefused,
    ServiceUnreachable,
)
from device_agents.heartbeat import INSTANCE, HeldLease, Pulse, heartbeat_of
from device_agents.identity import Described, Identity, StateFolder
from device_agents.measurement import Measurement, MeasurementOutcome
from device_agents.outbox import Outbox
from device_agents.protocol import (
    PROTOCOL_VERSION,
    ArtifactReference,
    DeviceDescription,
    EnrolRequest,
    LatencyReport,
    Lease,
    MeasurementRequest,
    MeasurementResult,
    Outcome,
)
from device_agents.rest import RestMemory
from device_agents.transfer import Transfer

LONG_POLL_S = 20.0
ENROLMENT_TRIES = 4
DOWNLOAD_TRIES = 5
PROMPT_ANSWER_S = 0.2
STOP_PATIENCE_S = 3.0
STOP_POLL_S = 0.02
DIED = "the agent ended while it measured: killed, or its device went down"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """How an agent is started; `token` is needed for the first start only."""

    service_url: str
    state_dir: Path
    token: str | None = None
    name: str | None = None
    cache_max_bytes: int = DEFAULT_MAX_BYTES
    long_poll_s: float = LONG_POLL_S
    timeouts: Timeouts = PATIENT


class Agent:
    """One agent on one device.

    Args:
        settings: where the service and the state folder are.
        say: gets one plain line per event, for people.
        describe: finds out what the device is; asked when the agent enrols, when it starts in
            another `environment` than it described, and when a runtime turns out to be another.
        environment: a digest that changes where `describe` may find something else.
        backoff: a fresh back-off for each thread and each series of tries.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        say: Callable[[str], None],
        describe: Callable[[], DeviceDescription] = describe_device,
        environment: Callable[[], str] = environment,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._settings = settings
        self._say = say
        self._describe = describe
        self._environment = environment
        self._backoff = backoff
        self._stop = threading.Event()
        self._came_back = threading.Event()
        self._fatal: Exception | None = None
        self._held: HeldLease | None = None
        self._may_be_left = False
        self._kept_because: str | None = None
        self._threads: list[threading.Thread] = []
        self._request_id = new_request_id()
        self._users = 0
        self._users_guard = threading.Lock()
        self._connection = ServiceConnection(settings.service_url, timeouts=settings.timeouts)
        self._state = StateFolder(settings.state_dir)
        self._cache = ArtifactCache(
            settings.state_dir / "cache", max_bytes=settings.cache_max_bytes
        )
        self._transfer = Transfer(self._connection, self._cache)
        self._outbox = Outbox(settings.state_dir / "outbox")
        self._memory = RestMemory()
        self._pulse = Pulse(
            self._connection,
            held=lambda: self._held,
            came_back=self._came_back.set,
            rotate=self._rotate,
            say=say,
            backoff=backoff,
        )

    def stop(self) -> None:
        """End `run` soon, from a signal handler or another thread."""
        self._stop.set()
        self._came_back.set()

    def run(self) -> None:
        """Work until `stop`.

        Raises:
            EnrolmentRefused: the service knows neither the token nor the key.
            ServiceUnreachable: the service cannot be reached for the enrolment. Once enrolled
                an agent goes on trying for ever.
            IncompatibleProtocol: the service wants another release.
            DeviceAgentError: there is neither a token nor an identity.
            DeviceDiskFull: a result cannot be stored.
        """
        self._enter()
        try:
            self._start("work", self._live)
            self._stop.wait()
            held = self._held
            if held is not None:
                held.drop()
            deadline = time.monotonic() + STOP_PATIENCE_S
            while any(t.is_alive() for t in self._threads) and time.monotonic() < deadline:
                if self._may_be_left:
                    break  # a thread that waits for work or looks at the device holds nothing
                time.sleep(STOP_POLL_S)
        finally:
            self._leave()
            self._state.close()
        if self._fatal is not None:
            raise self._fatal

    def _start(self, name: str, loop: Callable[[], None]) -> None:
        self._enter()
        thread = threading.Thread(target=self._guarded, args=(loop,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _live(self) -> None:
        """From the identity to the work; beating begins in between."""
        identity = self._identify()
        self._pulse.interval_s = identity.heartbeat_s
        self._outbox.redeem()
        self._start("heartbeat", partial(self._pulse.run, self._stop))
        described = self._state.described()
        if described is None or described.environment != self._environment():
            self._announce()
        self._work()

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it
            if not self._stop.is_set():
                self._fatal = error
        finally:
            self.stop()
            self._leave()

    def _enter(self) -> None:
        with self._users_guard:
            self._users += 1

    def _leave(self) -> None:
        """The last user closes the connection: one that is in use cannot be closed cleanly."""
        with self._users_guard:
            self._users -= 1
            is_last = self._users == 0
        if is_last:
            self._connection.close()

    # -- identity

    def _identify(self) -> Identity:
        identity = self._state.identity()
        if identity is not None and not self._is_known(identity):
            identity = None
        if identity is None:
            identity = self._enrol()
            self._say(f"enrolled as {identity.device_name} (agent {identity.agent_id})")
        else:
            self._say(f"back as {identity.device_name} (agent {identity.agent_id})")
        self._connection.use_key(identity.agent_key)
        return identity

    def _is_known(self, identity: Identity) -> bool:
        self._connection.use_key(identity.agent_key)
        try:
            self._connection.heartbeat(heartbeat_of(None))
        except EnrolmentRefused:
            if self._settings.token is None:
                raise  # the service says why, and what to do
            self._connection.use_key(None)
            return False
        except ServiceUnreachable:
            return True  # not now; the loops go on trying
        return True

    def _enrol(self) -> Identity:
        if self._settings.token is None:
            raise DeviceAgentError(
                "this agent is not enrolled yet: get a token with `autotune device enroll` and "
                "pass it with --token"
            )
        request = EnrolRequest(
            protocol_version=PROTOCOL_VERSION,
            token=self._settings.token,
            name=self._settings.name,
            device=self._look(),
            instance=INSTANCE,
        )
        backoff = self._backoff()
        for attempt in range(1, ENROLMENT_TRIES + 1):
            try:
                reply = self._connection.enrol(request)
                break
            except ServiceUnreachable:
                if attempt == ENROLMENT_TRIES or self._stop.wait(backoff.next_s()):
                    raise
        identity = Identity.model_validate(reply.model_dump())
        self._state.save(identity)
        self._note(request.device)
        return identity

    def _look(self) -> DeviceDescription:
        """What the device is; it may take a minute, and an agent that is to end does not wait."""
        self._may_be_left = True
        try:
            device = self._describe()
        finally:
            self._may_be_left = False
        if self._stop.is_set():
            raise DeviceAgentError("the agent was stopped while it looked at its device")
        return device

    def _announce(self) -> None:
        """Say what the device is by now, before anything is measured on it.

        The agent, a runtime or the board may be another than when it enrolled.
        """
        device, backoff = self._look(), self._backoff()
        while not self._stop.is_set():
            try:
                self._connection.describe(device)
                self._note(device)
                return
            except ServiceUnreachable:
                self._wait_for_service(backoff)

    def _wait_for_service(self, backoff: Backoff) -> None:
        """Until it is time for another try: sooner where a heartbeat came through meanwhile."""
        self._came_back.clear()
        self._came_back.wait(0 if self._stop.is_set() else backoff.next_s())

    def _note(self, device: DeviceDescription) -> None:
        versions = {build.name: build.version for build in device.runtimes}
        self._state.note_described(Described(environment=self._environment(), versions=versions))

    def _rotate(self) -> None:
        """Get a new key. It is kept before it is used, because its first use ends the old one."""
        identity = self._state.identity()
        if identity is None:
            return
        try:
            key = self._connection.new_key().agent_key
            self._state.save(identity.model_copy(update={"agent_key": key}))
        except (ServiceUnreachable, DeviceDiskFull):
            return  # the key in use stays good; the next heartbeat asks again
        self._connection.use_key(key)

    # -- work

    def _work(self) -> None:
        backoff = self._backoff()
        while not self._stop.is_set():
            try:
                self._hand_in()
                asked_s = time.monotonic()
                lease = self._ask()
            except ServiceUnreachable:
                self._wait_for_service(backoff)
                continue
            backoff.reset()
            if self._stop.is_set():
                return  # what came with the stop runs out at the service and goes elsewhere
            if lease is not None:
                self._serve(lease)
            elif time.monotonic() - asked_s < PROMPT_ANSWER_S:
                self._stop.wait(PROMPT_ANSWER_S)  # a service that does not hold the request

    def _ask(self) -> Lease | None:
        self._may_be_left = True
        try:
            # Anything down to half: a fleet that was answered together does not ask together.
            wait_s = self._settings.long_poll_s * random.uniform(0.5, 1)  # noqa: S311
            lease = self._connection.lease(wait_s=wait_s, request_id=self._request_id)
        finally:
            self._may_be_left = False
        self._request_id = new_request_id()  # until here a lost answer is asked for again
        return lease

    def _serve(self, lease: Lease) -> None:
        held = HeldLease(lease_id=lease.lease_id, fencing_token=lease.fencing_token)
        self._held = held
        ended = self._fetch_and_measure(lease.request, held)
        sha8 = lease.request.artifact.sha256[:8]
        if ended.outcome in (Outcome.CANCELLED, Outcome.LOST):
            # Nothing to hand in: the lease is another's by now, or will run out.
            self._held = None
            self._outbox.withdraw()
            self._say(f"dropped {sha8}: {ended.reason}")
            return
        self._say(f"{'measured' if ended.report else 'failed'} {sha8}: {describe_outcome(ended)}")
        if ended.report is not None and self._is_news(ended.report):
            self._announce()  # a runtime was updated meanwhile; the service takes the lease back
        self._keep(_result(held, lease.request, ended))
        self._outbox.withdraw()

    def _is_news(self, report: LatencyReport) -> bool:
        """It was measured with another build of the runtime than the service knows of."""
        described = self._state.described()
        known = described and described.versions.get(report.runtime.runtime)
        return bool(known) and known != report.runtime_version

    def _fetch_and_measure(
        self, request: MeasurementRequest, held: HeldLease
    ) -> MeasurementOutcome:
        keep = (request.artifact.sha256, request.reference.sha256)
        try:
            paths = [self._fetch(x, held, keep) for x in (request.artifact, request.reference)]
        except ArtifactCorrupt as error:
            return MeasurementOutcome(outcome=Outcome.ARTIFACT_CORRUPT, reason=str(error))
        except ArtifactMissing as error:
            return MeasurementOutcome(outcome=Outcome.ARTIFACT_MISSING, reason=str(error))
        except DeviceDiskFull as error:
            return MeasurementOutcome(outcome=Outcome.DEVICE_DISK, reason=str(error))
        except ServiceUnreachable as error:
            return MeasurementOutcome(outcome=Outcome.LOST, reason=str(error))
        measurement = Measurement(
            candidate=paths[0],
            reference=paths[1],
            runtime=request.runtime,
            reference_runtime=request.reference_runtime,
            plan=request.plan,
            profile=request.profile,
            memory=self._memory,
        )
        held.attach(measurement)
        died = MeasurementOutcome(outcome=Outcome.LOST, reason=DIED)
        self._outbox.promise(_result(held, request, died))
        return measurement.run()

    def _fetch(self, artifact: ArtifactReference, held: HeldLease, keep: tuple[str, ...]) -> Path:
        cached = self._cache.get(artifact.sha256)
        if cached is not None:
            return cached
        backoff, tries_left, in_parts = self._backoff(), DOWNLOAD_TRIES, True
        while True:
            received = self._cache.received_bytes(artifact.sha256)
            try:
                return self._transfer.fetch(artifact, keep=keep, in_parts=in_parts)
            except (ServiceUnreachable, ArtifactCorrupt) as error:
                # A line that breaks but brings something each time gets there in the end, and
                # while nothing gets through the lease may still be ours: the heartbeat will tell.
                if self._pulse.is_connected and (
                    self._cache.received_bytes(artifact.sha256) <= received
                ):
                    tries_left -= 1
                if tries_left == 0 or held.is_dropped.wait(backoff.next_s()):
                    raise
                in_parts = in_parts and not isinstance(error, ArtifactCorrupt)

    def _keep(self, result: MeasurementResult) -> None:
        try:
            self._outbox.put(result)
        except DeviceDiskFull:
            self._cache.clear()  # artifacts can be fetched again, a result cannot
            self._outbox.put(result)

    def _hand_in(self) -> None:
        for result in self._outbox.pending():
            self._held = HeldLease(lease_id=result.lease_id, fencing_token=result.fencing_token)
            if self._upload(result) is Acknowledgement.REFUSED:
                self._say(f"the service did not take the result of {result.measurement_id}: late")
            self._outbox.acknowledge(result)
        self._held = None

    def _upload(self, result: MeasurementResult) -> Acknowledgement:
        try:
            answer = self._connection.upload(result)
        except ServiceUnreachable as error:
            # Something on the way that lets heartbeats through, but not this: say so, once.
            if self._pulse.is_connected and self._kept_because != str(error):
                self._kept_because = str(error)
                self._say(f"the result of {result.measurement_id} is kept: {error}; trying again")
            raise
        self._kept_because = None
        return answer


def _result(
    held: HeldLease, request: MeasurementRequest, ended: MeasurementOutcome
) -> MeasurementResult:
    return MeasurementResult(
        lease_id=held.lease_id,
        fencing_token=held.fencing_token,
        measurement_id=request.measurement_id,
        outcome=ended.outcome,
        reason=ended.reason,
        report=ended.report,
    )


def new_request_id() -> str:
    """A name for one answer that the agent wants."""
    return secrets.token_hex(8)


def describe_outcome(ended: MeasurementOutcome) -> str:
    """One line for people: the latency with its half width, or the outcome with its reason."""
    report = ended.report
    if report is None:
        return f"{ended.outcome}: {ended.reason}"
    half_width = (report.ratio_high - report.ratio_low) / 2 / report.ratio
    text = f"{report.p50_ns / 1e6:.3g} ms ±{half_width:.1%}".replace("%", " %")
    note = ended.reason or report.unsteady_reason
    return f"{text} (unsteady: {note})" if note else text
