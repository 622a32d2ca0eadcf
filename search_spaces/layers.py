"""The layer inventory: what a model is made of, seen as units that share a precision.

Owns the description only. `autotune/compression/inventory.py` makes it from an ONNX graph;
`search_spaces/space.py` turns it into choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

INVENTORY_VERSION = 5
# Version 1 (2026-11-21): groups with their layers, prunable groups, float operators.
# Version 2 (2026-11-21): a float operator has a reason. Version 1 is still read.
# Version 3 (2026-11-21): a prunable group's block and BatchNorms; the layers left unpruned.
# Version 4 (2026-11-21): a group has a pattern; squeeze-and-excite blocks, Concats and attention
# tie layers. Versions 1 to 3 are still read: their groups are of the pattern `layer`.
# Version 5 (2026-11-21): why pruning cannot be followed by recovery training. Versions 1 to 4
# are still read: what could be pruned then could be trained.


class LayerKind(StrEnum):
    """What a layer computes, as far as quantization and pruning care."""

    CONV = "conv"
    DEPTHWISE_CONV = "depthwise_conv"
    CONV_TRANSPOSE = "conv_transpose"
    GEMM = "gemm"
    MATMUL = "matmul"


class LayerPattern(StrEnum):
    """Why the layers of a group belong together; what the group is in the network.

    The first four tie several layers; where they overlap, the group is called by the one that
    comes first here. The rest are single layers with what is fused into them.
    """

    RESIDUAL = "residual"
    """The producers of residual Adds, which are computed on codes with all of them or not."""
    CONCAT = "concat"
    """The producers of a Concat, whose outputs share one scale so that joining them is a copy."""
    ATTENTION = "attention"
    """The projections of an attention: query, key, value (packed or not) and output."""
    SQUEEZE_EXCITE = "squeeze_excite"
    """The layers that compute a gate per channel from the channels' means."""
    CLASSIFIER = "classifier"
    """The layer that gives the scores."""
    CONV = "conv_bn_act"
    """A convolution with its BatchNorm and activation."""
    LINEAR = "linear_act"
    """A matrix product with its bias and activation."""
    CONV_TRANSPOSE = "conv_transpose"
    """A transposed convolution, for which the CPU has no 8-bit kernel."""
    LAYER = "layer"
    """Not recorded: the inventory was stored by an earlier version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One node with weights.

    `macs` are multiply-accumulates for one sample; shapes have no batch axis, except
    `weight_shape`, which is the initializer's own.
    """

    name: str
    kind: LayerKind
    op_type: str
    macs: int
    parameters: int
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that the runtime fuses or that a pattern ties: they share a precision.

    `nodes` names every graph node of the unit (the layers, their activations, the Adds).
    `precisions` lists the short names of the precisions that the unit can take at all, in
    order of falling bits; a space offers a subset of them.
    """

    name: str
    layers: tuple[Layer, ...]
    nodes: tuple[str, ...]
    precisions: tuple[str, ...]
    pattern: LayerPattern = LayerPattern.LAYER

    @property
    def is_matrix_product(self) -> bool:
        """All its layers multiply by a matrix, for which there are block-wise kernels."""
        return all(layer.kind in (LayerKind.GEMM, LayerKind.MATMUL) for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample, summed over the layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights and biases, summed over the layers."""
        return sum(layer.parameters for layer in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunableGroup:
    """Output channels that must be removed together, across the layers named.

    `layers` are torch module names, or in a source without a module the names of its layers
    with weights; the first one is the root whose output channels count.
    The channels go in neighbouring blocks of `block` (the groups of a grouped convolution).
    `batch_norms` names the BatchNorm layers that scale them.
    """

    name: str
    channels: int
    layers: tuple[str, ...]
    block: int = 1
    batch_norms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatOperator:
    """An operator that stays FP32 in every candidate: how many nodes, and why.

    >>> str(FloatOperator(operator="Erf", count=2, reason="it has no 8-bit kernel"))
    '2 Erf (it has no 8-bit kernel)'
    """

    operator: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} {self.operator} ({self.reason})"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInventory:
    """Everything the search may touch in one source model, in graph order.

    `float_operators` lists the operators that stay FP32, once per operator and reason;
    `pruning_unavailable` says why no group can be pruned, if none can; `left_unpruned` says
    of each layer outside the prunable groups why (layer, reason); `recovery_unavailable` says
    why a pruned model cannot be trained, if it cannot.
    """

    model_digest: str
    groups: tuple[LayerGroup, ...]
    prunable_groups: tuple[PrunableGroup, ...] = ()
    float_operators: tuple[FloatOperator, ...] = ()
    pruning_unavailable: str | None = None
    left_unpruned: tuple[tuple[str, str], ...] = ()
    recovery_unavailable: str | None = None

    def group(self, name: str) -> LayerGroup:
        """The group of that name.

        Raises:
            KeyError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with the format's version."""
        return {"version": INVENTORY_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LayerInventory:
        """The inventory that `to_json` wrote."""
        return cls(
            model_digest=document["model_digest"],
            groups=tuple(_group(entry) for entry in document["groups"]),
            prunable_groups=tuple(
                PrunableGroup(
                    name=entry["name"],
                    channels=entry["channels"],
                    layers=tuple(entry["layers"]),
                    block=entry.get("block", 1),
                    batch_norms=tuple(entry.get("batch_norms", ())),
                )
                for entry in document["prunable_groups"]
            ),
            float_operators=tuple(_float_operator(e) for e in document["float_operators"]),
            pruning_unavailable=document["pruning_unavailable"],
            left_unpruned=tuple((str(n), str(r)) for n, r in document.get("left_unpruned", ())),
            recovery_unavailable=document.get("recovery_unavailable"),
        )


def _float_operator(entry: Mapping[str, Any] | Sequence[Any]) -> FloatOperator:
    if isinstance(entry, Mapping):
        return FloatOperator(**entry)
    operator, count = entry  # version 1
    reason = "nothing is known about quantizing it"
    return FloatOperator(operator=str(operator), count=int(count), reason=reason)


def _group(entry: Mapping[str, Any]) -> LayerGroup:
    return LayerGroup(
        name=entry["name"],
        layers=tuple(_layer(layer) for layer in entry["layers"]),
        nodes=tuple(entry["nodes"]),
        precisions=tuple(entry["precisions"]),
        pattern=LayerPattern(entry.get("pattern", LayerPattern.LAYER)),
    )


def _layer(entry: Mapping[str, Any]) -> Layer:
    return Layer(
        name=entry["name"],
        kind=LayerKind(entry["kind"]),
        op_type=entry["op_type"],
        macs=entry["macs"],
        parameters=entry["parameters"],
        weight_shape=tuple(entry["weight_shape"]),
        input_shape=tuple(entry["input_shape"]),
        output_shape=tuple(entry["output_shape"]),
    )
