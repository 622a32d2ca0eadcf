"""A real service in this process: the application behind uvicorn, SQLite, a runner that waits.

Only the runner is a stand-in: what a job becomes is for the test to write into the
repository, as the real runner would.
"""

import contextlib
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from autotune.api_types import Job
from autotune.client import Client
from autotune.search.verification import VerificationOutcome
from autotune.service.app import create_app
from autotune.service.broadcast import Broadcast
from autotune.service.context import ServiceContext
from autotune.service.security import local_token
from autotune.settings import Settings
from autotune.spec import parse_job
from device_agents.protocol import PROTOCOL_VERSION, MeasurementRequest, Outcome
from search_spaces import RuntimeOptions
from storage.artifacts import ArtifactStore
from storage.database import open_database
from storage.records import (
    DeviceRecord,
    JobRecord,
    JobState,
    MeasurementRecord,
    MeasurementState,
    TrialState,
)
from storage.repository import Repository
from tests.unit import fabricated_job


def job_document(**changes: Any) -> dict[str, Any]:
    """A job that any service accepts: its model is a name and its data is this very folder."""
    return {
        "version": 1,
        "model": {"source": "torchvision:mobilenet_v2"},
        "data": {"evaluation": f"imagefolder:{Path(__file__).parent}"},
        **changes,
    }


class WaitingRunner:
    """Runs no job; notes what it is told, and verifies with figures made up in advance."""

    def __init__(self) -> None:
        self.is_running = False
        self.topics: list[str] = []
        self.verified: list[bytes] = []
        self.verified_as: list[str | None] = []
        self.verification: VerificationOutcome | None = None
        self.failure: Exception | None = None

    def start(self) -> None:
        self.is_running = True

    def stop(self) -> None:
        self.is_running = False

    def wake(self, topic: str) -> None:
        self.topics.append(topic)

    def end_cancelled(self, job_id: str) -> None:
        """No job ends here."""

    def verify(
        self, job: JobRecord, model: bytes, *, trial: str | None = None
    ) -> VerificationOutcome:
        self.verified.append(model)
        self.verified_as.append(trial)
        if self.failure is not None:
            raise self.failure
        assert self.verification is not None
        return self.verification


@dataclass
class RunningService:
    """The service's address and its insides."""

    url: str
    token: str
    context: ServiceContext
    runner: WaitingRunner
    client: Client
    _agents: list[httpx.Client] = field(default_factory=list)

    @property
    def repository(self) -> Repository:
        return self.context.repository

    def http(self, token: str | None = None) -> httpx.Client:
        """A bare HTTP client with that token, or with none."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        opened = httpx.Client(base_url=self.url, headers=headers, timeout=20, trust_env=False)
        self._agents.append(opened)
        return opened

    def submit(self, **changes: Any) -> Job:
        """A job submitted over HTTP; `changes` are keys of its document."""
        return self.client.submit(parse_job(job_document(**changes)))

    def enrol(self, name: str | None = None) -> tuple[httpx.Client, DeviceRecord]:
        """A device that enrolled over HTTP; the HTTP client carries its agent's key."""
        token = self.client.enrolment_token().token
        description = fabricated_job.device().description
        reply = self.http().post(
            "/v1/agent/enrol",
            json=versioned(
                token=token,
                name=name or f"pi-{secrets.token_hex(4)}",
                device=description.model_dump(mode="json"),
            ),
        )
        assert reply.status_code == 201, reply.text
        key = reply.json()["agent_key"]
        return self.http(key), self.repository.get_device(reply.json()["device_id"])

    def finished_job(self, device: DeviceRecord | None = None) -> JobRecord:
        """A finished job with forty trials; trial 7 is the winner and its artifact is stored."""
        inventory = fabricated_job.inventory()
        record = fabricated_job.job(inventory)
        job = self.repository.create_job(spec=record.spec, name=record.name)
        ids = {}
        for made in fabricated_job.trials(inventory):
            # More threads make candidates differ that happen to be alike.
            runtime = RuntimeOptions(threads=1 + made.number)
            trial = self.repository.add_trial(
                job.id, replace(made.candidate, runtime=runtime), proposed_by=made.proposed_by
            )
            ids[made.id] = trial.id
            self.repository.update_trial(
                trial.id,
                state=TrialState.FINISHED,
                outcome=made.outcome,
                reason=made.reason,
                artifact_sha256=made.artifact_sha256,
                artifact_size_bytes=made.artifact_size_bytes,
                compression=made.compression,
                accuracy=made.accuracy,
                latency=made.latency,
                held_out_accuracy=made.held_out_accuracy,
                confirmed_latency=made.confirmed_latency,
            )
        self.context.artifacts.put(fabricated_job.linear_model())
        result = dict(record.result or {})
        for key in ("winner", "fp32_trial", "int8_trial"):
            result[key] = ids[result[key]]
        return self.repository.update_job(
            job.id,
            state=JobState.FINISHED,
            phase="finished",
            inventory=inventory,
            sensitivity=record.sensitivity,
            device_id=device.id if device else None,
            latency_budget_ns=record.latency_budget_ns,
            reference_latency_ns=record.reference_latency_ns,
            result=result,
            started_at=record.started_at,
            finished_at=record.finished_at,
        )

    def queue_measurement(self, device: DeviceRecord) -> MeasurementRecord:
        """A measurement for the device, of a job of its own."""
        job = self.repository.create_job(spec=job_document(), name="measured")
        return self.repository.enqueue_measurement(
            job_id=job.id, trial_id=None, device_id=device.id, request=request()
        )

    def verification(self, job: JobRecord, device: DeviceRecord) -> VerificationOutcome:
        """What a runner that verified the job's model would say."""
        latency = fabricated_job.latency(1.1e6)
        return VerificationOutcome(
            artifact_sha256="a" * 64,
            device=device,
            measurement=MeasurementRecord(
                id="m-verify",
                job_id=job.id,
                trial_id=None,
                device_id=device.id,
                request=request(),
                state=MeasurementState.DONE,
                fencing_token=1,
                attempts=1,
                outcome=Outcome.OK,
                report=latency,
                created_at=fabricated_job.START,
            ),
            held_out=fabricated_job.accuracy(0.94, split="held_out", n=600),
        )


def versioned(**fields: Any) -> dict[str, Any]:
    """An agent's message, as JSON."""
    return {"protocol_version": PROTOCOL_VERSION, **fields}


def request() -> MeasurementRequest:
    """A measurement request with an id of its own."""
    return MeasurementRequest.model_validate(
        {
            "measurement_id": f"m-{secrets.token_hex(8)}",
            "artifact": {"sha256": "a" * 64, "size_bytes": 10},
            "reference": {"sha256": "b" * 64, "size_bytes": 20},
            "runtime": {},
            "plan": {},
        }
    )


@contextlib.contextmanager
def running_service(data_dir: Path, **changes: Any) -> Iterator[RunningService]:
    """The service, until the block ends; `changes` are settings."""
    settings = Settings(data_dir=data_dir, port=0, **changes)
    broadcast, runner = Broadcast(), WaitingRunner()
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(open_database(settings.database))
        repository = Repository(database, notify=broadcast.publish)
        context = ServiceContext(
            settings=settings,
            repository=repository,
            artifacts=ArtifactStore(settings.artifacts_dir),
            broadcast=broadcast,
            runner=runner,
        )
        token = local_token(repository, settings.token_file).token
        url = stack.enter_context(_listening(context))
        client = stack.enter_context(Client(url, token))
        service = RunningService(url, token, context, runner, client)
        stack.callback(lambda: [opened.close() for opened in service._agents])
        yield service


@contextlib.contextmanager
def _listening(context: ServiceContext) -> Iterator[str]:
    config = uvicorn.Config(create_app(context), port=0, log_level="critical")
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def startup_and_tell(sockets: Any = None) -> None:
        try:
            await startup(sockets=sockets)
        finally:
            started.set()

    server.startup = startup_and_tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, name="service", daemon=True)
    thread.start()
    assert started.wait(30)
    assert server.started
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        context.broadcast.close()
        server.should_exit = True
        thread.join(30)
