"""Route of a job's events: as a list, or as a stream that goes on until the job ends.

Server-sent events (WHATWG HTML, section 9.2): each event's id is its number, so that a
client that lost its connection goes on with `Last-Event-ID`. The stream ends with an event of
type `end`; without it the connection was lost and the client should come back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from autotune.api_types import Event
from autotune.errors import InvalidJob
from autotune.service import views
from autotune.service.context import Context, ServiceContext
from autotune.service.problems import problem_responses
from storage.records import EventRecord

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["events"])

HEARTBEAT_S = 10.0
"""A comment is sent after this much silence, so that no proxy takes the stream for dead."""

LAST_WORDS_S = 1.0
"""The event that tells of a job's end is written just after the state that it tells of."""

_EVENTS_PER_READ = 500
_TOPICS = ("events", "jobs")


@router.get(
    "/events",
    operation_id="list_events",
    response_model=list[Event],
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **problem_responses(404, 422),
    },
)
async def list_events(
    context: Context,
    job_id: str,
    follow: bool = True,
    after: Annotated[int, Query(ge=0)] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """The job's events after number `after` (or `Last-Event-ID`, where that is later).

    With `follow=false` one page of at most 500 as JSON; else a stream.
    """
    after = max(after, _number(last_event_id))
    job = await run_in_threadpool(context.repository.get_job, job_id)
    if not follow:
        events = await _read(context, job.id, after)
        shown = [views.event_view(event).model_dump(mode="json") for event in events]
        return JSONResponse(shown)
    return StreamingResponse(
        stream(context, job.id, after),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def stream(context: ServiceContext, job_id: str, after: int) -> AsyncIterator[str]:
    """The events as text, each as soon as it is there; ends when the job has ended."""
    is_ending = False
    while not context.broadcast.is_closed:
        ticket = context.broadcast.ticket(*_TOPICS)
        # State before events: whatever was written before the end is then read, too.
        job = await run_in_threadpool(context.repository.get_job, job_id)
        events = await _read(context, job_id, after)
        for event in events:
            after = event.id
            yield _frame(event)
        if events:
            is_ending = False
            continue
        if job.state.is_final and is_ending:
            yield "event: end\ndata: {}\n\n"
            return
        is_ending = job.state.is_final
        wait_s = LAST_WORDS_S if is_ending else HEARTBEAT_S
        if not await context.broadcast.changed(ticket, timeout_s=wait_s) and not is_ending:
            yield ": still here\n\n"


async def _read(context: ServiceContext, job_id: str, after: int) -> list[EventRecord]:
    return await run_in_threadpool(
        context.repository.list_events, job_id, after=after, limit=_EVENTS_PER_READ
    )


def _frame(event: EventRecord) -> str:
    return f"id: {event.id}\ndata: {views.event_view(event).model_dump_json()}\n\n"


def _number(last_event_id: str | None) -> int:
    if last_event_id is None or last_event_id == "":
        return 0
    if not last_event_id.isdecimal():
        raise InvalidJob(f"Last-Event-ID is {last_event_id!r}; it is the number of an event")
    return int(last_event_id)
