"""The repository's verbs for what jobs taught about devices.

A part of `Repository`, reached as `repository.knowledge`; the same contract holds: one method is
one transaction. How it is learnt and used is `autotune.search.device_latency`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.database import Database
from storage.latency_model import LatencyModel
from storage.tables import JobRow, LatencyModelRow


class KnowledgeRepository:
    """Latency models: for each device and job what was known when the job had learnt last.

    A job's models build on those of the job before it on that device, so that those of the
    newest job are all that is known; what a job learns replaces what it had learnt earlier.
    """

    def __init__(
        self,
        database: Database,
        *,
        writing: Callable[[], AbstractContextManager[Session]],
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._writing = writing
        self._clock = clock

    def keep_latency_models(
        self, device_id: str, job_id: str, models: Sequence[LatencyModel]
    ) -> None:
        """What the device's latency is thought to be made of, after the job's trials so far.

        Raises:
            StorageError: there is no such device or job.
        """
        with self._writing() as session:
            row = session.get(LatencyModelRow, (device_id, job_id))
            if row is None:
                row = LatencyModelRow(device_id=device_id, job_id=job_id)
                session.add(row)
            row.models, row.updated_at = tuple(models), self._clock()
            session.flush()

    def latency_models(
        self, device_id: str, *, before_job: str | None = None
    ) -> tuple[LatencyModel, ...]:
        """What the newest job taught that measured there; of those created before `before_job`.

        By the order of creation and not of learning, so that a job which is extended later
        never builds on what it had taught another one. Empty where nothing was learnt.
        """
        wanted = (
            select(LatencyModelRow)
            .join(JobRow, JobRow.id == LatencyModelRow.job_id)
            .where(LatencyModelRow.device_id == device_id)
            .order_by(JobRow.serial.desc())
            .limit(1)
        )
        if before_job is not None:
            own = select(JobRow.serial).where(JobRow.id == before_job).scalar_subquery()
            wanted = wanted.where(JobRow.serial < own)
        with self._database.reading() as session:
            row = session.scalars(wanted).one_or_none()
            return () if row is None else row.models
