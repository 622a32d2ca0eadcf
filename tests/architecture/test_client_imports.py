"""The Python client works where none of the heavy libraries is installed."""

import subprocess
import sys
from pathlib import Path

HEAVY = (
    "torch",
    "ray",
    "optuna",
    "pandas",
    "sqlalchemy",
    "fastapi",
    "starlette",
    "uvicorn",
    "onnx",
    "scipy",
)

PROGRAM = """
import sys
for name in {heavy!r}:
    sys.modules[name] = None
from autotune.client import Client
from autotune.errors import ServiceError
from autotune.spec import parse_job

job = {{"model": {{"source": "torchvision:resnet18"}}, "data": {{"evaluation": "npz:/data.npz"}}}}
with Client("http://127.0.0.1:1", "token") as client:
    try:
        client.submit(parse_job(job))
    except ServiceError as error:
        print(error)
"""


def test_a_job_is_submitted_without_any_heavy_library(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "the service at http://127.0.0.1:1 cannot be reached" in ran.stdout


def test_the_client_draws_in_nothing_of_the_service(tmp_path: Path) -> None:
    program = "import sys, autotune.client; print(*sorted(m for m in sys.modules if '.' in m))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    own = {name for name in ran.stdout.split() if name.startswith(("autotune.", "storage."))}
    assert own == {
        "autotune.analysis",
        "autotune.api_explanation",
        "autotune.api_types",
        "autotune.bundle_download",
        "autotune.client",
        "autotune.errors",
        "autotune.frames",
        "autotune.limits",
        "autotune.responses",
        "autotune.spec",
        "autotune.spec_errors",
        "autotune.studies",
    }
