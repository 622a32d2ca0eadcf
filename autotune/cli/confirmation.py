"""Confirming a trial from the command line: its own bytes, measured again by the service.

Owns the way there and back; what a confirmation is, is `autotune/search/verification.py`'s.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from autotune.api_types import Trial, Verification
    from autotune.client import Client


def confirm_on(client: Client, job: str, trial: Trial, *, device: str | None) -> Verification:
    """Have the trial's artifact measured again; on `device`, one of the job's several.

    Raises:
        JobNotReady: the trial has no artifact.
        DeviceUnavailable: the device is offline.
    """
    from autotune.export.bundle import read_bundle

    click.echo(f"measuring trial {trial.number} again, in a fresh process", err=True)
    with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
        path = client.export(job, Path(folder) / "trial.zip", select=trial.id, device=device)
        model = read_bundle(path).model
    found = client.verify(job, model, device=device, trial=trial.id)
    if found.reason:
        click.echo(f"{found.outcome} on {found.device_name}: {found.reason}", err=True)
    return found
