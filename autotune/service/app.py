"""The application: all routes, who may call them, and what runs beside them.

Owns putting together; each group of routes has a file of its own. `server.py` opens what
this needs and listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi

import autotune
from autotune.api_types import Health, Problem
from autotune.service import (
    agents,
    devices,
    events,
    explanations,
    fronts,
    jobs,
    quarantine,
    sensitivity,
    uploads,
    views,
)
from autotune.service.attendance import Attendance
from autotune.service.body_limit import BodyLimit
from autotune.service.context import ServiceContext
from autotune.service.identities import Identities
from autotune.service.known_agents import KnownAgents
from autotune.service.problems import install_problem_handlers, problem_responses
from autotune.service.request_names import RequestNames
from autotune.service.security import require_user
from autotune.settings import Settings
from autotune.spec import JobSpec
from storage.errors import StorageError

MAX_JSON_BYTES = 4 * 1024**2
"""Every body but an upload, a model or a result is a small JSON document."""

EXPIRY_S = 1.0
"""How often leases that ran out are taken back."""

GATHER_S = 0.1
"""Ten commits a second are enough for the heartbeats of any number of agents."""

USER_ROUTES = (
    jobs.router,
    fronts.router,
    explanations.router,
    sensitivity.router,
    events.router,
    devices.router,
    quarantine.router,
    uploads.router,
)

_log = logging.getLogger(__name__)
_health = APIRouter(prefix="/v1", tags=["service"])


@_health.get("/health", operation_id="get_health")
async def get_health() -> Health:
    """The service answers. Needs no token."""
    return Health(status="ok", version=autotune.__version__)


def create_app(context: ServiceContext) -> FastAPI:
    """The application over a context; its life span starts and stops the runner."""
    app = FastAPI(
        title="edge-autotune",
        version=autotune.__version__,
        description="Search for the best compressed version of a model for the devices you own.",
        lifespan=_live,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.context = context
    app.state.identities = Identities(
        window_s=views.ONLINE_HEARTBEATS * context.settings.heartbeat_s
    )
    app.state.known_agents = KnownAgents(context.repository, context.broadcast)
    app.state.attendance = Attendance(
        context.repository,
        ttl_s=context.settings.lease_ttl_s,
        heartbeat_s=context.settings.heartbeat_s,
        gather_s=min(GATHER_S, context.settings.heartbeat_s / 20),
    )
    app.include_router(_health)
    app.include_router(agents.router, responses=problem_responses(422))
    for router in USER_ROUTES:
        app.include_router(
            router,
            dependencies=[Depends(require_user)],
            responses=problem_responses(401, 422),
        )
    app.add_middleware(BodyLimit, limit_of=partial(_body_limit, context.settings))
    app.add_middleware(RequestNames)
    install_problem_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _body_limit(settings: Settings, method: str, path: str) -> int:
    if method == "PUT" and path.startswith(uploads.router.prefix):
        return settings.max_upload_bytes
    if path.endswith("/verify"):
        return fronts.MAX_MODEL_BYTES
    if path == f"{agents.router.prefix}/results":
        return agents.MAX_RESULT_BYTES
    return MAX_JSON_BYTES


@contextlib.asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    context: ServiceContext = app.state.context
    context.broadcast.listen(context.runner.wake)
    await run_in_threadpool(context.runner.start)
    expiry = asyncio.create_task(_expire_leases(context))
    ending = asyncio.create_task(_stop_runner_at_the_end(context))
    try:
        yield
    finally:
        context.broadcast.close()
        expiry.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await expiry
        await ending


async def _stop_runner_at_the_end(context: ServiceContext) -> None:
    """Stop the runner as soon as the service is told to end.

    Not only after the last request: a verification waits for the runner.
    """
    await context.broadcast.closed()
    await run_in_threadpool(context.runner.stop)


async def _expire_leases(context: ServiceContext) -> None:
    """Take back leases that ran out, for as long as the service lives."""
    while True:
        await asyncio.sleep(EXPIRY_S)
        try:
            lost = await run_in_threadpool(
                context.repository.expire_leases,
                max_attempts=context.settings.measurement_attempts,
            )
        except StorageError as error:
            _log.warning("leases could not be checked: %s", error)
            continue
        except Exception:  # noqa: BLE001 - without this loop no lease would run out any more
            _log.exception("leases could not be checked")
            continue
        for record in lost:
            _log.warning(
                "the lease of measurement %s ran out (attempt %d): %s",
                record.id,
                record.attempts,
                record.state.value,
            )


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the job file's schema, which the submit route reads by itself."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        template = "#/components/schemas/{model}"
        for model in (JobSpec, Problem):
            schema = model.model_json_schema(ref_template=template)
            schemas |= schema.pop("$defs", {})
            schemas[model.__name__] = schema
        # The route takes any object, so that `parse_job` can name the nearest known key.
        body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
        body["application/json"]["schema"] = {"$ref": template.format(model=JobSpec.__name__)}
        app.openapi_schema = document
    return app.openapi_schema
