"""The command line: commands, errors and exit codes, against a client that answers from memory."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete

import autotune.errors
from autotune.cli import root
from autotune.cli.root import COMMANDS, cli, exit_codes, run
from autotune.cli.session import FORMATS, Session
from autotune.errors import AutotuneError, DiskFull, InvalidModel, ServiceError
from autotune.spec import job_schema_text
from tests.unit.cli_fakes import JOB_FILE, Call, FakeClient, finished_job, make_event, make_job

HEAVY = (
    *("torch", "ray", "optuna", "sqlalchemy", "fastapi", "onnx", "onnxruntime", "rich"),
    *("numpy", "httpx", "pydantic"),
)


# Help, completion and what keeps them fast.


def test_help_lists_every_command_and_every_exit_code(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.summary}" in text
    for code, meaning in exit_codes():
        assert f"{code} {meaning}" in text


def test_the_exit_codes_are_those_of_the_errors() -> None:
    documented = dict(exit_codes())
    errors = [e for e in vars(autotune.errors).values() if isinstance(e, type)]
    codes = [error.exit_code for error in errors if issubclass(error, AutotuneError)]
    assert len(codes) == len(set(codes)) > 10
    assert set(documented) == {*codes, 0, 130, 141, 143}


def test_the_lines_of_help_fit_the_commands() -> None:
    context = click.Context(cli)
    for name, entry in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None and command.name == name
        assert entry.summary.endswith(".")
        assert len(entry.summary) <= 60


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from autotune.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as leaving:\n    assert leaving.code == 0\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout.startswith("Usage: autotune")
    assert ended.stderr.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_AUTOTUNE_COMPLETE" in capsys.readouterr().out


def test_the_help_of_completion_shows_a_line_for_every_shell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["completion", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\\b" not in shown
    assert "  zsh:  autotune completion zsh >> ~/.zshrc\n" in shown


def test_a_full_disk_anywhere_has_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/full/tune.json")

    monkeypatch.setattr(root.cli, "main", full)
    assert run(["job", "ls"]) == DiskFull.exit_code
    assert "no room is left for /full/tune.json" in capsys.readouterr().err


def test_completion_knows_the_lazy_commands() -> None:
    complete = ShellComplete(cli, {}, "autotune", "_AUTOTUNE_COMPLETE")
    assert [c.value for c in complete.get_completions([], "de")] == ["device"]
    assert [c.value for c in complete.get_completions(["job"], "res")] == ["resume"]


def test_schema_is_the_published_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    assert capsys.readouterr().out == job_schema_text()


# Errors.


def test_a_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tun"]) == 2
    assert "'tune'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(InvalidModel("no such file"), 3), (ServiceError("refused"), 7)]
)
def test_an_error_is_a_line_on_stderr_and_its_exit_code(
    error: AutotuneError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(url: str, token: str) -> Any:
        raise error

    session = Session(url="http://x", token="t", connect=connect)
    assert run(["job", "ls"], session) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {error}\n")


def test_an_error_whose_repair_is_known_comes_with_a_hint(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("job", "show", "nothing") == 6
    assert "hint: `autotune job ls`" in capsys.readouterr().err


def failing(error: BaseException) -> Session:
    def connect(url: str, token: str) -> Any:
        raise error

    return Session(url="http://x", token="t", connect=connect)


def test_debug_shows_where_and_otherwise_nothing_raw_reaches_the_user(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["job", "ls"], failing(RuntimeError("boom"))) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert run(["--debug", "job", "ls"], failing(RuntimeError("boom"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["job", "ls"], failing(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    program = "from autotune.cli import main; main(['schema'])"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (141, "")


def test_no_service_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOTUNE_DATA_DIR", str(tmp_path))
    assert run(["job", "ls"], Session()) == 7
    assert "autotune serve" in capsys.readouterr().err


def test_the_local_service_is_found_by_the_files_that_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: FakeClient
) -> None:
    monkeypatch.setenv("AUTOTUNE_DATA_DIR", str(tmp_path))
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:1234", "pid": 1}))
    (tmp_path / "token").write_text("eat_secret\n")
    asked: list[tuple[str, str]] = []

    def connect(url: str, token: str) -> Any:
        asked.append((url, token))
        return client

    assert run(["job", "ls"], Session(connect=connect)) == 0
    assert asked == [("http://127.0.0.1:1234", "eat_secret")]


def test_the_local_token_is_sent_to_no_other_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOTUNE_DATA_DIR", str(tmp_path))
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:1234"}))
    (tmp_path / "token").write_text("eat_secret\n")
    assert run(["--url", "http://elsewhere", "job", "ls"], Session()) == 8
    assert "elsewhere" in capsys.readouterr().err


# Commands.


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_format_may_stand_before_or_after_the_command(
    output_format: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("-o", output_format, "trial", "ls", "job-1") == 0
    before = capsys.readouterr().out
    assert call("trial", "ls", "job-1", "-o", output_format) == 0
    assert capsys.readouterr().out == before != ""


def test_job_submit_prints_the_id_alone(
    call: Call, client: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(JOB_FILE)
    assert call("job", "submit", str(job_file)) == 0
    assert capsys.readouterr().out == "job-1\n"
    assert ("submit", "digits") in client.calls


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (["pi4"], ""),
        (["pi4-kitchn"], "no device or pool is called 'pi4-kitchn' yet"),
        (["pi4", "pi9"], "there are pi4"),
    ],
)
def test_job_submit_says_which_device_the_job_waits_for(
    devices: list[str], said: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(JOB_FILE)
    asked = [part for name in devices for part in ("--device", name)]
    assert call("job", "submit", str(job_file), *asked) == 0
    captured = capsys.readouterr()
    assert captured.out == "job-1\n"
    assert said in captured.err if said else captured.err == ""


def test_job_submit_says_that_no_device_has_enrolled(
    call: Call, client: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.device_list = []
    job_file = tmp_path / "job.yaml"
    job_file.write_text(JOB_FILE)
    assert call("job", "submit", str(job_file)) == 0
    assert "`autotune device enroll`" in capsys.readouterr().err


def test_a_misspelt_key_in_a_job_file_is_told_the_nearest(
    call: Call, client: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(JOB_FILE + "latency_bugdet: 3ms\n")
    assert call("job", "submit", str(job_file)) == 2
    assert "latency_budget" in capsys.readouterr().err
    assert client.calls == []


def test_job_watch_prints_progress_on_stderr_and_the_job_on_stdout(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.states = [make_job(), finished_job()]
    client.event_list = [make_event(1, "phase", phase="search")]
    assert call("job", "watch", "digits", "-o", "json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == "finished"
    assert "phase: search" in captured.err


def test_job_watch_of_a_cancelled_job_exits_13(call: Call, client: FakeClient) -> None:
    client.states = [make_job(state="cancelled")]
    assert call("job", "watch", "job-1") == 13


def test_job_resume_adds_trials_and_time(call: Call, client: FakeClient) -> None:
    assert call("job", "resume", "job-1", "--trials", "+10") == 0
    assert ("resume", "job-1", 10) in client.calls
    assert call("job", "resume", "job-1", "--time", "20m") == 0
    assert ("resume", "job-1", None, 1200.0) in client.calls
    assert call("job", "cancel", "job-1") == 0
    assert ("cancel", "job-1") in client.calls


def test_trial_show_prints_planned_and_effective_precision(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("trial", "show", "job-1", "#5") == 0
    printed = capsys.readouterr().out
    assert ("trial", "job-1", "5") in client.calls
    assert "no kernel" in printed and "channels removed" in printed


@pytest.mark.parametrize("drop", ["1%", "0.01"])
def test_front_takes_a_drop_in_percent_or_as_a_fraction(
    drop: str, call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("front", "job-1", "--budget", "3ms", "--max-drop", drop) == 0
    assert ("front", "job-1", "3ms", 0.01) in client.calls
    printed = capsys.readouterr().out
    assert "answer" in printed and "the fastest within the drop" in printed


def test_front_as_csv_has_one_row_per_trial_with_its_roles(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("front", "job-1", "-o", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["roles"] for row in rows] == ["front", "answer front", "INT8", "FP32"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("front", "job-1", "--budget", "3 parsecs"),
        ("front", "job-1", "--max-drop", "3"),
        ("export", "job-1", "--budget", "3ms", "--select", "knee"),
        ("model", "inspect", "torchvision:resnet18", "--input-shape", "3,x"),
        ("model", "inspect", "resnet18"),
        ("job", "resume", "job-1", "--trials", "0"),
        ("job", "resume", "job-1", "--time", "soon"),
    ],
)
def test_a_wrong_value_is_a_usage_error(arguments: tuple[str, ...], call: Call) -> None:
    assert call(*arguments) == 2


def test_a_number_of_trials_that_is_none_is_told_how_to_write_one(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("job", "resume", "job-1", "--trials", "many") == 2
    assert "'many' is not how many more; write a whole number as +50" in capsys.readouterr().err


def test_export_prints_the_path(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", "job-1", "--select", "#3", "--out", "b.zip") == 0
    assert capsys.readouterr() == ("b.zip\n", "")
    assert ("export", "job-1", "b.zip", None, "3") in client.calls


def test_export_for_a_budget_says_whether_the_trial_keeps_it(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", "job-1", "--budget", "3ms") == 0
    told = client.front("job-1", "3ms").explanation
    assert capsys.readouterr() == ("digits-bundle\n", f"{told}\n")


def test_device_enroll_prints_exactly_one_command(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("device", "enroll", "--pool", "pi4", "--name", "kitchen pi") == 0
    captured = capsys.readouterr()
    assert captured.out == (
        "autotune-agent run --service http://127.0.0.1:8577 --token once-only --name 'kitchen pi'\n"
    )
    assert ("enrolment_token", "pi4") in client.calls and "15 min" in captured.err


@pytest.mark.parametrize(
    ("command", "asked"),
    [("rotate", "rotate_device_key"), ("revoke", "revoke_device"), ("resume", "resume_device")],
)
def test_what_an_owner_does_to_a_device_is_said_by_its_name(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str], command: str, asked: str
) -> None:
    assert call("device", command, "pi") == 0
    assert client.calls[-1] == (asked, "pi")
    out, err = capsys.readouterr()
    assert (out, f"device {client.device_list[0].name} " in err) == ("", True)


def test_the_quarantine_is_shown_and_cleared(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("device", "quarantine") == 0
    assert "crashed pi4 3 times" in capsys.readouterr().out
    assert call("device", "quarantine", "--clear", "ABCDEF") == 0
    assert client.calls[-1] == ("clear_quarantine", "abcdef")
    assert call("device", "quarantine", "--clear", "abc") == 2
    assert "6 to 64 of its digits" in capsys.readouterr().err


def test_an_empty_list_says_what_fills_it(
    call: Call,
    client: FakeClient,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.device_list.clear()
    monkeypatch.setattr(FakeClient, "jobs", lambda _: [])
    assert call("device", "ls", "-o", "json") == 0
    assert call("job", "ls", "-o", "json") == 0
    captured = capsys.readouterr()
    assert captured.out == "[]\n[]\n"
    assert "`autotune device enroll`" in captured.err and "`autotune job submit" in captured.err


def test_a_drained_device_says_so_in_the_list_and_why_where_it_is_shown(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "12.3 % slower than pool pi4 on the canary (11.2 to 13.1 %, n = 6), which is too much"
    client.device_list[0] = client.device_list[0].model_copy(update={"drained_because": why})
    assert call("device", "ls") == 0
    assert "drained: 12.3 % slower than pool pi4" in capsys.readouterr().out
    assert call("device", "show", "pi4") == 0
    assert f"drained: {why}" in capsys.readouterr().out


def test_devices_say_whether_they_are_there(
    call: Call, client: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.device_list[0] = client.device_list[0].model_copy(
        update={"is_online": False, "last_seen_s_ago": 95.0}
    )
    assert call("device", "ls") == 0
    assert "offline for 1 min 35 s" in capsys.readouterr().out
    assert call("device", "show", "pi4") == 0
    assert "Cortex-A72" in capsys.readouterr().out


def test_the_agents_commands_are_reached_through_autotune(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["agent", "measure", "no-such-model.onnx"]) == 2
    assert "no-such-model.onnx" in capsys.readouterr().err
    assert run(["agent", "--help"]) == 0
    assert "probe" in capsys.readouterr().out


def test_serve_hands_its_options_to_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import autotune.service.server

    served: list[Any] = []
    monkeypatch.setattr(
        autotune.service.server,
        "serve",
        lambda settings, *, ready_file: served.append((settings, ready_file)),
    )
    monkeypatch.setenv("AUTOTUNE_WORKERS", "3")
    arguments = ["--data-dir", str(tmp_path), "--port", "0", "--ready-file", "ready.json"]
    assert run(["serve", *arguments]) == 0
    ((settings, ready_file),) = served
    assert (settings.data_dir, settings.port, settings.workers) == (tmp_path, 0, 3)
    assert not settings.trust_job_code and ready_file == Path("ready.json")


def test_serve_refuses_an_open_address_without_tls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0"]) == 16
    assert "--insecure" in capsys.readouterr().err
