"""The main job with real processes: service, Ray workers, agent, all on a tiny trained model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from autotune.cli.children import Child, wait_until
from autotune.client import Client
from autotune.errors import AutotuneError
from autotune.export.bundle import read_bundle
from autotune.spec import read_job
from storage.database import open_database
from storage.records import TrialState
from storage.repository import Repository
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _job_code_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job names `tests.tiny:Residual`; services, workers and agents inherit the path."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _start_service(data_dir: Path, port: int) -> Child:
    command = [sys.executable, "-m", "autotune.cli", "serve", "--port", str(port)]
    command += ["--data-dir", str(data_dir), "--trust-job-code"]
    service = Child("service", command, log=data_dir / "service.log")

    def answers() -> bool:
        service.require_alive()
        token_file = data_dir / "token"
        if not token_file.exists():
            return False
        token = token_file.read_text().strip()
        with Client(f"http://127.0.0.1:{port}", token) as client, suppress(AutotuneError):
            return client.health().status == "ok"
        return False

    assert wait_until(answers, timeout_s=60), service.tail()
    return service


def _start_agent(data_dir: Path, url: str, token: str) -> Child:
    command = [sys.executable, "-m", "device_agents", "run", "--service", url, "--token", token]
    command += ["--state-dir", str(data_dir / "agent"), "--name", "local"]
    return Child("agent", command, log=data_dir / "agent.log")


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in reversed(started):
        child.stop()


def test_tune_takes_a_job_from_its_file_to_a_verified_bundle(tmp_path: Path) -> None:
    job = tiny.write_job(tmp_path)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "autotune.cli", "tune", str(job), "--trust-job-code"),
            *("--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "bundle")),
            *("--report", str(tmp_path / "report.html")),
        ],
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert ran.returncode == 0, ran.stderr
    for heading in ("winner", "FP32", "INT8"):
        assert heading in ran.stdout
    for line in ("phase: search", "trial #0 (baseline)", "verified"):
        assert line in ran.stderr + ran.stdout
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.model
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert "http-equiv" not in report and "<script src" not in report


def test_a_service_killed_in_the_middle_of_a_job_loses_and_repeats_nothing(
    tmp_path: Path, children: list[Child]
) -> None:
    data_dir, port = tmp_path / "data", _free_port()
    children.append(_start_service(data_dir, port))
    with Client(f"http://127.0.0.1:{port}", (data_dir / "token").read_text().strip()) as client:
        children.append(_start_agent(data_dir, client.url, client.enrolment_token().token))
        spec = read_job(tiny.write_job(tmp_path))
        job = client.submit(spec)

        def finished() -> int:
            return sum(trial.state == "finished" for trial in client.trials(job.id))

        assert wait_until(lambda: finished() >= 4, timeout_s=240), client.job(job.id)
        os.kill(children[0].pid, signal.SIGKILL)
        before = {}
        children[0].stop()
        with open_database(f"sqlite:///{data_dir / 'autotune.db'}") as database:
            for trial in Repository(database).list_trials(job.id):
                if trial.state is TrialState.FINISHED:
                    before[trial.id] = trial
        children[0] = _start_service(data_dir, port)
        ended = client.wait(job.id, timeout_s=240)
    assert ended.state == "finished", ended.reason
    for child in reversed(children):
        child.stop()
    with open_database(f"sqlite:///{data_dir / 'autotune.db'}") as database:
        repository = Repository(database)
        trials = {trial.id: trial for trial in repository.list_trials(job.id)}
        measured = Counter(
            m.trial_id
            for m in repository.list_measurements(job.id)
            if m.request.plan.kind == "screening" and m.outcome == "ok"
        )
    assert len(before) >= 4
    assert len(trials) == spec.search.trials
    assert all(trials[i].latency == trial.latency for i, trial in before.items())
    # A race that ended early may be completed later, on the samples that it left out.
    full = {i: t.accuracy for i, t in before.items() if t.accuracy and not t.accuracy.stopped_early}
    assert full
    assert all(trials[i].accuracy == accuracy for i, accuracy in full.items())
    assert max(measured.values()) == 1
