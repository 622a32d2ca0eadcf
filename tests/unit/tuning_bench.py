"""Jobs run on a real repository, with instant workers and an instant agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.search.fleet import Fleet, QuietWindow
from autotune.search.host import Host
from autotune.search.interruption import Stopped
from autotune.search.tuning import Tuning
from autotune.spec import parse_job
from storage.artifacts import ArtifactStore
from storage.database import open_database
from storage.records import JobRecord
from storage.repository import Repository
from tests.unit.fakes import FakeAgent, FakePool


class Bench:
    """A repository, an artifact store, fakes, and a way to run a job."""

    def __init__(self, folder: Path, repository: Repository) -> None:
        self.repository = repository
        self.artifacts = ArtifactStore(folder / "artifacts")
        self.fleet = Fleet(repository, host_id="edge", window=QuietWindow())
        self.pools: list[FakePool] = []
        self.made_room: list[bool] = []
        self.make_pool: Callable[[], FakePool] = FakePool
        self.should_stop: Callable[[], bool] = lambda: False
        x = np.random.default_rng(0).normal(size=(100, 1, 8, 8)).astype(np.float32)
        np.savez(folder / "data.npz", x=x, y=np.arange(100) % 10)
        self._data = f"npz:{folder / 'data.npz'}"

    def agent(self, **changes: Any) -> FakeAgent:
        return FakeAgent(self.repository, self.artifacts.read, **changes)

    def job(self, **changes: Any) -> JobRecord:
        spec: dict[str, Any] = {
            "version": 1,
            "model": {"source": "onnx:unused.onnx"},
            "data": {"evaluation": self._data, "training": self._data},
            "latency_budget": "0.65x",
            "max_accuracy_drop": 0.01,
            "search": {"trials": 14},
        }
        return self.repository.create_job(spec={**spec, **changes}, name="job")

    def run(self, job: JobRecord) -> JobRecord:
        def make_pool(*_: Any) -> Any:
            self.pools.append(self.make_pool())
            return self.pools[-1]

        record = self.repository.get_job(job.id)
        devices = [self.fleet.find_device(named) for named in parse_job(record.spec).targets]
        host = Host(
            repository=self.repository,
            artifacts=self.artifacts,
            fleet=self.fleet,
            window=QuietWindow(),
            trust_job_code=False,
            make_pool=make_pool,
            should_stop=self.should_stop,
            make_room=lambda: self.made_room.append(True),
        )
        return Tuning(host, record, tuple(d for d in devices if d is not None)).run()

    def interrupt(self, job: JobRecord, agent: FakeAgent, *, after: int) -> None:
        """Run the job in a service that goes down after so many measurements."""
        agent.limit = after
        self.should_stop = lambda: len(agent.measured) >= after
        with pytest.raises(Stopped):
            self.run(job)
        agent.limit, self.should_stop = None, lambda: False


@contextmanager
def benched(folder: Path) -> Iterator[Bench]:
    """A bench on a database of its own, which wakes its fleet."""
    with open_database(f"sqlite:///{folder / 'test.db'}") as database:
        listeners: list[Callable[[], None]] = []
        repository = Repository(database, notify=lambda topic: [f() for f in listeners] and None)
        made = Bench(folder, repository)
        listeners.append(made.fleet.wake)
        yield made
