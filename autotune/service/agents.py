"""Routes of agents: enrol, describe, heartbeat, new key, lease, download, result.

Owns holding a request for work open until there is some. Exactly-once acceptance is the
repository's; the messages are `device_agents.protocol`'s.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response

from autotune.search.feasibility import bounded
from autotune.service.attendance import AttendanceBook
from autotune.service.context import Context, ServiceContext
from autotune.service.identities import Clash, IdentityWatch
from autotune.service.problems import problem_responses
from autotune.service.security import (
    KEY_VALID_S,
    Agent,
    hash_secret,
    new_secret,
    require_agent,
)
from autotune.service.versions import require_version
from device_agents.protocol import (
    ArtifactSegments,
    DeviceDescription,
    EnrolReply,
    EnrolRequest,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LeaseRequest,
    MeasurementResult,
    NewKey,
)
from storage.records import (
    AgentRecord,
    DrainCause,
    MeasurementRecord,
    pool_topic,
    queue_topic,
)
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
        instance=request.instance,
    )
    return EnrolReply(
        agent_id=agent.id,
        device_id=device.id,
        device_name=device.name,
        agent_key=key,
        heartbeat_s=context.settings.heartbeat_s,
    )


@router.post("/description", operation_id="describe_device", responses=problem_responses(401))
async def describe(context: Context, agent: Agent, device: DeviceDescription) -> dict[str, bool]:
    """What the agent's device is by now; an agent that starts says it where that may be news.

    With another runtime or processor than before (`changed`) what was measured there for jobs
    that are not over is measured again.
    """
    changed = await run_in_threadpool(context.repository.fleet.describe, agent.device_id, device)
    return {"changed": changed}


@router.post("/heartbeat", operation_id="heartbeat", responses=problem_responses(401, 426))
async def heartbeat(
    context: Context,
    attendance: AttendanceBook,
    identities: IdentityWatch,
    agent: Agent,
    sent: Heartbeat,
    request: Request,
) -> HeartbeatReply:
    """The agent lives; renews the lease that it names. Copies of one identity are found here."""
    require_version(sent.protocol_version)
    drained_because = agent.device.drained_because
    address = request.client.host if request.client else "an unknown address"
    clash = sent.instance and identities.sight(agent.id, sent.instance, address)
    if clash:
        drained_because = await run_in_threadpool(_drain_copies, context, agent, clash)
    lease = None
    if sent.lease_id is not None and sent.fencing_token is not None:
        lease = (sent.lease_id, sent.fencing_token)
    is_current = await attendance.note(agent.device_id, lease)
    return HeartbeatReply(
        heartbeat_s=attendance.period_s(is_measuring=lease is not None),
        drop_lease=not is_current,
        reason=None if is_current else "the lease ran out, was taken back, or its job is over",
        rotate_key=_is_rotation_due(context, agent),
        drained_because=drained_because,
    )


@router.post("/key", status_code=201, operation_id="rotate_key", responses=problem_responses(401))
async def rotate(context: Context, agent: Agent) -> NewKey:
    """The agent's next key. The one it came with is good until the next was used once.

    An answer that is lost therefore costs nothing: the agent asks again with the key it has.
    """
    key = new_secret("eak")
    await run_in_threadpool(context.repository.fleet.offer_key, agent.id, hash_secret(key))
    return NewKey(agent_key=key)


@router.post(
    "/lease",
    operation_id="lease",
    response_model=Lease,
    responses={204: {"description": "No work within the time"}, **problem_responses(401, 426)},
)
async def lease(context: Context, agent: Agent, asked: LeaseRequest, request: Request) -> Response:
    """The oldest measurement that the agent's device may take; waits up to `wait_s` for one."""
    require_version(asked.protocol_version)
    now = asyncio.get_running_loop().time
    deadline = now() + asked.wait_s
    while not context.broadcast.is_closed and not await request.is_disconnected():
        ticket = context.broadcast.ticket(*_queues(agent))
        record = await run_in_threadpool(_take, context, agent, asked.request_id)
        if record is not None:
            return JSONResponse(_lease_of(record, context).model_dump(mode="json"))
        left_s = deadline - now()
        if left_s <= 0:
            break
        is_shared = context.repository.may_be_shared
        wait_s = min(left_s, RECHECK_S) if is_shared else left_s
        is_news = await context.broadcast.changed(ticket, timeout_s=wait_s)
        if not is_news and not is_shared:
            break  # nobody else writes: without news there is nothing to look for
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


def _with_bounds(result: MeasurementResult) -> MeasurementResult:
    """The result of an agent of an earlier release with the tail's bounds that it lacks."""
    report = None if result.report is None else bounded(result.report)
    return result.model_copy(update={"report": report})


@router.post(
    "/results",
    operation_id="report_result",
    responses=problem_responses(401, 409),
)
async def report(context: Context, agent: Agent, result: MeasurementResult) -> dict[str, bool]:
    """Accept a result while its lease is current; a late one is kept for audit (409)."""
    await run_in_threadpool(
        context.repository.accept_result,
        _with_bounds(result),
        agent_id=agent.id,
        max_attempts=context.settings.measurement_attempts,
    )
    return {"accepted": True}


def _segments(context: ServiceContext, sha256: str) -> ArtifactSegments:
    found = find_segments(context.artifacts.path(sha256).read_bytes())
    return ArtifactSegments(segments=tuple((x.identity, x.size_bytes) for x in found))


def _queues(agent: AgentRecord) -> list[str]:
    """Where work for the agent is announced: its device's queue, and its pool's."""
    topics = [queue_topic(agent.device_id)]
    if agent.device.pool is not None:
        topics.append(pool_topic(agent.device.pool, agent.device.fingerprint))
    return topics


def _is_rotation_due(context: ServiceContext, agent: AgentRecord) -> bool:
    """A drained device keeps its key: of two copies one would lock the other out unflagged."""
    if agent.device.drained_because is not None:
        return False
    age_s = (context.clock() - (agent.key_changed_at or agent.enrolled_at)).total_seconds()
    return agent.is_rotation_due or age_s > KEY_VALID_S


def _drain_copies(context: ServiceContext, agent: AgentRecord, clash: Clash) -> str | None:
    drained = context.repository.fleet.drain(
        agent.device_id,
        cause=DrainCause.IDENTITY,
        because=f"two processes use the identity of agent {agent.id} at once (from "
        f"{' and '.join(clash.addresses)}): a copied SD card or state folder. Enrol one of them "
        f"anew with a name of its own, then `autotune device resume {agent.device.name}`",
        distrust_since=context.clock() - timedelta(seconds=clash.since_s),
    )
    return drained.drained_because


def _take(
    context: ServiceContext, agent: AgentRecord, request_id: str | None
) -> MeasurementRecord | None:
    return context.repository.lease_measurement(
        device_id=agent.device_id,
        agent_id=agent.id,
        ttl_s=context.settings.lease_ttl_s,
        request_id=request_id,
        max_attempts=context.settings.measurement_attempts,
    )


def _lease_of(record: MeasurementRecord, context: ServiceContext) -> Lease:
    return Lease(
        lease_id=record.lease_id or "",
        fencing_token=record.fencing_token,
        ttl_s=context.settings.lease_ttl_s,
        request=record.request,
    )
