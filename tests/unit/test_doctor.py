"""The checks of `autotune doctor`, each against a machine that has what it looks for and not."""

from __future__ import annotations

import json
import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest

from autotune.cli import doctor
from autotune.cli.doctor import (
    Finding,
    check_cpu,
    check_data_dir,
    check_disk,
    check_import,
    check_port,
    check_postgresql,
    check_python,
    check_ray,
    check_service,
)
from autotune.cli.root import run
from autotune.cli.session import Session
from autotune.errors import ServiceError
from tests.unit.cli_fakes import FakeClient

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_an_old_python_fails_with_the_version_needed() -> None:
    assert check_python((3, 11, 0)).status == "ok"
    found = check_python((3, 9, 2))
    assert (found.status, found.text) == ("fail", "3.9.2; install 3.11 or newer")


def test_an_import_shows_its_version_and_a_missing_one_the_repair() -> None:
    assert check_import("click").text[0].isdigit()
    found = check_import("no-such-distribution")
    assert found.status == "fail" and "'edge-autotune[service]'" in found.text


def test_every_library_that_an_install_brings_is_looked_for() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["service"]]
    names = {re.split(r"[<>=\[;]", line)[0] for line in wanted}
    assert {*doctor._BASE, *doctor._SERVICE} == names


def test_a_library_that_breaks_at_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"{name}: libgomp.so.1 is missing\nand more")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = check_import("scipy")
    assert found.status == "fail" and found.text.endswith("libgomp.so.1 is missing")


@pytest.mark.parametrize(("flags", "status"), [("sse2 avx512_vnni", "ok"), ("sse2 avx2", "warn")])
def test_the_int8_instructions_are_looked_for(tmp_path: Path, flags: str, status: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert check_cpu(tmp_path).status == status


def test_a_data_directory_that_cannot_be_made_fails(tmp_path: Path) -> None:
    assert check_data_dir(tmp_path / "new").status == "ok"
    (tmp_path / "file").write_text("")
    found = check_data_dir(tmp_path / "file" / "below")
    assert found.status == "fail" and "AUTOTUNE_DATA_DIR" in found.text


@pytest.mark.parametrize(("free", "status"), [(80e9, "ok"), (2e9, "warn"), (1e8, "fail")])
def test_a_disk_that_fills_up_is_noticed(
    free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": int(free)})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert check_disk(tmp_path / "not" / "yet" / "there").status == status


def test_a_port_in_use_is_a_warning() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert check_port("127.0.0.1", port).status == "warn"
    assert check_port("127.0.0.1", port).status == "ok"


def test_postgresql_is_found_through_pg_config_and_is_not_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_postgresql() == Finding(
        check="PostgreSQL server", status="ok", text="not installed; SQLite needs none"
    )
    binaries = tmp_path / "lib"
    binaries.mkdir()
    (binaries / "initdb").touch()
    (tmp_path / "pg_config").write_text(f"#!/bin/sh\necho {binaries}\n")
    (tmp_path / "pg_config").chmod(0o755)
    assert check_postgresql().text == str(binaries)


def test_a_service_that_was_asked_for_must_answer() -> None:
    def refuse(url: str, token: str) -> Any:
        raise ServiceError("connection refused")

    assert check_service(Session(url="http://x", token="t", connect=refuse)).status == "fail"
    client: Any = FakeClient()
    found = check_service(Session(url="http://x", token="t", connect=lambda url, token: client))
    assert found.status == "ok" and "version 0.1.0" in found.text


def test_without_a_local_service_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOTUNE_DATA_DIR", str(tmp_path))
    found = check_service(Session())
    assert found.status == "warn" and "autotune serve" in found.text


def test_ray_is_tried_in_a_process_of_its_own() -> None:
    assert check_ray("pass").status == "ok"
    found = check_ray("raise RuntimeError('no shared memory')")
    assert (found.status, found.text) == ("fail", "RuntimeError: no shared memory")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failure_changes_the_exit_code(
    status: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding(check="disk space", status=status, text="80 GB free")
    monkeypatch.setattr(doctor, "examine", lambda session, *, deep: iter([finding]))
    assert run(["doctor", "-o", "json"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"check": "disk space", "status": status, "text": "80 GB free"}
    ]


def test_every_check_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(
        doctor, "check_import", lambda name: Finding(check=name, status="ok", text="")
    )
    checks = [finding.check for finding in doctor.examine(Session(), deep=False)]
    assert {"python", "torch", "torchvision models", "onnxruntime providers", "CPU int8"} <= set(
        checks
    )
    assert {"data directory", "disk space", "port", "PostgreSQL server", "service"} <= set(checks)


def test_a_wrong_setting_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_PORT", "many")
    monkeypatch.setattr(
        doctor, "check_import", lambda name: Finding(check=name, status="ok", text="")
    )
    *_, last = doctor.examine(Session(), deep=False)
    assert (last.check, last.status) == ("settings", "fail") and "many" in last.text
