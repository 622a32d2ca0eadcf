"""Routes of agents: enrol, heartbeat, lease, download, result.

Owns holding a request for work open until there is some. Exactly-once acceptance is the
repository's; the messages are `device_agents.protocol`'s.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response

from autotune.service.attendance import AttendanceBook
from autotune.service.context import Context, ServiceContext
from autotune.service.problems import problem_responses
from autotune.service.security import Agent, hash_secret, new_secret, require_agent
from autotune.service.versions import require_version
from device_agents.protocol import (
    ArtifactSegments,
    EnrolReply,
    EnrolRequest,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LeaseRequest,
    MeasurementResult,
)
from storage.records import AgentRecord, MeasurementRecord, queue_topic
from storage.segments import find_segments

router = APIRouter(prefix="/v1/agent", tags=["agents"])

RECHECK_S = 5.0
"""A waiting agent is woken by news of its own device's queue, and looks into a shared database
at least this often, for what another service announced."""

MAX_RESULT_BYTES = 64 * 1024**2
"""Raw samples as JSON: six million calls, which is a minute of a model that takes 10 us."""


@router.post("/enrol", status_code=201, operation_id="enrol", responses=problem_responses(401, 426))
async def enrol(context: Context, request: EnrolRequest) -> EnrolReply:
    """Turn a one-use token into an agent's identity. The key is shown here and never again."""
    require_version(request.protocol_version)
    key = new_secret("eak")
    device, agent = await run_in_threadpool(
        context.repository.enrol,
        hash_secret(request.token),
        name=request.name or request.device.hostname,
        description=request.device,
        agent_key_hash=hash_secret(key),
    )
    return EnrolReply(
        agent_id=agent.id,
        device_id=device.id,
        device_name=device.name,
        agent_key=key,
        heartbeat_s=context.settings.heartbeat_s,
    )


@router.post("/heartbeat", operation_id="heartbeat", responses=problem_responses(401, 426))
async def heartbeat(
    context: Context, attendance: AttendanceBook, agent: Agent, request: Heartbeat
) -> HeartbeatReply:
    """The agent lives; renews the lease that it names."""
    require_version(request.protocol_version)
    lease = None
    if request.lease_id is not None and request.fencing_token is not None:
        lease = (request.lease_id, request.fencing_token)
    is_current = await attendance.note(agent.device_id, lease)
    return HeartbeatReply(
        heartbeat_s=context.settings.heartbeat_s,
        drop_lease=not is_current,
        reason=None if is_current else "the lease ran out or the job was cancelled",
    )


@router.post(
    "/lease",
    operation_id="lease",
    response_model=Lease,
    responses={204: {"description": "No work within the time"}, **problem_responses(401, 426)},
)
async def lease(context: Context, agent: Agent, asked: LeaseRequest, request: Request) -> Response:
    """The oldest measurement queued for the agent's device; waits up to `wait_s` for one."""
    require_version(asked.protocol_version)
    now = asyncio.get_running_loop().time
    deadline = now() + asked.wait_s
    while not context.broadcast.is_closed and not await request.is_disconnected():
        ticket = context.broadcast.ticket(queue_topic(agent.device_id))
        record = await run_in_threadpool(_take, context, agent, asked.request_id)
        if record is not None:
            return JSONResponse(_lease_of(record, context).model_dump(mode="json"))
        left_s = deadline - now()
        if left_s <= 0:
            break
        wait_s = min(left_s, RECHECK_S) if context.repository.may_be_shared else left_s
        await context.broadcast.changed(ticket, timeout_s=wait_s)
    return Response(status_code=204)


@router.get(
    "/artifacts/{sha256}",
    operation_id="download_artifact",
    response_class=FileResponse,
    responses=problem_responses(401, 404),
    dependencies=[Depends(require_agent)],
)
async def download(
    context: Context, sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
) -> FileResponse:
    """An artifact's bytes, whole or by range. Who knows a digest may read what it names."""
    path = await run_in_threadpool(context.artifacts.path, sha256)
    return FileResponse(path, media_type="application/octet-stream", headers={"ETag": sha256})


@router.get(
    "/artifacts/{sha256}/segments",
    operation_id="list_segments",
    responses=problem_responses(401, 404),
    dependencies=[Depends(require_agent)],
)
async def segments(
    context: Context, sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
) -> ArtifactSegments:
    """The parts of an artifact, so that an agent fetches only those that it does not have."""
    return await run_in_threadpool(_segments, context, sha256)


@router.post(
    "/results",
    operation_id="report_result",
    responses=problem_responses(401, 409),
)
async def report(context: Context, agent: Agent, result: MeasurementResult) -> dict[str, bool]:
    """Accept a result while its lease is current; a late one is kept for audit (409)."""
    await run_in_threadpool(context.repository.accept_result, result, agent_id=agent.id)
    return {"accepted": True}


def _segments(context: ServiceContext, sha256: str) -> ArtifactSegments:
    found = find_segments(context.artifacts.path(sha256).read_bytes())
    return ArtifactSegments(segments=tuple((x.identity, x.size_bytes) for x in found))


def _take(
    context: ServiceContext, agent: AgentRecord, request_id: str | None
) -> MeasurementRecord | None:
    return context.repository.lease_measurement(
        device_id=agent.device_id,
        agent_id=agent.id,
        ttl_s=context.settings.lease_ttl_s,
        request_id=request_id,
    )


def _lease_of(record: MeasurementRecord, context: ServiceContext) -> Lease:
    return Lease(
        lease_id=record.lease_id or "",
        fencing_token=record.fencing_token,
        ttl_s=context.settings.lease_ttl_s,
        request=record.request,
    )
