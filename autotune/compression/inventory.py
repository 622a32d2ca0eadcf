"""The layer inventory of a source model: what can be tuned in it, in words and numbers.

Owns the description (MACs, parameters, shapes, which precisions a group can take at all).
Which nodes belong together is `units.py`'s knowledge; what may be chosen in a job is
`search_spaces`' business.
"""

from __future__ import annotations

import math

from autotune.compression.float_operators import find_float_operators
from autotune.compression.graph import GraphView
from autotune.compression.source import SourceModel
from autotune.compression.units import Unit, WeightedNode, find_units
from autotune.errors import CompressionError
from search_spaces import (
    FP16,
    FP32,
    INT8,
    W1,
    W2,
    W4,
    W8,
    W8A16,
    Layer,
    LayerGroup,
    LayerInventory,
    LayerKind,
    Precision,
    PrunableGroup,
)

_ORDER: tuple[Precision, ...] = (FP32, W8, W4, W2, W1, FP16, W8A16, INT8)
_NO_MODULE = (
    "the source is an ONNX graph: training needs a torch module; give the model as torchvision: "
    "or python: to train it after pruning"
)


def build_inventory(source: SourceModel) -> LayerInventory:
    """Everything that a search may touch in the model, in graph order.

    A source that cannot be pruned is no error: `pruning_unavailable` says why.
    """
    view = GraphView(source.graph)
    units = find_units(view)
    prunable, left_unpruned, reason = _prunable(source)
    return LayerInventory(
        model_digest=source.digest,
        groups=tuple(_group(view, unit) for unit in units),
        prunable_groups=prunable,
        float_operators=find_float_operators(view, units),
        pruning_unavailable=reason,
        left_unpruned=left_unpruned,
        recovery_unavailable=_NO_MODULE if source.module is None else None,
    )


def count_cost(view: GraphView) -> tuple[int, int]:
    """Multiply-accumulates for one sample and weights with biases, over all layers."""
    layers = [_layer(view, layer) for unit in find_units(view) for layer in unit.layers]
    return sum(x.macs for x in layers), sum(x.parameters for x in layers)


def precisions_of(unit: Unit) -> tuple[Precision, ...]:
    """What the unit can take, in order of falling bits.

    A transposed convolution stays in FP32: onnxruntime's CPU provider has no other kernel.
    Which of them can be fast is the device's business (`kernels.py`).
    """
    if any(layer.kind is LayerKind.CONV_TRANSPOSE for layer in unit.layers):
        return (FP32,)
    return _ORDER


def _group(view: GraphView, unit: Unit) -> LayerGroup:
    return LayerGroup(
        name=unit.name,
        layers=tuple(_layer(view, layer) for layer in unit.layers),
        nodes=unit.nodes,
        precisions=tuple(p.name for p in precisions_of(unit)),
        pattern=unit.pattern,
    )


def _layer(view: GraphView, layer: WeightedNode) -> Layer:
    weight = view.array(layer.weight)
    biases = [layer.bias] if layer.bias else []
    if layer.bias_add is not None:
        biases = [name for name in layer.bias_add.input if view.is_constant(name)]
    shapes = view.sample_shape(layer.input), view.sample_shape(layer.output)
    return Layer(
        name=layer.name,
        kind=layer.kind,
        op_type=layer.node.op_type,
        macs=_macs(layer, weight.shape, *shapes),
        parameters=int(weight.size + sum(view.array(name).size for name in biases)),
        weight_shape=tuple(int(extent) for extent in weight.shape),
        input_shape=shapes[0],
        output_shape=shapes[1],
    )


def _macs(
    layer: WeightedNode,
    weight: tuple[int, ...],
    taken: tuple[int, ...],
    made: tuple[int, ...],
) -> int:
    """Each output value sums over its filter; a transposed convolution spreads each input."""
    if layer.kind is LayerKind.CONV_TRANSPOSE:
        return math.prod(taken) * math.prod(weight[1:])
    if layer.is_matrix_product:
        return math.prod(made[:-1]) * math.prod(weight)
    return math.prod(made) * math.prod(weight[1:])


def _prunable(
    source: SourceModel,
) -> tuple[tuple[PrunableGroup, ...], tuple[tuple[str, str], ...], str | None]:
    """The groups, the layers left out with their reasons, and why there is no group at all."""
    from autotune.compression.onnx_pruning import describe_graph_pruning
    from autotune.compression.pruning import describe_pruning

    try:
        if source.module is None:
            found = describe_graph_pruning(source.graph)
        else:
            found = describe_pruning(source.module, source.input_shape)
    except CompressionError as error:
        return (), (), str(error)
    reason = None if found.groups else "no channel of this model can be removed"
    return found.groups, found.left_out, reason
