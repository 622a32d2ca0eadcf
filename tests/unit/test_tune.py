"""The pieces of `autotune tune`: children, the ledger, the preflight and the delivery."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.api_types import Verification
from autotune.bundle_download import write_bundle
from autotune.cli import tune as tune_module
from autotune.cli.children import Child, wait_until
from autotune.cli.delivery import answer_lines, compare, deliver
from autotune.cli.ledger import Ledger
from autotune.cli.preflight import require_runnable
from autotune.cli.root import run
from autotune.cli.tune import _run, _submit_or_resume
from autotune.errors import (
    AutotuneError,
    BundleError,
    DatabaseInUse,
    DeviceUnavailable,
    DiskFull,
    InvalidData,
    InvalidModel,
    JobNotReady,
    ServiceError,
    UntrustedCode,
)
from autotune.export.bundle import bundle_files, bundle_zip
from autotune.spec import JobSpec, parse_job
from tests.unit import fabricated_job as fabricated
from tests.unit.cli_fakes import (
    FakeClient,
    finished_job,
    interval,
    make_job,
    make_result,
    make_trial,
    make_verification,
)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "data.npz").write_bytes(b"data")
    return parse_job(
        {
            "name": "digits",
            "model": {"source": f"onnx:{tmp_path}/model.onnx"},
            "data": {"evaluation": f"npz:{tmp_path}/data.npz"},
        }
    )


def changed(spec: JobSpec, **keys: Any) -> JobSpec:
    return parse_job({**spec.model_dump(), **keys})


# Preflight.


def test_a_job_with_its_files_in_place_may_run(spec: JobSpec) -> None:
    require_runnable(spec, trust_job_code=False)
    require_runnable(changed(spec, device="local"), trust_job_code=False)
    require_runnable(changed(spec, device="pi4"), trust_job_code=False, on_this_machine=False)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"model": {"source": "python:m:f"}}, UntrustedCode, "--trust-job-code"),
        ({"device": "pi4"}, DeviceUnavailable, "'pi4'"),
        ({"model": {"source": "onnx:/no/such.onnx"}}, InvalidModel, "model.source: /no/such.onnx"),
        (
            {"model": {"source": "torchvision:resnet18", "weights": "/no/w.pt"}},
            InvalidModel,
            "model.weights",
        ),
        ({"data": {"evaluation": "npz:/no/such.npz"}}, InvalidData, "data.evaluation"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    spec: JobSpec, keys: dict[str, Any], error: type[AutotuneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        require_runnable(changed(spec, **keys), trust_job_code=False)


def test_an_empty_file_is_refused(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"")
    with pytest.raises(InvalidData, match="is empty"):
        require_runnable(spec, trust_job_code=False)


def test_tune_refuses_a_bad_job_file_without_starting_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("autotune.cli.embedded.Child", None)
    assert run(["tune", str(tmp_path / "missing.yaml")]) == 2
    (tmp_path / "job.yaml").write_text(
        "model: {source: onnx:no.onnx}\ndata: {evaluation: npz:no.npz}"
    )
    assert run(["tune", str(tmp_path / "job.yaml")]) == 3
    assert "no.onnx does not exist" in capsys.readouterr().err
    assert not (tmp_path / ".autotune").exists()


# The ledger: which job a job file goes on with.


def test_a_job_is_resumed_until_its_answer_was_handed_over(spec: JobSpec, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "state" / "tune.json")
    assert ledger.undelivered(spec) is None
    ledger.set_submitted(spec, "job-7")
    assert Ledger(tmp_path / "state" / "tune.json").undelivered(spec) == "job-7"
    ledger.set_delivered(spec)
    assert ledger.undelivered(spec) is None


def test_another_spec_or_a_changed_file_is_another_job(spec: JobSpec, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tune.json")
    ledger.set_submitted(spec, "job-7")
    assert ledger.undelivered(changed(spec, seed=1)) is None
    (tmp_path / "model.onnx").write_bytes(b"trained again")
    assert ledger.undelivered(spec) is None


def test_a_damaged_ledger_costs_only_the_convenience(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text("{")
    ledger = Ledger(tmp_path / "tune.json")
    assert ledger.undelivered(spec) is None
    ledger.set_submitted(spec, "job-8")
    assert ledger.undelivered(spec) == "job-8"


@pytest.mark.parametrize(
    ("state", "fresh", "expected"),
    [
        ("running", False, []),
        ("finished", False, []),
        ("cancelled", False, [("resume", "job-1", None)]),
        ("failed", False, [("resume", "job-1", None)]),
        ("cancelled", True, [("submit", "digits")]),
    ],
)
def test_an_earlier_job_is_watched_resumed_or_left(
    spec: JobSpec, tmp_path: Path, state: str, fresh: bool, expected: list[Any]
) -> None:
    ledger = Ledger(tmp_path / "tune.json")
    ledger.set_submitted(spec, "job-1")
    client: Any = FakeClient(states=[make_job(state=state)])
    assert _submit_or_resume(client, spec, ledger, fresh=fresh).id == "job-1"
    assert client.calls == expected


def test_a_job_that_is_gone_is_submitted_anew(spec: JobSpec, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "tune.json")
    ledger.set_submitted(spec, "job-of-a-deleted-database")
    client: Any = FakeClient()
    _submit_or_resume(client, spec, ledger, fresh=False)
    assert client.calls == [("submit", "digits")]
    assert ledger.undelivered(spec) == "job-1"


# Interruption.


class FakeService:
    """Stands for the two children; the first question about them is answered by Ctrl-C."""

    def __init__(self) -> None:
        self.client = FakeClient(states=[make_job(), make_job(state="cancelled")])
        self.interruptions = 1

    def check(self) -> None:
        if self.interruptions:
            self.interruptions -= 1
            raise KeyboardInterrupt


def test_ctrl_c_asks_the_job_to_stop_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from autotune.cli.panel import open_display

    service: Any = FakeService()
    job = make_job()
    with pytest.raises(KeyboardInterrupt), open_display() as display:
        _run(service, job, display, since=job.created_at)
    assert ("cancel", "job-1") in service.client.calls
    assert "the same command resumes the job" in capsys.readouterr().err


def test_sigterm_unwinds_like_an_exception_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving, tune_module._stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # interrupted by the handler
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


# Children.


@contextlib.contextmanager
def child(tmp_path: Path, program: str) -> Iterator[Child]:
    started = Child("service", [sys.executable, "-c", program], log=tmp_path / "logs" / "a.log")
    try:
        yield started
    finally:
        started.stop(grace_s=1.0)


def test_a_child_that_runs_is_alive_and_ends_on_request(tmp_path: Path) -> None:
    with child(tmp_path, "import time; time.sleep(60)") as sleeper:
        sleeper.require_alive()
        sleeper.stop()
        assert not sleeper.is_alive
        sleeper.stop()  # a second time does no harm
    with pytest.raises(ProcessLookupError):
        os.kill(sleeper.pid, 0)


def test_a_child_that_ignores_the_request_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "own = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(own.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with child(tmp_path, program) as stubborn:
        assert wait_until(lambda: stubborn.tail() != "", timeout_s=20)
        grandchild = int(stubborn.tail())
        stubborn.stop(grace_s=0.2)
    assert wait_until(lambda: not is_running(grandchild), timeout_s=10)


def test_a_child_that_died_tells_its_last_words(tmp_path: Path) -> None:
    with child(tmp_path, "import sys; print('out of luck'); sys.exit(9 * 7)") as dead:
        assert wait_until(lambda: not dead.is_alive, timeout_s=20)
        with pytest.raises(ServiceError, match=r"exit code 63(.|\n)*\| out of luck"):
            dead.require_alive()


def test_a_child_that_was_killed_tells_the_signal(tmp_path: Path) -> None:
    with child(tmp_path, "import os; os.kill(os.getpid(), 9)") as dead:
        assert wait_until(lambda: not dead.is_alive, timeout_s=20)
        with pytest.raises(ServiceError, match="SIGKILL"):
            dead.require_alive()


def test_a_child_that_ended_with_a_known_error_raises_that_error(tmp_path: Path) -> None:
    program = "import sys; print('error: another service owns it', file=sys.stderr); sys.exit(10)"
    with child(tmp_path, program) as dead:
        assert wait_until(lambda: not dead.is_alive, timeout_s=20)
        with pytest.raises(DatabaseInUse, match=r"^another service owns it$"):
            dead.require_alive()


def test_a_child_that_could_not_write_its_last_words_is_known_by_its_exit_code(
    tmp_path: Path,
) -> None:
    with child(tmp_path, f"import sys; sys.exit({DiskFull.exit_code})") as dead:
        assert wait_until(lambda: not dead.is_alive, timeout_s=20)
        with pytest.raises(DiskFull, match="free some space"):
            dead.require_alive()


def test_the_tail_of_a_log_leaves_earlier_runs_out(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with child(tmp_path, f"print({word!r})") as short:
            assert wait_until(lambda: not short.is_alive, timeout_s=20)
            assert short.tail() == word
    assert short.log.read_text() == "first\nsecond\n"


def test_children_die_with_their_parent(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from autotune.cli.children import Child\n"
        f"log = Path({str(tmp_path)!r}) / 'a.log'\n"
        "child = Child('x', [sys.executable, '-c', 'import time; time.sleep(60)'], log=log)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    orphan = int(ended.stdout)
    assert ended.returncode == -9
    assert wait_until(lambda: not is_running(orphan), timeout_s=10)


def is_running(pid: int) -> bool:
    """The process exists and is not a zombie that nobody has reaped yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# Delivery.


@pytest.fixture
def delivering(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """A client whose export is a real bundle of a real model."""
    inventory = fabricated.inventory()
    records = fabricated.trials(inventory)

    class Exporting(FakeClient):
        measured: str | None = None

        def export(self, reference: str, path: Path, **asked: Any) -> Path:
            files = bundle_files(
                job=fabricated.job(inventory),
                trial=records[7],
                device=fabricated.device(),
                model=fabricated.linear_model(),
            )
            return write_bundle(path, bundle_zip(files))

        def verify(
            self,
            reference: str,
            model: bytes,
            *,
            device: str | None = None,
            trial: str | None = None,
        ) -> Verification:
            super().verify(reference, model)
            return make_verification(artifact_sha256=self.measured or records[7].artifact_sha256)

    return Exporting()


def test_the_answer_is_printed_exported_read_back_verified_and_reported(
    delivering: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = delivering
    out, report = tmp_path / "bundle", tmp_path / "deep" / "report.html"
    deliver(client, finished_job(), out=out, report=report, output_format="table")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[2].startswith("winner, front") and lines[3].startswith("INT8")
    assert "it is the fastest trial within 1 point of FP32." in printed
    assert "measured again on local" in printed and f"report: {report}" in printed
    assert (out / "model.onnx").exists() and report.read_text() == "<html>report</html>"


def test_json_is_one_document_with_everything(
    delivering: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = delivering
    out, report = tmp_path / "b.zip", tmp_path / "r.html"
    deliver(client, finished_job(), out=out, report=report, output_format="json")
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"job", "front", "verification", "bundle", "report"}
    assert document["verification"]["held_out_samples"] == 540


def test_another_model_than_the_bundles_is_not_taken_for_it(
    delivering: Any, tmp_path: Path
) -> None:
    delivering.measured = "0" * 64
    with pytest.raises(BundleError, match="was measured"):
        deliver(
            delivering,
            finished_job(),
            out=tmp_path / "b",
            report=tmp_path / "r.html",
            output_format="table",
        )


def test_a_job_without_a_result_is_not_delivered(tmp_path: Path) -> None:
    client: Any = FakeClient()
    with pytest.raises(JobNotReady, match="has no result"):
        deliver(client, make_job(), out=tmp_path, report=tmp_path / "r", output_format="table")


def test_a_verified_figure_agrees_where_the_intervals_meet() -> None:
    trial = make_trial(5, confirmed_latency_ns=interval(2.4e6, 0.01e6))
    verified = make_verification(latency_ns=interval(2.5e6, 0.01e6), held_out_samples=540)
    latency, ratio, accuracy, drop = compare(trial, verified)
    assert latency.agrees is False
    assert ratio.agrees is True and accuracy.agrees is True and drop.agrees is True
    assert compare(trial, make_verification(latency_ns=None))[0].agrees is None


def test_the_answer_says_who_wins_why_and_what_ended_the_search() -> None:
    result = make_result(explanation="trial 5 wins: it is fast; it loses 0.2 points")
    assert answer_lines(result) == [
        "",
        "trial 5 wins: it is fast",
        "it loses 0.2 points",
        "the search ended: all 40 trials are done",
    ]
