"""A model's layer groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from autotune.cli import figures
from autotune.cli.output import Column, Field, View
from search_spaces import LayerGroup


def _shape(axes: Sequence[int]) -> str:
    return "x".join(map(str, axes)) or "scalar"


def _layer_kinds(group: LayerGroup) -> str:
    return figures.counted(Counter(layer.kind.value for layer in group.layers))


LAYER_GROUPS: View[LayerGroup] = View(
    columns=[
        Column(title="layer group", text=lambda g: g.name),
        Column(title="pattern", text=lambda g: g.pattern.value),
        Column(title="layers", text=lambda g: str(len(g.layers)), right=True),
        Column(title="kinds", text=_layer_kinds),
        Column(title="MACs", text=lambda g: figures.count(g.macs), right=True),
        Column(title="parameters", text=lambda g: figures.count(g.parameters), right=True),
        Column(
            title="input",
            text=lambda g: _shape(g.layers[0].input_shape),
            right=True,
            secondary=True,
        ),
        Column(
            title="output",
            text=lambda g: _shape(g.layers[-1].output_shape),
            right=True,
            secondary=True,
        ),
        Column(title="precisions", text=lambda g: " ".join(g.precisions)),
    ],
    fields=[
        Field(name="group", value=lambda g: g.name),
        Field(name="pattern", value=lambda g: g.pattern.value),
        Field(name="layers", value=lambda g: len(g.layers)),
        Field(name="kinds", value=_layer_kinds),
        Field(name="macs", value=lambda g: g.macs),
        Field(name="parameters", value=lambda g: g.parameters),
        Field(name="input_shape", value=lambda g: _shape(g.layers[0].input_shape)),
        Field(name="output_shape", value=lambda g: _shape(g.layers[-1].output_shape)),
        Field(name="precisions", value=lambda g: " ".join(g.precisions)),
    ],
    document=asdict,
)
