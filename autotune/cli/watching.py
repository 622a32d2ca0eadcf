"""Following a job until it ends: its state by polling, its events by the stream.

Owns the loop and what a job's end means for the exit code. How it looks is `panel.py`'s
work. A service that is away for a moment does not end the watch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import NamedTuple, Protocol

import autotune.errors
from autotune.api_types import Event, Job
from autotune.cli.panel import Display
from autotune.client import FINAL_STATES
from autotune.errors import AutotuneError, JobNotReady, ServiceError

_POLL_S = 1.0
# A restart of the service takes seconds; a minute leaves room for a migration.
_PATIENCE_S = 60.0
# The last events may arrive just after the state that they led to.
_LAST_EVENTS_S = 0.5


class Ended(NamedTuple):
    """A job in its final state; `error` names the class of the error that ended it."""

    job: Job
    error: str | None = None


class JobSource(Protocol):
    """The part of `autotune.client.Client` that following needs."""

    def job(self, reference: str, /) -> Job:
        """The job as it is now."""

    def events(self, reference: str, /) -> Iterator[Event]:
        """The job's events, from the first one on, as they come."""


def follow(
    client: JobSource,
    job_id: str,
    display: Display,
    *,
    since: datetime | None = None,
    check: Callable[[], None] = lambda: None,
    poll_s: float = _POLL_S,
) -> Ended:
    """Show the job until it ends.

    `check` runs with every poll and raises when there is nothing left to wait for (a child
    process died). Events older than `since` are not shown again.

    Raises:
        ServiceError: the service was away for longer than a minute.
    """
    events = _stream(client, job_id)
    last_answer = time.monotonic()
    error: str | None = None
    while True:
        check()
        try:
            job = client.job(job_id)
            last_answer = time.monotonic()
        except ServiceError:
            if time.monotonic() - last_answer > _PATIENCE_S:
                raise
            display.say("the service does not answer; trying again")
            time.sleep(poll_s)
            continue
        ended = job.state in FINAL_STATES
        for event in _arriving(events, _LAST_EVENTS_S if ended else poll_s):
            if event.kind == "state":
                error = event.payload.get("error")
            if since is None or event.created_at >= since:
                at_s = (event.created_at - job.created_at).total_seconds()
                display.note(event, at_s=at_s)
        display.show(job)
        if ended:
            return Ended(job, error)


def _stream(client: JobSource, job_id: str) -> queue.Queue[Event]:
    """The job's events, read by a thread of their own because the stream blocks.

    The thread is a daemon and dies with the process: a blocked read cannot be interrupted.
    """
    events: queue.Queue[Event] = queue.Queue()

    def read() -> None:
        try:
            for event in client.events(job_id):
                events.put(event)
        except AutotuneError:
            return  # the poll meets the same error and decides what it means

    threading.Thread(target=read, name="job-events", daemon=True).start()
    return events


def _arriving(events: queue.Queue[Event], wait_s: float) -> Iterator[Event]:
    """The events that arrive within `wait_s`."""
    deadline = time.monotonic() + wait_s
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            yield events.get(timeout=left_s)
        except queue.Empty:
            return


def require_finished(ended: Ended) -> Job:
    """The job, when it has its answer.

    Raises:
        AutotuneError: the job failed; the class is the one that its last event names.
        JobNotReady: the job was cancelled, or failed for another reason.
    """
    job, error = ended
    if job.state == "finished":
        return job
    reason = job.reason or "no reason is on record"
    known = getattr(autotune.errors, error, None) if error else None
    if job.state == "failed" and isinstance(known, type) and issubclass(known, AutotuneError):
        raise known(f"job {job.name!r} failed: {reason}")
    raise JobNotReady(f"job {job.id} is {job.state}: {reason}")
