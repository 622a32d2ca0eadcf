"""`autotune doctor`: what on this machine would stop a job, each with its repair.

Owns one small function per check. A check never raises: what it meets is its finding. `warn`
is something that a job can live without, `fail` something that it cannot.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from autotune.cli import figures
from autotune.cli.output import Column, Field, View, print_rows
from autotune.cli.session import Session, shared_options
from autotune.errors import AutotuneError

Status = Literal["ok", "warn", "fail"]

_PYTHON = (3, 11)

# Distribution names; those of the base install are what a device needs, the rest is [service].
_BASE = ("click", "httpx", "numpy", "onnxruntime", "psutil", "pydantic")
_SERVICE = (
    "alembic",
    "fastapi",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxscript",
    "optuna",
    "pillow",
    "pydantic-settings",
    "pyyaml",
    "ray",
    "rich",
    "safetensors",
    "scipy",
    "sqlalchemy",
    "torch",
    "torch-pruning",
    "torchvision",
    "uvicorn",
)
_MODULE_OF = {
    "pillow": "PIL",
    "pydantic-settings": "pydantic_settings",
    "pyyaml": "yaml",
    "torch-pruning": "torch_pruning",
}
# A demo job keeps about 0.2 GB; a full disk costs the trials after it.
_DISK_WARN_BYTES, _DISK_FAIL_BYTES = 5_000_000_000, 500_000_000
# The flags with which onnxruntime's u8s8 kernels are fast and do not saturate.
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "asimddp", "i8mm")

_START_RAY = (
    "from autotune.search.workers import start_ray, stop_ray\nstart_ray(n_workers=1)\nstop_ray()"
)
_RAY_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found; `text` names the repair where one is needed."""

    check: str
    status: Status
    text: str


@click.command()
@click.option("--deep", is_flag=True, help="Also start Ray and stop it again (some seconds).")
@shared_options
@click.pass_context
def doctor(ctx: click.Context, deep: bool) -> None:
    """Check this machine and say what to repair.

    Exits 0 when nothing fails, 1 otherwise; a warning is something that a job can live
    without.
    """
    session: Session = ctx.obj
    findings = list(examine(session, deep=deep))
    print_rows(FINDINGS, findings, output_format=session.output_format, to=sys.stdout)
    ctx.exit(int(any(finding.status == "fail" for finding in findings)))


def examine(session: Session, *, deep: bool) -> Iterator[Finding]:
    """All findings, in the order of the checks."""
    yield check_python()
    for name in (*_BASE, *_SERVICE):
        yield check_import(name)
    yield check_torchvision()
    yield check_providers()
    yield check_cpu()
    try:
        from autotune.settings import Settings

        settings = Settings()
    except (ImportError, AutotuneError) as error:
        yield Finding(check="settings", status="fail", text=_first_line(error))
        return
    yield check_data_dir(settings.data_dir)
    yield check_disk(settings.data_dir)
    yield check_port(settings.host, settings.port)
    yield check_postgresql()
    yield check_service(session)
    if deep:
        yield check_ray()


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Python is new enough."""
    found = ".".join(map(str, version))
    if version < _PYTHON:
        needed = ".".join(map(str, _PYTHON))
        return Finding(check="python", status="fail", text=f"{found}; install {needed} or newer")
    return Finding(check="python", status="ok", text=found)


def check_import(distribution: str) -> Finding:
    """A library is installed and can be imported; torchvision has a check of its own."""
    check = f"import {distribution}"
    extra = "" if distribution in _BASE else "[service]"
    try:
        version = importlib.metadata.version(distribution)
        if distribution != "torchvision":
            importlib.import_module(_MODULE_OF.get(distribution, distribution))
    except importlib.metadata.PackageNotFoundError:
        repair = f"pip install -c constraints.txt 'edge-autotune{extra}'"
        return Finding(check=check, status="fail", text=f"not installed; {repair}")
    except Exception as error:  # noqa: BLE001  # a broken install may raise anything
        return Finding(check=check, status="fail", text=f"{version}, but {_first_line(error)}")
    return Finding(check=check, status="ok", text=version)


def check_torchvision() -> Finding:
    """Torchvision's models can be used, with or without its compiled operators."""
    try:
        from autotune.compression.torchvision_repair import import_torchvision

        import_torchvision()
    except (AutotuneError, ImportError) as error:
        return Finding(check="torchvision models", status="fail", text=_first_line(error))
    has_operators = importlib.import_module("torchvision.extension")._has_ops()
    text = "compiled operators load" if has_operators else "usable without its compiled operators"
    return Finding(check="torchvision models", status="ok", text=text)


def check_providers() -> Finding:
    """Onnxruntime offers the CPU provider, and which others."""
    try:
        runtime = importlib.import_module("onnxruntime")
        providers = [p.removesuffix("ExecutionProvider") for p in runtime.get_available_providers()]
    except Exception as error:  # noqa: BLE001  # a broken install may raise anything
        return Finding(check="onnxruntime providers", status="fail", text=_first_line(error))
    status: Status = "ok" if "CPU" in providers else "fail"
    return Finding(check="onnxruntime providers", status=status, text=", ".join(providers))


def check_cpu(root: Path = Path("/")) -> Finding:
    """The CPU has the instructions that make INT8 faster than FP32."""
    from device_agents.device import Processor

    found = [flag for flag in Processor(root=root).kernel_flags() if flag in _INT8_FLAGS]
    if found:
        return Finding(check="CPU int8", status="ok", text=", ".join(found))
    return Finding(
        check="CPU int8",
        status="warn",
        text=f"none of {', '.join(_INT8_FLAGS)}: INT8 may be no faster here, or less accurate",
    )


def check_data_dir(data_dir: Path) -> Finding:
    """The service can write where it keeps everything."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=data_dir, prefix=".doctor-"):
            pass
    except OSError as error:
        repair = "choose another with AUTOTUNE_DATA_DIR"
        text = f"{data_dir}: {error.strerror}; {repair}"
        return Finding(check="data directory", status="fail", text=text)
    return Finding(check="data directory", status="ok", text=f"{data_dir} is writable")


def check_disk(data_dir: Path) -> Finding:
    """There is room for artifacts."""
    existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    status: Status = "ok"
    if free < _DISK_WARN_BYTES:
        status = "fail" if free < _DISK_FAIL_BYTES else "warn"
    text = f"{figures.size(free)} free at {existing}"
    return Finding(check="disk space", status=status, text=text)


def check_port(host: str, port: int) -> Finding:
    """The service's port is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            text = f"{host}:{port}: {error.strerror}; `autotune serve` needs another --port"
            return Finding(check="port", status="warn", text=text)
    return Finding(check="port", status="ok", text=f"{host}:{port} is free")


def check_postgresql() -> Finding:
    """PostgreSQL's server binaries, which only a database of that kind on this machine needs."""
    found = shutil.which("initdb")
    config = shutil.which("pg_config")
    if found is None and config is not None:
        asked = subprocess.run(  # noqa: S603  # the path comes from PATH, no argument from outside
            [config, "--bindir"], capture_output=True, text=True, check=False, timeout=10
        )
        candidate = Path(asked.stdout.strip()) / "initdb"
        found = str(candidate) if candidate.exists() else None
    text = str(Path(found).parent) if found else "not installed; SQLite needs none"
    return Finding(check="PostgreSQL server", status="ok", text=text)


def check_service(session: Session) -> Finding:
    """The service asked for, or the local one, answers."""
    try:
        client = session.client()
        health = client.health()
    except AutotuneError as error:
        asked_for = session.url is not None
        return Finding(
            check="service", status="fail" if asked_for else "warn", text=_first_line(error)
        )
    text = f"{client.url} answers: {health.status}, version {health.version}"
    return Finding(check="service", status="ok", text=text)


def check_ray(program: str = _START_RAY) -> Finding:
    """Ray starts and stops: in a process of its own, as it reads its settings at import."""
    started = time.monotonic()
    try:
        ended = subprocess.run(  # noqa: S603  # our own interpreter and program
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=_RAY_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        text = f"did not start within {_RAY_TIMEOUT_S:.0f} s"
        return Finding(check="Ray", status="fail", text=text)
    if ended.returncode != 0:
        last_words = ended.stderr.strip().rpartition("\n")[2] or f"exit code {ended.returncode}"
        return Finding(check="Ray", status="fail", text=last_words)
    text = f"started and stopped in {time.monotonic() - started:.1f} s"
    return Finding(check="Ray", status="ok", text=text)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


FINDINGS: View[Finding] = View(
    columns=[
        Column(title="", text=lambda finding: finding.status),
        Column(title="check", text=lambda finding: finding.check),
        Column(title="found", text=lambda finding: finding.text),
    ],
    fields=[
        Field(name="status", value=lambda finding: finding.status),
        Field(name="check", value=lambda finding: finding.check),
        Field(name="text", value=lambda finding: finding.text),
    ],
    document=asdict,
    style=lambda finding: {"warn": "yellow", "fail": "bold red"}.get(finding.status),
)
