"""An emulated arm64 device beside this machine: one job on both, from enrolment to the matrix.

`AUTOTUNE_ARM64_TOOL` names the script that emulates the devices (Debian arm64 user space under
qemu, a network namespace each); it needs root on x86-64 Debian. Without it, or where it cannot
work, the test is skipped and says why. Times under emulation mean something against each
other only, and that is all that is looked at here.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.api_types import Trial
from autotune.client import Client
from autotune.export.bundle import read_bundle
from autotune.spec import parse_job
from tests.benchmarks.models import fp32_model, images

pytestmark = [pytest.mark.arm64, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
MODEL, SIZE, SAMPLES = "mobilenet_v3_small", 96, 120
START_S = 400.0
JOB_S = 1300.0
"""Enrolling includes a benchmark of a minute; a busy machine takes several times as long."""


@dataclass
class World:
    """A service that both devices reach, its client, and the finished job."""

    client: Client
    job_id: str

    def front(self, device: str) -> list[Trial]:
        return self.client.front(self.job_id, device=device).trials

    def device_id(self, name: str) -> str:
        return self.client.device(name).id


@pytest.fixture(scope="module")
def tool() -> Callable[..., list[str]]:
    """The command line of the emulation tool, set up."""
    path = os.environ.get("AUTOTUNE_ARM64_TOOL")
    if not path:
        pytest.skip("AUTOTUNE_ARM64_TOOL does not name the script that emulates arm64 devices")
    for words in (["setup"], ["install", "--requirements", "click"]):
        ended = subprocess.run(
            ["bash", path, *words], capture_output=True, text=True, check=False, timeout=600
        )
        if ended.returncode:
            pytest.skip(f"no emulated arm64 device: {(ended.stderr or ended.stdout).strip()}")
    return lambda *words: ["bash", path, *words]


@pytest.fixture(scope="module")
def world(
    tool: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("arm64")
    name, number = f"edge{os.getpid()}", os.getpid() % 254 + 1
    with ExitStack() as stack:
        _call(tool("net-up", name, str(number)))
        stack.callback(_call, tool("net-down", name))
        client = stack.enter_context(_serve(stack, folder, host=f"10.77.{number}.1"))
        here = _agent(client, "x86", folder / "x86")
        _start(stack, [sys.executable, *here], folder / "x86.log")
        there = _agent(client, "arm64", Path("/root/agent"))
        source = ROOT / "device_agents"
        words = ["run", name, "--bind", f"{source}:/opt/agent/device_agents"]
        words += ["--env", "PYTHONPATH=/opt/site:/opt/agent", "--env", "PYTHONDONTWRITEBYTECODE=1"]
        _start(stack, tool(*words, "--", "python3.11", *there), folder / "arm64.log")
        _wait(lambda: sum(d.is_online for d in client.devices()) == 2, folder)
        job = client.submit(parse_job(_job(folder)))
        finished = client.wait(job.id, timeout_s=JOB_S)
        assert finished.state == "finished", (finished.reason, finished.notices)
        yield World(client=client, job_id=job.id)


def _job(folder: Path) -> dict[str, Any]:
    """Labels are what the FP32 model itself answers, so that accuracy is agreement with it."""
    import onnxruntime

    x, model = images(SAMPLES, SIZE), fp32_model(MODEL, SIZE)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    logits = [session.run(None, {session.get_inputs()[0].name: row[None]})[0] for row in x]
    np.savez(folder / "data.npz", x=x, y=np.concatenate(logits).argmax(axis=1).astype(np.int64))
    return {
        "name": MODEL,
        "model": {"source": f"onnx:{model.resolve()}"},
        "data": {"evaluation": f"npz:{folder / 'data.npz'}", "calibration_samples": 16},
        "device": ["x86", "arm64"],
        # The most accurate within the budget wins: FP32 itself on x86, where INT8 gains little or
        # nothing; on arm64 only INT8, which takes a third of FP32's time there, is within it.
        "latency_budget": {"x86": "1.5x", "arm64": "0.6x"},
        "search": {"precisions": ["fp32", "w8a8"], "prune_ratios": [0.0], "trials": 3},
        # Small images, because an inference of 224 pixels takes 0.3 s under emulation, and
        # several times that on a busy machine.
        "measurement": {
            "target_half_width": 0.05,
            "time_cap_s": 45,
            "confirmation_half_width": 0.05,
            "confirmation_time_cap_s": 45,
            "timeout_s": 400,
        },
    }


def _serve(stack: ExitStack, folder: Path, *, host: str) -> Client:
    ready = folder / "ready.json"
    command = [sys.executable, "-m", "autotune.cli", "serve", "--host", host, "--port", "0"]
    command += ["--insecure", "--workers", "1", "--data-dir", str(folder / "data")]
    _start(stack, [*command, "--ready-file", str(ready)], folder / "service.log")
    _wait(ready.exists, folder)
    said = json.loads(ready.read_text())
    return Client(said["url"], said["token"])


def _agent(client: Client, name: str, state: Path) -> list[str]:
    token = client.enrolment_token().token
    words = ["-m", "device_agents", "run", "--service", client.url, "--token", token]
    return [*words, "--name", name, "--state-dir", str(state)]


def _start(stack: ExitStack, command: list[str], log: Path) -> None:
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    stack.callback(process.wait, timeout=60)
    stack.callback(process.send_signal, signal.SIGTERM)


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _wait(condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def test_the_device_enrolled_as_what_it_is(world: World) -> None:
    device = world.client.device("arm64")
    assert device.description["architecture"] == "aarch64"
    assert "asimddp" in device.description["cpu_flags"]
    assert device.description["host_id"] != world.client.device("x86").description["host_id"]
    assert world.client.device("x86").description["architecture"] == platform.machine()


def test_each_device_measured_every_trial_in_the_file_for_its_kernels(world: World) -> None:
    job = world.client.job(world.job_id)
    ok = [trial for trial in world.client.trials(world.job_id) if trial.outcome == "ok"]
    assert len(ok) == job.progress.trials_finished
    for trial in ok:
        here, there = trial.targets
        assert (here.kernels, there.kernels) == ("x86-vnni", "arm-dot-half")
        assert here.latency_ns and there.latency_ns
        assert there.latency_ns.value > here.latency_ns.value  # it is emulated
        is_float = not trial.candidate.get("precisions")
        assert (here.artifact_sha256 == there.artifact_sha256) == is_float


def test_int8_everywhere_pays_on_arm64_alone(world: World) -> None:
    result = world.client.job(world.job_id).result
    assert result is not None and result.int8_trial is not None
    here, there = world.client.trial(world.job_id, result.int8_trial).targets
    assert here.fp32_ratio and there.fp32_ratio
    assert there.fp32_ratio.high < 0.6 < here.fp32_ratio.low


def test_the_winners_differ_and_the_matrix_shows_what_each_costs_elsewhere(world: World) -> None:
    job = world.client.job(world.job_id)
    on_x86, on_arm = world.client.portability(world.job_id).rows
    assert job.result is not None and on_x86.winner == job.result.fp32_trial
    assert on_arm.winner != on_x86.winner
    own = [on_x86.cells[0].over_own_winner, on_arm.cells[1].over_own_winner]
    assert [cell and cell.value for cell in own] == [1.0, 1.0]
    abroad = on_x86.cells[1]
    assert abroad.over_own_winner and abroad.over_own_winner.low > 1.5
    assert [cell.is_feasible for cell in on_x86.cells] == [True, False]
    assert on_arm.cells[1].is_feasible


def test_each_winner_is_exported_in_the_file_for_its_device(world: World, tmp_path: Path) -> None:
    matrix = world.client.portability(world.job_id)
    for row, target in zip(matrix.rows, matrix.targets, strict=True):
        path = world.client.export(
            world.job_id, tmp_path / target.device_name, device=target.device_name
        )
        bundle = read_bundle(path)
        trial = world.client.trial(world.job_id, row.winner)
        (there,) = (t for t in trial.targets if t.device_id == target.device_id)
        assert bundle.sha256 == there.artifact_sha256
        assert bundle.reports["provenance"]["device"]["name"] == target.device_name
