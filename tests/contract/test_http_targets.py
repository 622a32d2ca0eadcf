"""What the HTTP API and the command line show of a job on several devices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest

from autotune.cli import root as cli
from autotune.cli.delivery import deliver
from autotune.cli.session import Session
from autotune.errors import JobNotReady, NotFoundError
from autotune.export.bundle import read_bundle
from autotune.search.verification import VerificationOutcome
from storage.records import DeviceRecord, JobRecord, JobTarget, TrialOutcome, TrialRecord
from tests.running_service import RunningService, running_service
from tests.unit import fabricated_job
from tests.unit.fabricated_job import FP32_NS

SLOWER = 10
"""The second device takes this many times as long for FP32."""


def model_for_second() -> bytes:
    """The same model as other bytes, as for another kernel class."""
    model = onnx.load_model_from_string(fabricated_job.linear_model())
    model.doc_string = "written for other kernels"
    return bytes(model.SerializeToString())


@dataclass
class TwoDevices:
    service: RunningService
    job: JobRecord
    first: DeviceRecord
    second: DeviceRecord
    second_winner: TrialRecord


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoDevices]:
    """A finished job; on the second device the front stands on its head: slow is fast there."""
    with running_service(tmp_path_factory.mktemp("service")) as service:
        _, first = service.enrol("gateway")
        _, second = service.enrol("pi4")
        job = service.finished_job(first)
        model = model_for_second()
        service.context.artifacts.put(model)
        trials = service.repository.list_trials(job.id)
        for trial in trials:
            if trial.outcome is TrialOutcome.OK and trial.latency is not None:
                ratio = 1.2 - 0.2 * trial.latency.ratio if trial.number else 1.0
                reference_ns = SLOWER * FP32_NS
                latency = trial.latency.model_copy(
                    update={
                        "ratio": ratio,
                        "ratio_low": 0.99 * ratio,
                        "ratio_high": 1.01 * ratio,
                        "p50_ns": ratio * reference_ns,
                        "p50_low_ns": 0.99 * ratio * reference_ns,
                        "p50_high_ns": 1.01 * ratio * reference_ns,
                        "reference_latency_ns": reference_ns,
                    }
                )
                service.repository.update_trial(
                    trial.id,
                    on=second.id,
                    outcome=trial.outcome,
                    accuracy=trial.accuracy,
                    latency=latency,
                    artifact_sha256=hashlib.sha256(model).hexdigest(),
                    artifact_size_bytes=len(model),
                    compression={"kernels": "arm-dot", "groups": []},
                )
        target = JobTarget(
            device_id=second.id, latency_budget_ns=99 * FP32_NS, reference_latency_ns=10 * FP32_NS
        )
        winner = service.repository.find_trial(job.id, 3)
        result = dict(job.result or {})
        result["targets"] = [
            {"device_id": device.id, "winner": won, "verdict": "within_budget", "explanation": why}
            for device, won, why in (
                (first, result["winner"], "the most accurate here"),
                (second, winner.id, "the most accurate there"),
            )
        ]
        job = service.repository.update_job(
            job.id, further_targets=(target,), result=result, latency_budget_ns=0.5 * FP32_NS
        )
        yield TwoDevices(service, job, first, second, winner)


@pytest.fixture
def said(two: TwoDevices, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints on stdout."""

    def command(*words: str) -> str:
        session = Session(url="here", token="ours", connect=lambda *_: two.service.client)
        assert cli.run(words, session) == 0
        return capsys.readouterr().out

    return command


def test_a_job_names_its_devices_with_the_budget_on_each(two: TwoDevices) -> None:
    job = two.service.client.job(two.job.id)
    assert [target.device_name for target in job.targets] == ["gateway", "pi4"]
    assert [t.latency_budget_ns for t in job.targets] == [0.5 * FP32_NS, 99 * FP32_NS]
    assert job.progress.device_name == "gateway, pi4"
    assert job.result is not None and [t.winner for t in job.result.targets][1] == (
        two.second_winner.id
    )


def test_a_trial_shows_its_own_nanoseconds_on_its_worst_device(two: TwoDevices) -> None:
    trial = two.service.client.trial(two.job.id, 3)
    assert trial.device_id in {two.first.id, two.second.id}
    (worst,) = (t for t in trial.targets if t.device_id == trial.device_id)
    assert trial.latency_ns == worst.latency_ns
    assert trial.targets[1].kernels == "arm-dot"


def test_fronts_differ_by_device_and_the_default_is_the_worst_one(two: TwoDevices) -> None:
    client = two.service.client
    on = {name: client.front(two.job.id, device=name) for name in ("gateway", "pi4")}
    assert on["gateway"].device_id == two.first.id and on["pi4"].device_id == two.second.id
    worst = client.front(two.job.id)
    assert worst.device_id is None
    fronts = [[t.number for t in found.trials] for found in (worst, *on.values())]
    assert fronts[1] != fronts[2]
    reached = {t.number: t.latency_ns for t in on["pi4"].trials}
    assert all(figure and figure.value > 5 * FP32_NS for figure in reached.values())


def test_a_budget_asked_now_is_each_devices_own(two: TwoDevices) -> None:
    found = two.service.client.front(two.job.id, budget="0.1x")
    assert "inside the budget on every device" in found.explanation
    alone = two.service.client.front(two.job.id, budget="0.1x", device="pi4")
    assert alone.latency_budget_ns == pytest.approx(0.1 * SLOWER * FP32_NS)


def test_a_device_that_the_job_does_not_measure_on_is_refused(two: TwoDevices) -> None:
    with pytest.raises(NotFoundError, match="its devices: gateway, pi4"):
        two.service.client.front(two.job.id, device="toaster")


def test_the_portability_matrix_compares_with_each_devices_own_winner(two: TwoDevices) -> None:
    matrix = two.service.client.portability(two.job.id)
    assert [row.device_id for row in matrix.rows] == [two.first.id, two.second.id]
    cells = [[cell.over_own_winner for cell in row.cells] for row in matrix.rows]
    assert [cells[n][n] and cells[n][n].value for n in (0, 1)] == [1.0, 1.0]  # type: ignore[union-attr]
    abroad = cells[0][1]
    assert abroad is not None and abroad.low < abroad.value < abroad.high
    first, second = (row.cells[1].latency_ns for row in matrix.rows)
    assert first and second and abroad.value == pytest.approx(first.value / second.value)


def test_a_job_on_one_device_has_no_matrix_to_show(two: TwoDevices) -> None:
    single = two.service.finished_job(two.first)
    with pytest.raises(JobNotReady, match="measures on one device"):
        two.service.client.portability(single.id)


def test_a_bundle_for_a_device_is_its_winner_in_its_file(two: TwoDevices, tmp_path: Path) -> None:
    bundle = read_bundle(two.service.client.export(two.job.id, tmp_path / "bundle", device="pi4"))
    assert bundle.model == model_for_second()
    assert bundle.candidate == two.second_winner.candidate
    assert bundle.reports["provenance"]["device"]["name"] == "pi4"
    primary = read_bundle(two.service.client.export(two.job.id, tmp_path / "primary"))
    assert primary.model == fabricated_job.linear_model()


def test_a_model_is_verified_on_the_device_that_it_was_written_for(two: TwoDevices) -> None:
    asked: list[str | None] = []
    runner, found = two.service.runner, two.service.verification(two.job, two.second)
    verify = runner.verify
    runner.verify = lambda job, model, **_: asked.append(job.device_id) or found  # type: ignore[method-assign,func-returns-value]
    try:
        two.service.client.verify(two.job.id, model_for_second())
        two.service.client.verify(two.job.id, fabricated_job.linear_model())
        two.service.client.verify(two.job.id, fabricated_job.linear_model(), device="pi4")
    finally:
        runner.verify = verify  # type: ignore[method-assign]
    assert asked == [two.second.id, two.first.id, two.second.id]


def test_each_devices_winner_is_handed_over_and_verified_there(
    two: TwoDevices, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(job: JobRecord, model: bytes, *, trial: str | None = None) -> VerificationOutcome:
        found = two.service.verification(
            job, two.service.repository.get_device(job.device_id or "")
        )
        return replace(found, artifact_sha256=hashlib.sha256(model).hexdigest())

    client, runner = two.service.client, two.service.runner
    before, runner.verify = runner.verify, verify  # type: ignore[method-assign]
    try:
        out, report = tmp_path / "bundle", tmp_path / "report.html"
        job = client.job(two.job.id)
        deliver(client, job, out=out, report=report, output_format="table")
    finally:
        runner.verify = before  # type: ignore[method-assign]
    printed = capsys.readouterr().out
    assert "what wins on one device, on the others:" in printed
    assert "measured again on gateway:" in printed and "measured again on pi4:" in printed
    assert read_bundle(tmp_path / "bundle-pi4").model == model_for_second()


def test_the_report_shows_the_matrix_and_is_about_the_device_asked_for(two: TwoDevices) -> None:
    page = two.service.client.report(two.job.id, device="pi4")
    assert '<section id="devices">' in page and "on gateway</th>" in page
    assert "on pi4 (" in page and "The rest of this page is about pi4." in page


def test_the_command_line_shows_the_matrix_and_the_worst_device(
    two: TwoDevices, said: Callable[..., str]
) -> None:
    header, first, *_ = said("front", two.job.id, "--portability").splitlines()
    assert "on gateway" in header and "on pi4" in header
    assert first.startswith("gateway") and "x own winner" in first
    assert "worst on" in said("front", two.job.id).splitlines()[0]
    assert "worst on" not in said("front", two.job.id, "--device", "pi4").splitlines()[0]
    assert "pi4: the most accurate there" in said("job", "show", two.job.id)
    assert "arm-dot" in said("trial", "show", two.job.id, "3")
