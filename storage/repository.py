"""The repository: everything the program keeps, as domain verbs that take and return records.

This class owns the contract, the transactions and the notifications; the statements lie in
the module of each noun (`jobs.py`, `trials.py`, `measurements.py`, `devices.py`,
`agents.py`, `ledger.py`); keys, drained devices and quarantine are the verbs of `fleet.py`, what
jobs taught about devices is that of `knowledge.py`. The same contract holds on SQLite and on
PostgreSQL; one test suite runs on both.

- Every method is one transaction: it happened completely and durably when it returns, and not
  at all when it raises (except that a late result is kept although `accept_result` raises).
- Methods may be called from any number of threads. On PostgreSQL several services may share
  one database; a SQLite file has one owner.
- Execution is at least once, acceptance exactly once: see `lease_measurement`.
- Any method may raise DatabaseUnavailable; a writing one DatabaseFull or DatabaseLocked too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy.orm import Session

from device_agents.protocol import DeviceDescription, MeasurementRequest, MeasurementResult
from search_spaces import Candidate
from storage import agents, devices, jobs, ledger, measurements, trials
from storage.database import Database, changed_topics
from storage.errors import ReplacedKey, StaleLease
from storage.fleet import FleetRepository
from storage.knowledge import KnowledgeRepository
from storage.ownership import Claim
from storage.records import (
    AgentRecord,
    ArtifactRecord,
    DeviceRecord,
    EventRecord,
    JobRecord,
    LateResultRecord,
    MeasurementRecord,
    TrialRecord,
)

MAX_ATTEMPTS: Final = 3  # a candidate that silences its agent three times is at fault


def utc_now() -> datetime:
    """The time of this machine's clock, aware, in UTC."""
    return datetime.now(UTC)


def ignore(topic: str) -> None:
    """A listener that does nothing."""
    del topic


class Repository:
    """Jobs, trials, measurements, devices, tokens, artifacts and events of one database.

    Args:
        database: From `open_database`; whoever opened it closes it.
        notify: Called after a commit, on the committing thread, once per kind of row that
            changed: "jobs", "trials", "measurements", "events" or "devices", and once per
            device whose queue grew (`records.queue_topic`). A renewed lease is no change. It
            must be quick and must not raise: the commit has happened.
        clock: The time that decides when a lease or a token ends.
    """

    def __init__(
        self,
        database: Database,
        *,
        notify: Callable[[str], None] = ignore,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._notify = notify
        self._clock = clock
        self.fleet = FleetRepository(database, writing=self._writing, clock=clock)
        self.knowledge = KnowledgeRepository(database, writing=self._writing, clock=clock)

    @property
    def may_be_shared(self) -> bool:
        """Another service may change the same rows; nobody is notified of what it does."""
        return self._database.may_be_shared

    # -- jobs ---------------------------------------------------------------------------------

    def create_job(self, *, spec: Mapping[str, Any], name: str) -> JobRecord:
        """A new job in state QUEUED; names may repeat."""
        with self._writing() as session:
            return jobs.create(session, spec=spec, name=name, now=self._clock())

    def get_job(self, reference: str) -> JobRecord:
        """The job of that id, else the newest of that name, else of that unique id prefix.

        Raises:
            NotFound: nothing or more than one id fits; the message names what comes close.
        """
        with self._database.reading() as session:
            return jobs.get(session, reference)

    def list_jobs(self) -> list[JobRecord]:
        """Every job, oldest first."""
        with self._database.reading() as session:
            return jobs.all_jobs(session)

    def claim_job(self, job_id: str) -> Claim | None:
        """The right to run a job or to end it; None while another service has it.

        It lasts until its `release`, or until this process ends.
        """
        return self._database.claim(f"job {job_id}")

    def update_job(self, job_id: str, **changes: Any) -> JobRecord:
        """Set any field of the record except `id` and `created_at`, with the record's types.

        The first RUNNING sets `started_at`. A state sets `finished_at` (final) or clears it,
        unless it is given.

        Raises:
            NotFound: there is no such job.
            TypeError: a field that cannot be changed.
        """
        with self._writing() as session:
            return jobs.update(session, job_id, changes, now=self._clock())

    def request_cancel(self, job_id: str) -> JobRecord:
        """Set `cancel_requested`; a job in a final state stays as it is.

        Raises:
            NotFound: there is no such job.
        """
        with self._writing() as session:
            return jobs.request_cancel(session, job_id)

    def resume_job(self, job_id: str, *, spec: Mapping[str, Any] | None = None) -> JobRecord:
        """A final job goes back to QUEUED, with its trials and what is known about its model.

        A job that is not final keeps its state; `cancel_requested` is taken back in any case,
        and `spec`, where given, replaces the job's.

        Raises:
            NotFound: there is no such job.
        """
        with self._writing() as session:
            return jobs.resume(session, job_id, spec=spec)

    # -- trials -------------------------------------------------------------------------------

    def add_trial(self, job_id: str, candidate: Candidate, *, proposed_by: str) -> TrialRecord:
        """The job's next trial, in state PROPOSED; numbers are 0, 1, 2, ... without gaps.

        Raises:
            DuplicateTrial: the job has a trial of this candidate; it carries that trial's id.
            NotFound: there is no such job.
        """
        with self._writing() as session:
            now = self._clock()
            return trials.add(session, job_id, candidate, proposed_by=proposed_by, now=now)

    def update_trial(self, trial_id: str, *, on: str | None = None, **changes: Any) -> TrialRecord:
        """Set any field except `id`, `job_id`, `number`, `candidate` and `created_at`.

        A state sets `finished_at` (FINISHED) or clears it, unless it is given. Latency reports
        are kept without their raw samples; those are with the measurement. `on` is the device
        id of a further target: the fields are then those of its `TargetFigures`.

        Raises:
            NotFound: there is no such trial.
            TypeError: a field that cannot be changed.
        """
        with self._writing() as session:
            return trials.update(session, trial_id, changes, on=on, now=self._clock())

    def get_trial(self, trial_id: str) -> TrialRecord:
        """The trial of that id.

        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as session:
            return trials.get(session, trial_id)

    def find_trial(self, job_id: str, reference: str | int) -> TrialRecord:
        """A trial of the job by number (`7`, `#7`), id, or unique beginning of an id.

        Raises:
            NotFound: nothing or more than one id fits.
        """
        with self._database.reading() as session:
            return trials.find(session, job_id, str(reference))

    def list_trials(self, job_id: str) -> list[TrialRecord]:
        """A job's trials by number; none for a job that does not exist."""
        with self._database.reading() as session:
            return trials.of_job(session, job_id)

    # -- measurements -------------------------------------------------------------------------

    def enqueue_measurement(
        self,
        *,
        job_id: str,
        trial_id: str | None,
        device_id: str,
        request: MeasurementRequest,
        is_shared: bool = False,
        avoid_device_id: str | None = None,
        is_canary: bool = False,
    ) -> MeasurementRecord:
        """A measurement in state QUEUED, named by `request.measurement_id`.

        The same call a second time returns the first one's record, whatever its state. One
        that `is_shared` may be taken by any device of the same pool and fingerprint but
        `avoid_device_id`; only an `is_canary` reaches a device that a canary drained. An
        artifact in quarantine there is DONE at once, with outcome QUARANTINED.

        Raises:
            StorageError: the id is taken by another request, or the job, the trial or the
                device does not exist.
        """
        with self._writing() as session:
            return measurements.enqueue(
                session,
                job_id=job_id,
                trial_id=trial_id,
                device_id=device_id,
                request=request,
                is_shared=is_shared,
                avoid_device_id=avoid_device_id,
                is_canary=is_canary,
                now=self._clock(),
            )

    def lease_measurement(
        self,
        *,
        device_id: str,
        agent_id: str,
        ttl_s: float,
        request_id: str | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> MeasurementRecord | None:
        """The oldest queued measurement that the device may take, leased for `ttl_s` seconds.

        Its `fencing_token` is larger than any before; only the result that carries it will be
        accepted. An agent holds one lease at most: one that asks while it holds another has
        lost it (a restart), so that one ends first, as if it had run out. But the same
        `request_id` again, whose answer never arrived, brings the same lease once more. None
        where nothing is queued.

        Raises:
            NotFound: there is no such agent.
            InvalidToken: the agent was revoked.
        """
        # Many agents wait for work: those with none in sight must not queue for the write lock.
        with self._database.reading() as session:
            if not measurements.may_lease(session, device_id=device_id, agent_id=agent_id):
                return None
        with self._writing() as session:
            return measurements.lease(
                session,
                device_id=device_id,
                agent_id=agent_id,
                ttl_s=ttl_s,
                request_id=request_id,
                max_attempts=max_attempts,
                now=self._clock(),
            )

    def note_heartbeats(
        self, device_ids: Collection[str], leases: Collection[tuple[str, int]], *, ttl_s: float
    ) -> set[tuple[str, int]]:
        """The devices were seen now; those of the leases that are current are returned.

        A lease is its id and its fencing token; a current one now lasts `ttl_s` seconds from
        here. A lease that ran out is current until `expire_leases` takes it back:
        an agent that returns in between goes on. One transaction, whatever the number: what a
        heartbeat costs is the commit. Nobody is notified.
        """
        with self._writing(notify=False) as session:
            now = self._clock()
            devices.touch(session, device_ids, now=now)
            return measurements.renew(session, leases, ttl_s=ttl_s, now=now)

    def accept_result(
        self, result: MeasurementResult, *, agent_id: str, max_attempts: int = MAX_ATTEMPTS
    ) -> MeasurementRecord:
        """Make the measurement DONE with this result, and keep the report's raw samples.

        LOST is no result: its agent died while it measured, and the measurement is QUEUED
        again as if its lease had run out. That and a crash count toward the artifact's
        quarantine, also when they come late.

        Accepted once, while the measurement is LEASED by this agent under this lease and
        fencing token (also after the lease's time, as long as `expire_leases` has not taken
        it back). The accepted result sent again returns the same record and changes nothing.

        Raises:
            StaleLease: the lease is not current; the result is kept for `list_late_results`.
            NotFound: there is no such measurement.
        """
        with self._writing() as session:
            now = self._clock()
            record = measurements.accept(
                session, result, agent_id=agent_id, max_attempts=max_attempts, now=now
            )
        if record is None:
            raise StaleLease(
                f"lease {result.lease_id} (fencing token {result.fencing_token}) of measurement "
                f"{result.measurement_id} is no longer current; the result was set aside"
            )
        return record

    def expire_leases(self, *, max_attempts: int = MAX_ATTEMPTS) -> list[MeasurementRecord]:
        """Take back every lease that ran out by this repository's clock.

        Its measurement is QUEUED again in its old place, or DONE with outcome LOST once it
        was leased `max_attempts` times. Returns the measurements that changed.
        """
        with self._writing() as session:
            return measurements.expire(session, max_attempts=max_attempts, now=self._clock())

    def cancel_measurements(self, job_id: str) -> int:
        """End what is queued or leased of a job, with outcome CANCELLED; how many there were."""
        with self._writing() as session:
            return measurements.cancel(session, job_id, now=self._clock())

    def get_measurement(self, measurement_id: str) -> MeasurementRecord:
        """One measurement; its report comes with the raw samples.

        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as session:
            return measurements.get(session, measurement_id)

    def list_measurements(self, job_id: str) -> list[MeasurementRecord]:
        """A job's measurements in order of arrival; their reports come without raw samples."""
        with self._database.reading() as session:
            return measurements.of_job(session, job_id)

    def list_late_results(self, measurement_id: str) -> list[LateResultRecord]:
        """The results of a measurement that were not accepted, in order of arrival."""
        with self._database.reading() as session:
            return measurements.late_results(session, measurement_id)

    # -- devices, agents, tokens --------------------------------------------------------------

    def add_enrolment_token(
        self, token_hash: str, *, pool: str | None = None, expires_in_s: float
    ) -> None:
        """A token that enrols one agent, into `pool`, before it expires.

        Raises:
            StorageError: the token exists already.
        """
        with self._writing() as session:
            devices.add_enrolment_token(
                session, token_hash, pool=pool, expires_in_s=expires_in_s, now=self._clock()
            )

    def enrol(
        self,
        token_hash: str,
        *,
        name: str | None,
        description: DeviceDescription,
        agent_key_hash: str,
        instance: str | None = None,
    ) -> tuple[DeviceRecord, AgentRecord]:
        """Use up an enrolment token for an agent and its device.

        `name` is the host name where None. The same fingerprint under the same name on the
        same host is the same device again: it keeps its id, and its earlier agent is revoked,
        because two agents that measure on one device disturb each other. So is one on another
        host where the device's agent was revoked: a device that was installed anew. Another
        device that comes with a taken name is called `NAME-2`, `NAME-3`, ... `instance` is a
        secret of the process that enrols: with it the same token works again, for one whose
        answer was lost.

        Raises:
            InvalidToken: the token is unknown, used or expired; nothing was changed.
        """
        with self._writing() as session:
            return devices.enrol(
                session,
                token_hash,
                name=name,
                description=description,
                agent_key_hash=agent_key_hash,
                instance=instance,
                now=self._clock(),
            )

    def find_agent(self, key_hash: str) -> AgentRecord:
        """The agent of that key, with its device's standing.

        The first use of an agent's next key makes it the current one; the one before is good
        for another `agents.PREVIOUS_KEY_GRACE_S`. Whoever comes with it later has a copy of
        the agent's state: the device is drained.

        Raises:
            InvalidToken: the key is unknown, was replaced, or its agent was revoked.
        """
        try:
            with self._database.reading() as session:
                found, is_next = agents.find(session, key_hash, now=self._clock())
        except ReplacedKey:
            with self._writing() as session:
                agents.flag_copy(session, key_hash, now=self._clock())
            raise
        if is_next:
            with self._writing() as session:
                agents.adopt_key(session, found.id, key_hash, now=self._clock())
                found, _ = agents.find(session, key_hash, now=self._clock())
        return found

    def get_device(self, reference: str) -> DeviceRecord:
        """The device of that id, else of that name, else of that unique id prefix.

        Raises:
            NotFound: nothing or more than one id fits; the message names what comes close.
        """
        with self._database.reading() as session:
            return devices.get(session, reference)

    def list_devices(self) -> list[DeviceRecord]:
        """Every device, in order of enrolment."""
        with self._database.reading() as session:
            return devices.all_devices(session)

    def add_user_token(self, token_hash: str, *, name: str) -> None:
        """A user's token; one that is there already stays."""
        with self._writing() as session:
            devices.add_user_token(session, token_hash, name=name, now=self._clock())

    def has_user_token(self, token_hash: str) -> bool:
        """Whether some user has this token."""
        with self._database.reading() as session:
            return devices.has_user_token(session, token_hash)

    def count_user_tokens(self) -> int:
        """How many tokens users have."""
        with self._database.reading() as session:
            return devices.count_user_tokens(session)

    # -- artifacts and events -----------------------------------------------------------------

    def record_artifact(self, sha256: str, size_bytes: int, kind: str) -> ArtifactRecord:
        """Note that the artifact store has this file; the first note of a file stays."""
        with self._writing() as session:
            return ledger.record(session, sha256, size_bytes, kind, now=self._clock())

    def get_artifact(self, sha256: str) -> ArtifactRecord:
        """What is known about a file.

        Raises:
            NotFound: nothing is.
        """
        with self._database.reading() as session:
            return ledger.get(session, sha256)

    def append_event(
        self, job_id: str, kind: str, payload: Mapping[str, Any] | None = None
    ) -> EventRecord:
        """The next event: its id is one more than the last of the whole database.

        An event becomes visible only after every event with a smaller id.

        Raises:
            StorageError: there is no such job.
        """
        with self._writing() as session:
            now = self._clock()
            return ledger.append_event(session, job_id, kind, payload or {}, now=now)

    def list_events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[EventRecord]:
        """A job's events by id: up to `limit` of those whose id is larger than `after`."""
        with self._database.reading() as session:
            return ledger.events(session, job_id, after=after, limit=limit)

    @contextlib.contextmanager
    def _writing(self, *, notify: bool = True) -> Iterator[Session]:
        """One transaction; afterwards the listeners hear which kinds of rows changed."""
        with self._database.writing() as session:
            yield session
        for topic in changed_topics(session) if notify else ():
            self._notify(topic)
