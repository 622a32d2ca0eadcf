"""Handing over a finished job: the front, the bundle, its verification and the report.

Owns what `autotune tune` prints at its end. The figures come from the service; nothing is
computed here beyond whether two intervals meet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotune.api_types import Front, Interval, Job, JobResult, Portability, Trial, Verification
from autotune.cli import figures
from autotune.cli.output import Column, Field, View, print_rows, write_json
from autotune.cli.views.front import FRONT, front_rows
from autotune.cli.views.portability import portability_view
from autotune.errors import BundleError, DiskFull, JobNotReady
from device_agents.files import NO_ROOM

if TYPE_CHECKING:
    from autotune.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A figure as the search had it and as the verified bundle shows it."""

    name: str
    unit: str
    searched: Interval | None
    verified: Interval | None
    n: int | None
    scale: float

    @property
    def agrees(self) -> bool | None:
        """The two 95 % intervals meet; None where one is missing."""
        if self.searched is None or self.verified is None:
            return None
        return self.searched.low <= self.verified.high and self.verified.low <= self.searched.high


def deliver(client: Client, job: Job, *, out: Path, report: Path, output_format: str) -> None:
    """Print the front, export the winner, verify it, write the report.

    Raises:
        BundleError: the bundle cannot be written, or does not read back as it was written.
        JobNotReady: the job has no result.
        DiskFull: no room for the report.
    """
    if job.result is None:
        raise JobNotReady(f"job {job.id} is {job.state} and has no result")
    trials = client.trials(job.id)
    front = client.front(job.id)
    rows = front_rows(front.trials, trials, result=job.result)
    if output_format != "json":
        print_rows(FRONT, rows, output_format=output_format, to=sys.stdout)
    for line in answer_lines(job.result):
        click.echo(line, err=output_format != "table")

    matrix = client.portability(job.id) if job.result.targets else None
    if matrix is not None and output_format == "table":
        click.echo("\nwhat wins on one device, on the others:")
        print_rows(
            portability_view(matrix.targets), matrix.rows, output_format="table", to=sys.stdout
        )
    delivered = []
    for winner, path, device in _winners(job, trials, out):
        bundle, verification = export_and_verify(client, job, path, device=device)
        delivered.append((bundle, verification))
        if output_format == "table":
            click.echo(
                f"\nthe bundle, loaded back and measured again on {verification.device_name}:"
            )
            rows_of = compare(winner, verification)
            print_rows(COMPARISONS, rows_of, output_format="table", to=sys.stdout)
            if verification.reason:
                click.echo(f"{verification.outcome}: {verification.reason}")
    write_file(report, client.report(job.id).encode(), what="report")
    if output_format == "json":
        _print_document(job, front, delivered, matrix=matrix, report=report)
    for bundle, _ in delivered:
        click.echo(f"bundle: {bundle}", err=output_format != "table")
    click.echo(f"report: {report}", err=output_format != "table")


def _winners(job: Job, trials: Sequence[Trial], out: Path) -> list[tuple[Trial, Path, str | None]]:
    """What to hand over, with its path: the winner, or each device's own as it is there."""
    by_id = {trial.id: trial for trial in trials}
    result = job.result
    if result is None or not result.targets:
        return [(by_id[result.winner], out, None)] if result else []
    names = {target.device_id: target.device_name for target in job.targets}
    return [
        (
            _on(by_id[there.winner], there.device_id),
            out.with_name(f"{out.stem}-{names[there.device_id]}{out.suffix}"),
            names[there.device_id],
        )
        for there in result.targets
    ]


def _on(trial: Trial, device_id: str) -> Trial:
    """The trial with its figures on one of several devices."""
    (there,) = (target for target in trial.targets if target.device_id == device_id)
    shared = type(there).model_fields.keys() & Trial.model_fields.keys()
    return trial.model_copy(update={name: getattr(there, name) for name in shared})


def answer_lines(result: JobResult) -> list[str]:
    """Which trial wins and why, as lines for people."""
    lines = [part.strip() for part in result.explanation.split("; ")]
    if result.stopped_because:
        lines.append(f"the search ended: {result.stopped_because}")
    return ["", *lines]


def export_and_verify(
    client: Client, job: Job, out: Path, *, device: str | None = None
) -> tuple[Path, Verification]:
    """Export the winner (on `device`), read the bundle back and have its model measured again.

    Raises:
        BundleError: the bundle is damaged, or what was measured is not what it holds.
    """
    from autotune.export.bundle import read_bundle

    click.echo("exporting the winner and measuring the bundle again", err=True)
    path = client.export(job.id, out, device=device)
    bundle = read_bundle(path)
    verification = client.verify(job.id, bundle.model, device=device)
    if verification.artifact_sha256 != bundle.sha256:
        raise BundleError(
            f"the bundle {path} holds {bundle.sha256}, "
            f"but {verification.artifact_sha256} was measured"
        )
    return path, verification


def compare(winner: Trial, verification: Verification) -> list[Comparison]:
    """The winner's figures beside those of the verified bundle."""
    latency = winner.confirmed_latency_ns or winner.latency_ns
    ratio = winner.confirmed_fp32_ratio or winner.fp32_ratio
    accuracy = winner.held_out_accuracy or winner.accuracy
    n_latency, n_held_out = verification.latency_samples, verification.held_out_samples
    rows: list[tuple[Any, ...]] = [
        ("latency p50", "ms", latency, verification.latency_ns, n_latency, 1e-6),
        ("ratio to FP32", "x", ratio, verification.fp32_ratio, n_latency, 1.0),
        ("held-out accuracy", "%", accuracy, verification.held_out_accuracy, n_held_out, 100.0),
        (
            "held-out drop",
            "points",
            winner.held_out_accuracy_drop or winner.accuracy_drop,
            verification.held_out_accuracy_drop,
            n_held_out,
            100.0,
        ),
    ]
    names = ("name", "unit", "searched", "verified", "n", "scale")
    return [Comparison(**dict(zip(names, row, strict=True))) for row in rows]


def _agreement(row: Comparison) -> str:
    return {None: figures.MISSING, True: "yes", False: "NO"}[row.agrees]


COMPARISONS: View[Comparison] = View(
    columns=[
        Column(title="figure", text=lambda row: f"{row.name}, {row.unit}"),
        Column(
            title="search [95 %]",
            text=lambda row: figures.interval(row.searched, scale=row.scale),
            right=True,
        ),
        Column(
            title="verified [95 %]",
            text=lambda row: figures.interval(row.verified, scale=row.scale),
            right=True,
        ),
        Column(title="n", text=lambda row: str(row.n or figures.MISSING), right=True),
        Column(title="intervals meet", text=_agreement),
    ],
    fields=[
        Field(name="figure", value=lambda row: row.name),
        Field(name="searched", value=lambda row: row.searched.value if row.searched else None),
        Field(name="verified", value=lambda row: row.verified.value if row.verified else None),
        Field(name="n", value=lambda row: row.n),
        Field(name="agrees", value=lambda row: row.agrees),
    ],
    document=lambda row: {"figure": row.name, "agrees": row.agrees},
    style=lambda row: "yellow" if row.agrees is False else None,
)


def write_file(path: Path, content: bytes, *, what: str) -> None:
    """Write a file that the user asked for; `what` names it in the message.

    Raises:
        DiskFull: there is no room for it.
        BundleError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        known = DiskFull if error.errno in NO_ROOM else BundleError
        raise known(f"cannot write the {what} {path}: {error.strerror}") from error


def _print_document(
    job: Job,
    front: Front,
    delivered: Sequence[tuple[Path, Verification]],
    *,
    matrix: Portability | None,
    report: Path,
) -> None:
    """One document; `bundle` and `verification` are the first device's where there are several."""
    bundle, verification = delivered[0]
    document: dict[str, Any] = {
        "job": job.model_dump(mode="json"),
        "front": front.model_dump(mode="json"),
        "verification": verification.model_dump(mode="json"),
        "bundle": str(bundle),
        "report": str(report),
    }
    if matrix is not None:
        document["portability"] = matrix.model_dump(mode="json")
        document["bundles"] = [
            {"bundle": str(path), "verification": found.model_dump(mode="json")}
            for path, found in delivered
        ]
    write_json(document, sys.stdout)
