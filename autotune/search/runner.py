"""The job loop: takes one job after the other and lives as long as the service.

Owns the thread, the choice of the next job and the last line of defence against errors. Of
several services on one database each takes the jobs that no other has (`storage/ownership.py`).
What happens inside a job is `tuning.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.search.conclusion import conclude_cancelled
from autotune.search.failures import as_defect
from autotune.search.fleet import ONLINE_WITHIN_S, Fleet, QuietWindow
from autotune.search.host import Host
from autotune.search.interruption import Stopped
from autotune.search.proposals import Proposals
from autotune.search.renewal import forget_outdated
from autotune.search.tuning import Tuning
from autotune.search.verification import VerificationOutcome, verify
from autotune.search.workers import WorkerPool, WorkerStarter, start_ray, stop_ray
from autotune.spec import JobSpec
from device_agents.protocol import DeviceDescription
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.ownership import Claim
from storage.records import DeviceRecord, JobRecord, JobState
from storage.repository import Repository
from storage.reserve import DiskReserve

if TYPE_CHECKING:
    from autotune.compression.data import DataSplits

_log = logging.getLogger(__name__)
_IDLE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """A job that this service alone runs, until the claim is released."""

    job: JobRecord
    devices: tuple[DeviceRecord, ...]
    claim: Claim


class Runner:
    """Runs queued jobs, oldest first, one at a time; a restart takes up what was running.

    Args:
        repository: the truth.
        artifacts: where the files lie.
        data_dir: pruned bases are cached below it.
        workers: worker processes; 0 means one per core.
        trust_job_code: jobs may run Python code of their own.
        host_id: this host's id, to open a quiet window for an agent on it.
        ray_address: a Ray cluster to join; None starts Ray on this host.
        make_pool: how a job gets its workers; None takes Ray's.
        make_proposals: who proposes in the search phase; a benchmark lets others do it.
        online_within_s: how long after its last heartbeat a device counts as online.
    """

    def __init__(
        self,
        repository: Repository,
        artifacts: ArtifactStore,
        *,
        data_dir: Path,
        workers: int = 0,
        trust_job_code: bool = False,
        host_id: str | None = None,
        ray_address: str | None = None,
        make_pool: Callable[[JobSpec, DataSplits, Sequence[DeviceDescription]], WorkerPool]
        | None = None,
        make_proposals: Callable[..., Proposals] = Proposals,
        online_within_s: float = ONLINE_WITHIN_S,
    ) -> None:
        self._window = QuietWindow()
        self._fleet = Fleet(
            repository,
            host_id=host_id,
            window=self._window,
            online_within_s=online_within_s,
        )
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self._n_workers = workers or os.cpu_count() or 1
        self._ray_address = ray_address
        self._owns_ray = make_pool is None
        self._starter = WorkerStarter()
        self._choosing = threading.Lock()
        self._current: str | None = None
        self._repository = repository
        self._artifacts = artifacts
        self._data_dir = data_dir
        self._reserve = DiskReserve(data_dir / "reserve")
        self._host = Host(
            repository=repository,
            artifacts=artifacts,
            fleet=self._fleet,
            window=self._window,
            trust_job_code=trust_job_code,
            make_pool=make_pool or self._make_pool,
            make_proposals=make_proposals,
            should_stop=self._stopping.is_set,
            make_room=self._reserve.release,
        )

    def start(self) -> None:
        """Begin to take jobs, in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="runner", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop in the middle of what is under way; it goes on after the next start."""
        self._stopping.set()
        self.wake("stop")
        if self._thread is not None:
            self._thread.join(timeout=30)

    def wake(self, topic: str) -> None:  # noqa: ARG002 - every topic wakes
        """Something changed in the database."""
        self._woken.set()
        self._fleet.wake()

    def verify(
        self, job: JobRecord, model: bytes, *, trial: str | None = None
    ) -> VerificationOutcome:
        """Measure a bundle's model again; see `verification.verify`."""
        return verify(
            job,
            model,
            trial=trial,
            repository=self._repository,
            artifacts=self._artifacts,
            fleet=self._fleet,
            window=self._window,
            trust_job_code=self._host.trust_job_code,
            should_stop=self._stopping.is_set,
        )

    def _make_pool(
        self, spec: JobSpec, splits: DataSplits, devices: Sequence[DeviceDescription]
    ) -> WorkerPool:
        start_ray(n_workers=self._n_workers, address=self._ray_address)
        return WorkerPool(
            spec,
            splits,
            devices=devices,
            cache_dir=self._data_dir / "bases",
            n_workers=self._n_workers,
            trust=self._host.trust_job_code,
            starter=self._starter,
            shares_files=self._ray_address is None,
        )

    def _loop(self) -> None:
        try:
            self._take_jobs()
        finally:
            # Ray's processes die with the thread that started them (PR_SET_PDEATHSIG counts
            # threads): stopped later, by another one, Ray would wait 5 s for what is gone.
            if self._owns_ray:
                stop_ray()

    def _take_jobs(self) -> None:
        if self._owns_ray:
            self._start_ray_early()
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                with self._choosing:
                    found = self._next_job()
                    self._current = None if found is None else found.job.id
            except Exception:  # noqa: BLE001 - without this thread no job would run any more
                # The database may be back in a moment.
                _log.exception("the next job could not be taken")
                self._stopping.wait(_IDLE_S)
                continue
            if found is None:
                self._woken.wait(_IDLE_S)
                continue
            try:
                self._run(found.job, found.devices)
            finally:
                found.claim.release()

    def end_cancelled(self, job_id: str) -> None:
        """End a job that was cancelled while another one runs; its own run ends by itself."""
        with self._choosing:
            claim = None if job_id == self._current else self._repository.claim_job(job_id)
            if claim is None:
                return
            with claim:
                job = self._repository.get_job(job_id)
                if job.cancel_requested and not job.state.is_final:
                    self._cancel(job)

    def _start_ray_early(self) -> None:
        """Before the first job asks for it, because starting takes some seconds."""
        try:
            with self._window.computing():
                start_ray(n_workers=self._n_workers, address=self._ray_address)
                self._starter.start_early(self._n_workers)
        except Exception:  # noqa: BLE001 - Ray raises a bare Exception where it starts too slowly
            # A job that needs it will try again and fail with the reason.
            _log.exception("Ray could not be started yet")

    def _next_job(self) -> _Taken | None:
        """The oldest open job whose devices are there; the others are told why they wait."""
        open_jobs = [job for job in self._repository.list_jobs() if not job.state.is_final]
        ordered = sorted(open_jobs, key=lambda job: (job.created_at, job.id))
        return next(filter(None, map(self._take, ordered)), None)

    def _take(self, job: JobRecord) -> _Taken | None:
        """The job, to be run; None where it ends here, has to wait, or is another service's."""
        found = [(named, self._fleet.find_device(named)) for named in _selectors(job)]
        reasons = [self._fleet.absence(job, named, device) for named, device in found]
        missing = "; ".join(reason for reason in reasons if reason is not None)
        is_told = (job.state, job.reason) == (JobState.WAITING_FOR_DEVICE, missing)
        if is_told and not job.cancel_requested:
            return None
        claim = self._repository.claim_job(job.id)
        if claim is None:
            return None
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim)
            # As it is now: another service may have ended it before it let go of it.
            job = self._repository.get_job(job.id)
            if job.state.is_final:
                return None
            if job.cancel_requested:
                self._cancel(job)
                return None
            if missing:
                self._move(job, JobState.WAITING_FOR_DEVICE, missing)
                return None
            stack.pop_all()
            devices = tuple(device for _, device in found if device is not None)
            return _Taken(job=job, devices=devices, claim=claim)

    def _cancel(self, job: JobRecord) -> None:
        """End a job that does not run, with the answer that its trials give."""
        self._repository.cancel_measurements(job.id)
        result = conclude_cancelled(job, self._repository.list_trials(job.id))
        self._move(
            job,
            JobState.CANCELLED,
            None,
            phase=JobState.CANCELLED.value,
            result=None if result is None else result.model_dump(),
            finished_at=datetime.now(UTC),
        )

    def _move(self, job: JobRecord, state: JobState, reason: str | None, **changes: object) -> None:
        self._repository.update_job(job.id, state=state, reason=reason, **changes)
        self._repository.append_event(job.id, "state", {"state": state.value, "reason": reason})

    def _run(self, job: JobRecord, devices: tuple[DeviceRecord, ...]) -> None:
        self._reserve.hold()
        try:
            Tuning(self._host, forget_outdated(self._repository, job, devices), devices).run()
        except Stopped:
            return
        except Exception as error:  # noqa: BLE001 - the loop outlives any one job
            _log.exception("job %s failed", job.id)
            self._fail(job, error)

    def _fail(self, job: JobRecord, error: Exception) -> None:
        try:
            self._move(job, JobState.FAILED, as_defect(error), finished_at=datetime.now(UTC))
        except StorageError:
            _log.exception("the failure of job %s could not be recorded", job.id)
            self._stopping.wait(_IDLE_S)


def _selectors(job: JobRecord) -> list[str | None]:
    """The job's devices by id once they are chosen, before that as its file names them."""
    if job.targets:
        return [target.device_id for target in job.targets]
    named = job.spec.get("device")
    return list(named) if isinstance(named, list | tuple) else [named]
