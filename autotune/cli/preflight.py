"""What can be known to be wrong with a job before anything is started.

Owns the cheap checks: consent, the device named, the files that must exist. Whether a model
loads and fits its data is found by `autotune.compression`, in the service.
"""

from __future__ import annotations

from pathlib import Path

from autotune.cli.embedded import AGENT_NAME
from autotune.errors import (
    AutotuneError,
    DeviceUnavailable,
    InvalidData,
    InvalidModel,
    UntrustedCode,
)
from autotune.spec import FILE_SCHEMES, JobSpec, runs_job_code


def require_runnable(spec: JobSpec, *, trust_job_code: bool, on_this_machine: bool = True) -> None:
    """Return when nothing is known against running the job on this machine.

    Raises:
        UntrustedCode: the job names Python code and consent is not given.
        DeviceUnavailable: the job asks for a device that is not this machine.
        InvalidModel: the model's file or its weights are missing or empty.
        InvalidData: a data file is missing or empty.
    """
    if runs_job_code(spec) and not trust_job_code:
        raise UntrustedCode("the job names Python code; pass --trust-job-code if you trust it")
    elsewhere = [named for named in spec.targets if named not in (None, AGENT_NAME)]
    if on_this_machine and elsewhere:
        raise DeviceUnavailable(
            f"the job asks for the device {elsewhere[0]!r}, but `autotune tune` measures on this "
            f"machine ({AGENT_NAME!r}); leave `device` out, or say --device {elsewhere[0]} to "
            "measure through the service that runs (`autotune serve`)"
        )
    _require_file(spec.model.source, InvalidModel, "model.source")
    if spec.model.weights is not None:
        _require_path(Path(spec.model.weights), InvalidModel, "model.weights")
    _require_file(spec.data.evaluation, InvalidData, "data.evaluation")
    if spec.data.training is not None:
        _require_file(spec.data.training, InvalidData, "data.training")


def _require_file(reference: str, error: type[AutotuneError], key: str) -> None:
    scheme, _, path = reference.partition(":")
    if scheme in FILE_SCHEMES:
        _require_path(Path(path), error, key)


def _require_path(path: Path, error: type[AutotuneError], key: str) -> None:
    if not path.exists():
        raise error(f"{key}: {path} does not exist")
    if path.is_file() and path.stat().st_size == 0:
        raise error(f"{key}: {path} is empty")
