"""The fusion units of an FP32 graph: which layers share a precision, and as what.

Owns the groups that follow from the ties. `operators.py` knows the operators, `ties.py` the
patterns; `inventory.py` describes the result to people, `quantization.py` writes it down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autotune.compression.graph import GraphView
from autotune.compression.operators import WeightedNode, find_layers
from autotune.compression.placement import place
from autotune.compression.ties import Tie, find_classifier, find_ties, followers, leaders
from search_spaces import INT8, LayerKind, LayerPattern

__all__ = [
    "Unit",
    "WeightedNode",
    "find_layers",
    "find_units",
]

# What a unit is called whose ties are of several kinds: the tie that forces most.
_FORCE = (
    LayerPattern.RESIDUAL,
    LayerPattern.CONCAT,
    LayerPattern.ATTENTION,
    LayerPattern.SQUEEZE_EXCITE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weighted nodes that must share a precision, with the nodes that follow from it."""

    name: str
    layers: tuple[WeightedNode, ...]
    nodes: tuple[str, ...]
    pattern: LayerPattern = LayerPattern.LAYER


def find_units(view: GraphView) -> list[Unit]:
    """The layers, tied where a pattern needs one precision from several, in graph order.

    A unit is named after its first layer.
    """
    layers = find_layers(view)
    named = {layer.name: layer for layer in layers}
    ties = list(find_ties(view, layers, place(view, named, dict.fromkeys(named, INT8))))
    parent = {name: name for name in named}
    for tie in ties:
        for other in tie.layers[1:]:
            _join(parent, tie.layers[0], other)
    members: dict[str, list[WeightedNode]] = {}
    for layer in layers:
        members.setdefault(_root(parent, layer.name), []).append(layer)
    order = {node.name: index for index, node in enumerate(view.nodes)}
    classifier = find_classifier(view, layers)
    return [_unit(view, group, ties, order, classifier) for group in members.values()]


def _unit(
    view: GraphView,
    layers: Sequence[WeightedNode],
    ties: Sequence[Tie],
    order: Mapping[str, int],
    classifier: str | None,
) -> Unit:
    names = {layer.name for layer in layers}
    own = [tie for tie in ties if names.intersection(tie.layers)]
    nodes = set(_nodes(view, layers, own))
    return Unit(
        name=layers[0].name,
        layers=tuple(layers),
        nodes=tuple(sorted(nodes, key=order.__getitem__)),
        pattern=_pattern(layers, {tie.pattern for tie in own}, classifier),
    )


def _nodes(view: GraphView, layers: Sequence[WeightedNode], ties: Sequence[Tie]) -> Iterator[str]:
    for layer in layers:
        yield from leaders(view, layer)
        yield layer.name
        yield from followers(view, layer)
    for tie in ties:
        yield from tie.nodes


def _pattern(
    layers: Sequence[WeightedNode], ties: set[LayerPattern], classifier: str | None
) -> LayerPattern:
    for pattern in _FORCE:
        if pattern in ties:
            return pattern
    if layers[0].name == classifier:
        return LayerPattern.CLASSIFIER
    if layers[0].kind is LayerKind.CONV_TRANSPOSE:
        return LayerPattern.CONV_TRANSPOSE
    return LayerPattern.LINEAR if layers[0].is_matrix_product else LayerPattern.CONV


def _root(parent: Mapping[str, str], name: str) -> str:
    while parent[name] != name:
        name = parent[name]
    return name


def _join(parent: dict[str, str], left: str, right: str) -> None:
    parent[_root(parent, left)] = _root(parent, right)
