"""One repository contract, three places to keep it: SQLite file, SQLite in memory, PostgreSQL.

The contracts over HTTP share a running service, one per module.

The PostgreSQL server is a throw-away cluster of this test session: made in a temporary
folder, reached through a Unix socket in it, run by a user that is not root.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy

from device_agents.protocol import (
    ArtifactReference,
    Block,
    Conditions,
    DeviceDescription,
    LatencyReport,
    MeasurementPlan,
    MeasurementRequest,
    MeasurementResult,
    Outcome,
    RuntimeBuild,
    RuntimeRequest,
)
from search_spaces import INT8, Candidate
from storage.database import open_database
from storage.records import AgentRecord, DeviceRecord, JobRecord, MeasurementRecord
from storage.repository import Repository
from storage.tables import Base
from tests.running_service import RunningService, running_service

START = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
BACK_ENDS = ("sqlite", "memory", "postgresql")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of an empty PostgreSQL server of this session."""
    binaries = _server_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server binaries (initdb, pg_ctl) are not installed")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    run = _runner_for(folder)
    data = str(folder / "data")
    try:
        run([str(binaries / "initdb"), "-D", data, "-U", "autotune", "-A", "trust", "-E", "UTF8"])
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        control = [str(binaries / "pg_ctl"), "-D", data, "-w"]
        run([*control, "-o", options, "-l", str(folder / "log"), "start"])
        try:
            yield f"postgresql+psycopg://autotune@/postgres?host={folder}"
        finally:
            run([*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def empty_postgresql(postgresql_server: str) -> str:
    """The server's one database, without any table."""
    engine = sqlalchemy.create_engine(postgresql_server)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    engine.dispose()
    return postgresql_server


@pytest.fixture(params=BACK_ENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without rows, on each back end in turn."""
    if request.param == "memory":
        return "sqlite://"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'autotune.db'}"
    url: str = request.getfixturevalue("postgresql_server")
    _truncate(url)
    return url


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    """A repository on a fake clock, and what a test puts into it."""
    clock, topics = Clock(), []
    with open_database(database_url) as database:
        yield World(
            repository=Repository(database, notify=topics.append, clock=clock),
            clock=clock,
            topics=topics,
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One for all of a module: a test meets its own jobs and devices, not an empty database."""
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def finished(service: RunningService) -> JobRecord:
    """A finished job, to look at only."""
    _, device = service.enrol()
    return service.finished_job(device)


@dataclass
class Clock:
    """A clock that moves by hand."""

    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class World:
    """A repository and short ways to fill it."""

    repository: Repository
    clock: Clock
    topics: list[str] = field(default_factory=list)
    enrolled: int = 0

    def job(self, name: str = "digits") -> JobRecord:
        return self.repository.create_job(spec={"model": "torchvision:resnet18"}, name=name)

    def agent(
        self,
        name: str = "pi",
        *,
        fingerprint: str = "f" * 64,
        host_id: str = "h" * 64,
        pool: str | None = None,
    ) -> tuple[DeviceRecord, AgentRecord]:
        self.enrolled += 1
        self.repository.add_enrolment_token(f"token-{self.enrolled}", pool=pool, expires_in_s=60)
        return self.repository.enrol(
            f"token-{self.enrolled}",
            name=name,
            description=description(fingerprint=fingerprint, host_id=host_id),
            agent_key_hash=f"key-{self.enrolled}",
        )

    def enqueue(self, job: JobRecord, device: DeviceRecord, name: str) -> MeasurementRecord:
        return self.repository.enqueue_measurement(
            job_id=job.id, trial_id=None, device_id=device.id, request=measurement_request(name)
        )

    def lease(self, agent: AgentRecord, *, ttl_s: float = 30.0) -> MeasurementRecord | None:
        return self.repository.lease_measurement(
            device_id=agent.device_id, agent_id=agent.id, ttl_s=ttl_s
        )

    def leased(self, name: str = "m-1") -> tuple[AgentRecord, MeasurementRecord]:
        """A job, a device, and one measurement leased by its agent."""
        device, agent = self.agent()
        self.enqueue(self.job(), device, name)
        lease = self.lease(agent)
        assert lease is not None
        return agent, lease


def candidate(n: int) -> Candidate:
    """A candidate of its own for every number."""
    return Candidate(precisions={f"conv{n}": INT8}, prune_ratios={"conv1": 0.25})


def description(
    *, fingerprint: str = "f" * 64, hostname: str = "raspberrypi", host_id: str = "h" * 64
) -> DeviceDescription:
    return DeviceDescription(
        hostname=hostname,
        host_id=host_id,
        architecture="aarch64",
        cpu_model="Cortex-A76",
        cpu_flags=("asimddp",),
        logical_cpus=4,
        memory_bytes=8_000_000_000,
        operating_system="Debian 12",
        kernel="6.6",
        python="3.11.7",
        agent_version="0.1.0",
        runtimes=(
            RuntimeBuild(name="onnxruntime", version="1.31.1", providers=("CPUExecutionProvider",)),
        ),
        fingerprint=fingerprint,
    )


def measurement_request(name: str) -> MeasurementRequest:
    reference = ArtifactReference(sha256="a" * 64, size_bytes=12)
    return MeasurementRequest(
        measurement_id=name,
        artifact=reference,
        reference=reference,
        runtime=RuntimeRequest(),
        plan=MeasurementPlan(),
    )


def latency_report(*, p50_ns: float = 1.5e6) -> LatencyReport:
    return LatencyReport(
        p50_ns=p50_ns,
        p50_low_ns=p50_ns * 0.99,
        p50_high_ns=p50_ns * 1.01,
        p90_ns=p50_ns * 1.1,
        p99_ns=p50_ns * 1.3,
        ratio=0.5,
        ratio_low=0.49,
        ratio_high=0.51,
        reference_p50_ns=3.0e6,
        reference_latency_ns=3.0e6,
        n_samples=4,
        n_blocks=2,
        is_steady=True,
        wall_s=0.1,
        runtime=RuntimeRequest(),
        runtime_version="1.31.1",
        before=Conditions(load_1m=0.1, missing={"governor": "no cpufreq"}),
        after=Conditions(temperature_celsius=51.5),
        blocks=(
            Block(subject="candidate", samples_ns=(1_500_001, 1_500_002)),
            Block(subject="reference", samples_ns=(3_000_001, 2_999_999), sitting=1),
        ),
    )


def result_of(lease: MeasurementRecord, **changes: object) -> MeasurementResult:
    """An `ok` result for this lease."""
    result = MeasurementResult(
        lease_id=str(lease.lease_id),
        fencing_token=lease.fencing_token,
        measurement_id=lease.id,
        outcome=Outcome.OK,
        report=latency_report(),
    )
    return result.model_copy(update=changes)


def _server_binaries() -> Path | None:
    folders = [Path(path).parent for path in [shutil.which("initdb")] if path]
    config = shutil.which("pg_config")
    if config is not None:
        found = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        folders.append(Path(found.stdout.strip()))
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(installed, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0))
    complete = [f for f in folders if (f / "initdb").exists() and (f / "pg_ctl").exists()]
    return complete[-1] if complete else None


def _runner_for(folder: Path) -> Callable[[Sequence[str]], None]:
    """Run a command as the folder's owner; the server refuses to run as root."""
    identity: dict[str, object] = {}
    if os.geteuid() == 0:
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = known.get("postgres") or known["nobody"]
        os.chown(folder, user.pw_uid, user.pw_gid)
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def run(command: Sequence[str]) -> None:
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **identity,
        )

    return run


def _truncate(url: str) -> None:
    open_database(url).close()
    tables = ", ".join(Base.metadata.tables)
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"TRUNCATE {tables} RESTART IDENTITY"))
    engine.dispose()
