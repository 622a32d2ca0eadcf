"""What the routes work with: one object per running service.

Owns nothing itself: it names the parts. `server.py` makes it from settings; tests make it
from a database in memory and a runner of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Protocol

from fastapi import Depends, Request

from autotune.service.broadcast import Broadcast
from autotune.settings import Settings
from storage.artifacts import ArtifactStore
from storage.records import JobRecord
from storage.repository import Repository

if TYPE_CHECKING:
    from autotune.search.verification import VerificationOutcome


class JobRunner(Protocol):
    """The part of `autotune.search.runner.Runner` that the service needs."""

    def start(self) -> None:
        """Begin to take jobs."""

    def stop(self) -> None:
        """Stop taking jobs; returns when the one under way is put down."""

    def wake(self, topic: str) -> None:
        """Something changed."""

    def end_cancelled(self, job_id: str) -> None:
        """End a cancelled job that is not the one under way, which ends by itself."""

    def verify(
        self, job: JobRecord, model: bytes, *, trial: str | None = None
    ) -> VerificationOutcome:
        """Measure a model of the job again, on its device and on held-out data."""


def utc_now() -> datetime:
    """The time, timezone-aware."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceContext:
    """The parts of a service."""

    settings: Settings
    repository: Repository
    artifacts: ArtifactStore
    broadcast: Broadcast
    runner: JobRunner
    clock: Callable[[], datetime] = utc_now


async def context_of(request: Request) -> ServiceContext:
    """The context of the service that answers this request.

    Asynchronous, because FastAPI would call a plain function in its thread pool: two switches
    between threads in every request, for one attribute.
    """
    context: ServiceContext = request.app.state.context
    return context


Context = Annotated[ServiceContext, Depends(context_of)]
