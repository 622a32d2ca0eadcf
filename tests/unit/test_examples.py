"""The small examples write valid jobs and speak to the client as it is."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autotune.api_types import Event, Front, Interval, Job, JobResult, Progress, Trial
from autotune.compression.source import load_source_model
from autotune.compression.torchvision_repair import import_torchvision
from autotune.errors import AutotuneError
from autotune.spec import JobSpec, read_job
from examples.digits.prepare import job_text
from examples.onnx_file import make_job
from examples.python_client.tune import main, tune

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAST = Trial(
    id="t1",
    job_id="j1",
    number=7,
    state="finished",
    proposed_by="sampler",
    candidate={},
    candidate_digest="d",
    accuracy=Interval(value=0.94, low=0.92, high=0.96),
    accuracy_samples=400,
    latency_ns=Interval(value=1.5e6, low=1.4e6, high=1.6e6),
)


class FakeClient:
    """Answers as a service does whose job ends at once."""

    def __init__(self, result: JobResult | None) -> None:
        self._result = result
        self.asked: list[str | None] = []

    def submit(self, spec: JobSpec) -> Job:
        progress = Progress(phase="done", trials_finished=1, trials_total=1, elapsed_s=1.0)
        self._job = Job(
            id="j1",
            name=spec.name,
            state="finished",
            phase="done",
            reason="out of luck",
            spec={},
            progress=progress,
            result=self._result,
            created_at=NOW,
        )
        return self._job

    def events(self, reference: str) -> list[Event]:
        return [Event(id=1, job_id=reference, kind="job_finished", payload={}, created_at=NOW)]

    def wait(self, reference: str) -> Job:
        return self._job

    def front(self, reference: str, budget: str | None = None) -> Front:
        self.asked.append(budget)
        return Front(
            job_id=reference,
            latency_budget_ns=None,
            max_accuracy_drop=None,
            trials=[FAST],
            answer=FAST,
            explanation="the fastest one",
        )

    def export(self, reference: str, path: Path) -> Path:
        return path


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(job_text("resnet18"), encoding="utf-8")
    return path


def run(client: Any, job_file: Path) -> None:
    tune(client, job_file, Path("bundle.zip"), budget="2ms")


def test_the_client_example_prints_fronts_and_bundle(
    job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(JobResult(winner="t1", verdict="no_budget", explanation="x"))
    run(client, job_file)
    printed = capsys.readouterr()
    assert client.asked == [None, "2ms"]
    assert "* trial   7  1.500 ms [1.400, 1.600]  accuracy 94.0% (n=400)" in printed.out
    assert "bundle: bundle.zip" in printed.out
    assert "job_finished" in printed.err


def test_the_client_example_says_why_a_job_has_no_answer(job_file: Path) -> None:
    with pytest.raises(AutotuneError, match="out of luck"):
        run(FakeClient(None), job_file)


def test_the_client_example_ends_with_the_errors_exit_code(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOTUNE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AUTOTUNE_TOKEN", "token")
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert main([str(job_file.with_name("missing.yaml"))]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_the_onnx_example_writes_a_job_for_the_file_given(tmp_path: Path) -> None:
    out = tmp_path / "job.yaml"
    model, data = tmp_path / "net.onnx", tmp_path / "data.npz"
    make_job.main(["--model", str(model), "--data", str(data), "--out", str(out)])
    job = read_job(out)
    assert job.model.source == f"onnx:{model}"
    assert job.data.evaluation == f"npz:{data}"
    assert job.search.prune_ratios == (0.0,)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # inside torch.onnx.export
def test_the_onnx_example_exports_a_model_that_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = import_torchvision().models.mobilenet_v2(num_classes=10)
    save_file(module.state_dict(), tmp_path / "mobilenet_v2.safetensors")
    path = make_job.export_demo(tmp_path, tmp_path / "net.onnx")
    out = tmp_path / "job.yaml"
    out.write_text(make_job.job_text(path, tmp_path / "x.npz", budget="2ms"), encoding="utf-8")
    source = load_source_model(read_job(out).model, input_shape=(3, 64, 64))
    assert source.num_classes == 10


def test_the_onnx_example_says_what_to_run_first(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"examples\.digits\.prepare"):
        make_job.export_demo(tmp_path, tmp_path / "net.onnx")
