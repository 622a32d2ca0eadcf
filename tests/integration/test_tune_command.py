"""`autotune tune` with its real service and its real agent, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autotune.cli.embedded import EmbeddedService
from autotune.errors import DatabaseInUse
from autotune.export.bundle import read_bundle
from tests.unit.fabricated_job import linear_model

JOB = """
name: tiny
model: {source: "onnx:model.onnx"}
data: {evaluation: "npz:evaluation.npz", calibration_samples: 16}
latency_budget: 4x
search: {trials: 3, precisions: [fp32, w8a8]}
# Wide intervals, so that a busy machine is steady enough: the figures are not tested here.
measurement:
  target_half_width: 0.3
  time_cap_s: 0.5
  confirmation_half_width: 0.3
  confirmation_time_cap_s: 1
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(120, 6)).astype(np.float32)
    y = np.arange(120, dtype=np.int64) % 3
    np.savez(tmp_path / "evaluation.npz", x=x, y=y)
    (tmp_path / "model.onnx").write_bytes(linear_model())
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_the_embedded_service_has_its_device_and_leaves_nothing_behind(tmp_path: Path) -> None:
    said: list[str] = []
    with EmbeddedService(tmp_path, trust_job_code=False, workers=1, say=said.append) as service:
        service.check()
        (device,) = service.client.devices()
        assert (device.name, device.is_online) == ("local", True)
        with pytest.raises(DatabaseInUse), EmbeddedService(tmp_path, trust_job_code=False):
            pass
        pids = [child.pid for child in service._children]
    assert said == ["starting the service", "starting the agent"]
    assert len(pids) == 2 and not any(map(is_running, pids))


@pytest.mark.slow
def test_tune_ends_with_a_bundle_a_report_and_verified_figures(job_file: Path) -> None:
    out = job_file.parent / "bundle"
    command = [sys.executable, "-m", "autotune.cli", "tune", str(job_file), "--workers", "1"]
    command += ["--out", str(out), "-o", "json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["job"]["state"] == "finished"
    assert document["verification"]["artifact_sha256"] == read_bundle(out).sha256
    assert Path(document["report"]).read_text().startswith("<!")
    assert "trial #0 (baseline): ok" in ended.stderr
