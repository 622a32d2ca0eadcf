"""`autotune model`: what a model is made of, before any job."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotune.cli.parameters import SHAPE
from autotune.cli.session import Session, format_option

if TYPE_CHECKING:
    from autotune.spec import ModelSpec
    from search_spaces import LayerInventory


@click.group()
def model() -> None:
    """Look into a model: its layer groups."""


@model.command("inspect")
@click.argument("source", metavar="SOURCE")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="A .pt or .safetensors file.  [default: none: random weights, or those in the file]",
)
@click.option(
    "--input-shape",
    type=SHAPE,
    default="3,224,224",
    show_default=True,
    help="Shape of one sample, without the batch axis.",
)
@click.option(
    "--num-classes",
    type=click.IntRange(min=2),
    help="Classes of the output.  [default: the model's own]",
)
@click.option("--trust-job-code", is_flag=True, help="Allow a python: source to run.")
@format_option
@click.pass_obj
def inspect(
    session: Session,
    source: str,
    weights: Path | None,
    input_shape: tuple[int, ...],
    num_classes: int | None,
    trust_job_code: bool,
) -> None:
    """Show the layer groups of a model, with their work and weights.

    A layer group is what may take a precision of its own. SOURCE is torchvision:NAME, onnx:PATH,
    python:MODULE:FUNCTION, or the path of an ONNX file.
    """
    spec = _model_spec(source, weights, num_classes)

    from autotune.cli.output import print_rows
    from autotune.cli.views.models import LAYER_GROUPS
    from autotune.compression.inventory import build_inventory
    from autotune.compression.source import load_source_model

    loaded = load_source_model(spec, input_shape=input_shape, trust_job_code=trust_job_code)
    inventory = build_inventory(loaded)
    if session.output_format == "json":
        import json

        click.echo(json.dumps(inventory.to_json(), indent=2))
        return
    print_rows(LAYER_GROUPS, inventory.groups, output_format=session.output_format, to=sys.stdout)
    for line in _summary(inventory):
        click.echo(line, err=session.output_format != "table")


def _model_spec(source: str, weights: Path | None, num_classes: int | None) -> ModelSpec:
    from pydantic import ValidationError

    from autotune.spec import ModelSpec

    if source.endswith(".onnx") and ":" not in source:
        source = f"onnx:{source}"
    try:
        return ModelSpec(
            source=source,
            weights=str(weights) if weights is not None else None,
            num_classes=num_classes,
        )
    except ValidationError as error:
        raise click.UsageError(
            f"{source!r} is not a model; write torchvision:NAME, onnx:PATH or "
            "python:MODULE:FUNCTION"
        ) from error


def _summary(inventory: LayerInventory) -> list[str]:
    from autotune.cli import figures

    groups = inventory.groups
    lines = [
        "",
        f"{len(groups)} layer groups, {figures.count(sum(g.macs for g in groups))} MACs and "
        f"{figures.count(sum(g.parameters for g in groups))} parameters in them",
    ]
    if inventory.prunable_groups:
        channels = sum(group.channels for group in inventory.prunable_groups)
        lines.append(f"{len(inventory.prunable_groups)} prunable groups, {channels} channels")
        reasons = Counter(reason for _, reason in inventory.left_unpruned)
        lines += [f"left unpruned: {n} layers, {why}" for why, n in reasons.most_common()]
    elif inventory.pruning_unavailable:
        lines.append(f"nothing can be pruned: {inventory.pruning_unavailable}")
    if inventory.float_operators:
        counted = ", ".join(map(str, inventory.float_operators))
        lines.append(f"operators that stay in FP32: {counted}")
    return lines
