"""The job loop: which job runs, which one waits and is told why, which one is cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.search.runner import Runner
from storage.artifacts import ArtifactStore
from storage.database import open_database
from storage.errors import DatabaseUnavailable
from storage.records import JobRecord, JobState
from storage.repository import Repository
from tests.unit.fakes import FakeAgent, FakePool


class Loop:
    """A runner with instant workers, on a database in memory."""

    def __init__(self, folder: Path, repository: Repository) -> None:
        self.repository = repository
        self.artifacts = ArtifactStore(folder / "artifacts")
        self.runner = Runner(
            repository,
            self.artifacts,
            data_dir=folder,
            workers=1,
            make_pool=lambda spec, splits, device: FakePool(),  # type: ignore[arg-type,return-value]
        )
        x = np.zeros((60, 1, 8, 8), np.float32)
        np.savez(folder / "data.npz", x=x, y=np.arange(60) % 10)
        self._data = f"npz:{folder / 'data.npz'}"

    def job(self, **changes: Any) -> JobRecord:
        spec = {
            "model": {"source": "onnx:unused.onnx"},
            "data": {"evaluation": self._data},
            "search": {"trials": 3, "prune_ratios": [0]},
        }
        return self.repository.create_job(spec={**spec, **changes}, name="job")

    def wait_for(self, job: JobRecord, *states: JobState) -> JobRecord:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            record = self.repository.get_job(job.id)
            if record.state in states:
                return record
            threading.Event().wait(0.02)
        raise AssertionError(f"job is {record.state} ({record.reason}), not {states}")


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    listeners: list[Callable[[str], None]] = []

    def notify(topic: str) -> None:
        for listener in listeners:
            listener(topic)

    with open_database(f"sqlite:///{tmp_path / 'test.db'}") as database:
        made = Loop(tmp_path, Repository(database, notify=notify))
        listeners.append(made.runner.wake)
        made.runner.start()
        yield made
        made.runner.stop()


def test_a_job_for_an_unknown_device_waits_and_names_it(loop: Loop) -> None:
    waiting = loop.wait_for(loop.job(device="pi5"), JobState.WAITING_FOR_DEVICE)
    assert "no device or pool is called 'pi5'" in (waiting.reason or "")


def test_a_job_on_several_devices_waits_for_those_that_are_missing_and_names_them(
    loop: Loop,
) -> None:
    with FakeAgent(loop.repository, loop.artifacts.read, name="gateway"):
        waiting = loop.wait_for(loop.job(device=["gateway", "pi5"]), JobState.WAITING_FOR_DEVICE)
    assert "pi5" in (waiting.reason or "") and "gateway" not in (waiting.reason or "")


def test_a_job_goes_on_when_its_device_appears(loop: Loop) -> None:
    job = loop.job(device="late")
    loop.wait_for(job, JobState.WAITING_FOR_DEVICE)
    with FakeAgent(loop.repository, loop.artifacts.read, name="late"):
        assert loop.wait_for(job, JobState.FINISHED).result is not None


def test_a_job_that_waits_does_not_hold_up_the_next_one(loop: Loop) -> None:
    first = loop.job(device="nowhere")
    loop.wait_for(first, JobState.WAITING_FOR_DEVICE)
    with FakeAgent(loop.repository, loop.artifacts.read, name="here"):
        loop.wait_for(loop.job(device="here"), JobState.FINISHED)
    assert loop.repository.get_job(first.id).state is JobState.WAITING_FOR_DEVICE


def test_a_job_that_waits_can_be_cancelled(loop: Loop) -> None:
    job = loop.job(device="nowhere")
    loop.wait_for(job, JobState.WAITING_FOR_DEVICE)
    loop.repository.request_cancel(job.id)
    assert loop.wait_for(job, JobState.CANCELLED).result is None


def test_a_job_that_is_cancelled_behind_another_ends_at_once(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_inside, is_free = threading.Event(), threading.Event()
    inspect = FakePool._inspect

    def wait_inside(pool: FakePool) -> Any:
        is_inside.set()
        is_free.wait(30)
        return inspect(pool)

    monkeypatch.setattr(FakePool, "_inspect", wait_inside)
    with FakeAgent(loop.repository, loop.artifacts.read):
        first, second = loop.job(), loop.job()
        assert is_inside.wait(30)
        for job in (first, second):
            loop.repository.request_cancel(job.id)
            loop.runner.end_cancelled(job.id)
        states = [loop.repository.get_job(job.id).state for job in (first, second)]
        is_free.set()
        loop.wait_for(first, JobState.CANCELLED)
    assert states == [JobState.RUNNING, JobState.CANCELLED]


def test_a_job_that_another_service_runs_is_left_to_it(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = loop.job(device="nowhere")
    loop.wait_for(elsewhere, JobState.WAITING_FOR_DEVICE)
    claim = loop.repository.claim_job
    monkeypatch.setattr(
        loop.repository,
        "claim_job",
        lambda job_id: None if job_id == elsewhere.id else claim(job_id),
    )
    with FakeAgent(loop.repository, loop.artifacts.read, name="nowhere"):
        loop.repository.request_cancel(elsewhere.id)
        loop.runner.end_cancelled(elsewhere.id)
        loop.wait_for(loop.job(device="nowhere"), JobState.FINISHED)
    assert loop.repository.get_job(elsewhere.id).state is JobState.WAITING_FOR_DEVICE


def test_an_error_nobody_foresaw_leaves_the_best_of_what_was_measured(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.search.tuning.teach", lambda *_, **__: 1 / 0)
    with FakeAgent(loop.repository, loop.artifacts.read):
        failed = loop.wait_for(loop.job(), JobState.FAILED)
    assert "ZeroDivisionError" in (failed.reason or "")
    assert failed.result is not None and failed.result["winner"]


def test_an_error_nobody_foresaw_ends_that_job_only(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakePool, "_inspect", lambda self: 1 / 0)
    with FakeAgent(loop.repository, loop.artifacts.read):
        failed = loop.wait_for(loop.job(), JobState.FAILED)
        assert "ZeroDivisionError" in (failed.reason or "")
        monkeypatch.undo()
        loop.wait_for(loop.job(), JobState.FINISHED)


@pytest.mark.parametrize(
    "failure", [DatabaseUnavailable("gone for a moment"), ZeroDivisionError("a defect")]
)
def test_what_fails_once_between_jobs_does_not_end_the_loop(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    real, failures = loop.repository.list_jobs, [failure]

    def list_jobs() -> list[JobRecord]:
        if failures:
            raise failures.pop()
        return real()

    monkeypatch.setattr(loop.repository, "list_jobs", list_jobs)
    with FakeAgent(loop.repository, loop.artifacts.read):
        loop.wait_for(loop.job(), JobState.FINISHED)
    assert failures == []
