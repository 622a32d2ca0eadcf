"""Cross-layer equalization: the channels of one tensor share its 8 bits evenly.

A tensor has one 8-bit scale, and a channel with a small range drowns in a large one's rounding.
Nagel et al. 2019 (arXiv:1906.04721), section 4.1: a channel that is multiplied by `a` where it
is made and by `1 / a` where it is read leaves the function as it was, through everything that is
positively homogeneous; weights have a scale per output channel and lose nothing. Where
everything is linear, a channel's middle moves to 0 as well (as in section 4.1.3, high biases
are absorbed). Owns the factors and offsets, and which hold in a candidate; which channels are free
is `free_channels.py`'s. The factors exist in 8-bit codes alone, where every neighbour computes on
codes: FP32 layers keep the user's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx

from autotune.compression.calibration import Calibration, ChannelRange, Range
from autotune.compression.free_channels import FLATTENING, FreeChannels
from autotune.compression.graph import GraphView, attribute
from autotune.compression.hard_swish import felt_channels, swish_factors
from autotune.compression.operators import WeightedNode, clip_bounds, find_layers
from autotune.compression.placement import Placement
from autotune.compression.shared_factors import STREAM_HEADROOM, stream_factors
from search_spaces import LayerKind

HEADROOM = 1.25
"""A stretched channel keeps room for values a quarter larger than the largest seen.

On other images channels leave the range that 128 samples showed, and what is clipped costs more
than what is rounded; beyond a quarter there is little in it either way. Uniform INT8's divergence
as a fraction of quantize_static's, on new noise over training images of digits (resnet18,
mobilenet_v2, mobilenet_v3_small): 1.0 gives 0.99, 1.13, 0.79; 1.1: 0.53, 0.59, 0.77; 1.2: 0.47,
0.50, 0.77; 1.3: 0.50, 0.52, 0.77; 1.5: 0.53, 0.56, 0.80; 1.8: 0.56, 0.62, 0.77. Half of the
calibration samples judged with the ranges of the other half, which are narrower, says the same:
1.0 diverges 2.1, 5.4 and 1.1 times as much as 1.25, and 1.5 by 0.9, 0.7 and 1.1.
"""
LIMITED_HEADROOM = 1.35
"""The same where a Clip or a HardSwish limits factors: of a few channels the range is theirs.

The squared logit error with 1.25, 1.35, 1.5 (digits, 2,000 held-out images, float weights, means
of 6 to 12 builds), of mobilenet_v2 1.00, 0.98, 1.01, of mobilenet_v3_small 1.00, 0.97, 0.96.
"""
LARGEST_FACTOR = 64.0
"""Silent channels are stretched as if they reached 1/64 of the tensor's largest value."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stretched:
    """A tensor in codes: `factors * (x - offsets)`, channel by channel, which lies in `held`."""

    factors: np.ndarray
    offsets: np.ndarray
    held: Range


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component:
    """Tensors whose channels are scaled together, and the nodes that make and take them."""

    tensors: Mapping[str, Stretched]
    nodes: frozenset[str]


class Equalization:
    """The stretched tensors of one graph; made once per base, asked by every candidate."""

    def __init__(self, view: GraphView, calibration: Calibration) -> None:
        self._view = view
        self._components = _components(view, FreeChannels(view), calibration)

    def in_force(self, placement: Placement) -> dict[str, Stretched]:
        """The stretched tensors of a candidate: those of whole components in 8 bits."""
        stretched: dict[str, Stretched] = {}
        for component in self._components:
            in_codes = all(n in placement.int8 or n in placement.absorbed for n in component.nodes)
            if in_codes and all(self._is_stored(placement, t) for t in component.tensors):
                stretched |= component.tensors
        return stretched

    @property
    def whole(self) -> dict[str, Stretched]:
        """The stretched tensors of uniform INT8."""
        return {name: t for component in self._components for name, t in component.tensors.items()}

    def _is_stored(self, placement: Placement, tensor: str) -> bool:
        return tensor in placement.stored or tensor in placement.writes


def _components(view: GraphView, free: FreeChannels, calibration: Calibration) -> list[Component]:
    channels = felt_channels(view, calibration, headroom=HEADROOM)
    variables = {
        name: free.variables(name)
        for name in free.tensors
        if name in channels and len(channels[name].low) > 1
    }
    offsets = centring_offsets(view, variables, channels)
    joined = _joined(variables, free.n_variables)
    limited = {name for own in joined if _is_limited(own, free) for name in own}
    factors = equalizing_factors(view, variables, offsets, channels, free, limited=limited)
    components = []
    for own in joined:
        rounded = {name: own[name] for name in own if not _is_hardly_felt(view, name)}
        reaches = {name: _reach(channels[name], offsets[name]) for name in rounded}
        # A Relu's outputs are on one side of 0.
        is_linear = all(below.max() > 0 and above.max() > 0 for below, above in reaches.values())
        is_stream = bool(rounded) and is_linear and limited.isdisjoint(own)
        if is_stream:
            widths = {name: np.maximum(*reach) for name, reach in reaches.items()}
            shared, found = stream_factors(rounded, widths, largest_factor=LARGEST_FACTOR)
            factors[shared] = found
        tensors = {
            name: _stretched(
                numbers,
                factors,
                offsets[name],
                channels[name],
                bounds=free.bounds.get(name),
                headroom=STREAM_HEADROOM if is_stream else 1.0,
            )
            for name, numbers in own.items()
        }
        nodes = {view.producer[name].name for name in own if name in view.producer}
        nodes |= {taker.name for name in own for taker in view.consumers.get(name, [])}
        if any((t.factors != 1).any() or t.offsets.any() for t in tensors.values()):
            components.append(Component(tensors=tensors, nodes=frozenset(nodes)))
    return components


def _is_limited(variables: Mapping[str, np.ndarray], free: FreeChannels) -> bool:
    """Some factor is bound to 1, to the end of a Clip, or to what a HardSwish takes."""
    return any(
        (numbers < 0).any()
        or math.isfinite(free.bounds.get(name, (0.0, math.inf))[1])
        or name in free.swishes
        for name, numbers in variables.items()
    )


def _reach(seen: ChannelRange, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each channel goes below and above its middle."""
    return middle - np.array(seen.low), np.array(seen.high) - middle


def centring_offsets(
    view: GraphView,
    variables: Mapping[str, np.ndarray],
    channels: Mapping[str, ChannelRange],
) -> dict[str, np.ndarray]:
    """What is taken off each channel: its middle where a layer makes it and all else is linear.

    A sum's offset is the sum of its terms'. What pads with zeros would pad with another value,
    so a tensor that such a convolution takes keeps 0; so does one before an activation.
    """
    layers = {layer.name: layer for layer in find_layers(view)}
    movable: dict[str, bool] = {}
    for node in reversed(view.nodes):
        out = str(node.output[0])
        is_whole = out in variables and bool((variables[out] >= 0).all())
        # A MatMul has no bias that could give the offset back.
        has_bias = node.op_type != "MatMul"
        movable[out] = (
            is_whole
            and has_bias
            and all(
                _is_shift_invariant(taker, layers)
                and (taker.name in layers or movable[taker.output[0]])
                for taker in view.consumers.get(out, [])
            )
        )
    offsets: dict[str, np.ndarray] = {}
    for node in view.nodes:
        out = str(node.output[0])
        if out not in variables:
            continue
        # A tensor that is not scaled, as one of a single channel, stays where it is.
        terms = [
            offsets[n] if n in offsets else np.zeros(view.shape(n)[0])
            for n in view.data_inputs(node)
            if view.shape(n)
        ]
        if not movable[out]:
            offsets[out] = np.zeros(len(variables[out]))
        elif node.name in layers:
            seen = channels[out]
            offsets[out] = (np.array(seen.low) + np.array(seen.high)) / 2
        else:
            offsets[out] = (
                np.concatenate(terms) if node.op_type == "Concat" else np.sum(terms, axis=0)
            )
    return offsets


def _is_shift_invariant(node: onnx.NodeProto, layers: Mapping[str, WeightedNode]) -> bool:
    """What is added to a channel of its input can be taken off its output."""
    if node.name in layers:
        if node.op_type == "MatMul":
            return False
        pads = attribute(node, "pads", [])
        is_padded = any(pads) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        return node.op_type != "Conv" or not is_padded
    if node.op_type == "AveragePool":
        return not any(attribute(node, "pads", [])) and not attribute(node, "auto_pad", b"")
    return node.op_type in FLATTENING | {"Add", "Concat", "MaxPool", "GlobalAveragePool"}


def equalizing_factors(
    view: GraphView,
    variables: Mapping[str, np.ndarray],
    offsets: Mapping[str, np.ndarray],
    channels: Mapping[str, ChannelRange],
    free: FreeChannels,
    *,
    limited: Set[str],
) -> np.ndarray:
    """The factor of every variable, from the least and largest value of each channel; at least 1.

    `(n_variables + 1,)`: the last one, which the number -1 finds, is 1.
    With r the larger of a channel's two magnitudes, its factor in a tensor is max(r) / r over
    the headroom: the tensor's largest channel, and so its range, stays as it is. (Equation 11
    without the weights' part, which their own scales carry.) Channels of several tensors, as
    those of a stream that a Relu cuts, get the geometric mean, but no more than a Clip has room
    for; those of a linear stream get others afterwards (`shared_factors.py`).
    Tensors that no 8-bit range ends in (before the activation that a range replaces) do not
    count; what a HardSwish takes limits the factors instead (`hard_swish.py`).
    """
    n = free.n_variables
    logs, counts, most = np.zeros(n), np.zeros(n), np.full(n, math.inf)
    for name, numbers in variables.items():
        if name in free.swishes or _is_hardly_felt(view, name):
            continue
        widths = np.maximum(*_reach(channels[name], offsets[name]))
        largest = float(widths.max())
        if largest <= 0:
            continue
        headroom = LIMITED_HEADROOM if name in limited else HEADROOM
        room = headroom * np.maximum(widths, largest / LARGEST_FACTOR)
        own = np.maximum(1.0, largest / room)
        known = numbers >= 0
        np.add.at(logs, numbers[known], np.log(own[known]))
        np.add.at(counts, numbers[known], 1)
        if name in free.bounds:
            np.minimum.at(most, numbers[known], own[known])
    means = np.exp(logs / np.maximum(counts, 1))
    factors = np.append(np.minimum(means, most), 1.0)
    for x, y in free.swishes.items():
        if x in variables and y in variables:
            factors[variables[x]] = swish_factors(factors[variables[x]], channels[x], channels[y])
    return factors


def _is_hardly_felt(view: GraphView, tensor: str) -> bool:
    """No 8-bit range ends in it, or it is a mean of what something else takes whole.

    Rounding such a mean is less than 1 % of the logits' square error in every block of
    mobilenet_v3_small.
    """
    taker = view.only_consumer(tensor)
    if taker is not None and clip_bounds(view, taker) is not None:
        return True
    producer = view.producer.get(tensor)
    return (
        producer is not None
        and producer.op_type == "GlobalAveragePool"
        and view.only_consumer(producer.input[0]) is None
    )


def scaled_weight(
    weight: np.ndarray,
    layer: WeightedNode,
    *,
    inputs: np.ndarray | None = None,
    outputs: np.ndarray | None = None,
) -> np.ndarray:
    """The weights, float64, each times its input channel's and its output channel's number."""
    values: np.ndarray = weight.astype(np.float64)
    for factor in channel_factors(weight.shape, layer, inputs=inputs, outputs=outputs):
        values *= factor
    return values


def channel_factors(
    shape: Sequence[int],
    layer: WeightedNode,
    *,
    inputs: np.ndarray | None = None,
    outputs: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The numbers as arrays that broadcast against a weight of that shape, with all its axes."""
    transposed = layer.kind is LayerKind.MATMUL or (
        layer.kind is LayerKind.GEMM and not attribute(layer.node, "transB", 0)
    )
    made, read = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    tail = (1,) * (len(shape) - 2)
    factors = []
    if inputs is not None:
        # Output channel o of group g reads the input channels of group g alone.
        groups = attribute(layer.node, "group", 1)
        numbers = inputs.reshape(groups, 1, read)
        if groups > 1:
            numbers = numbers.repeat(made // groups, axis=1)
        factors.append(numbers.reshape(-1, read, *tail))
    if outputs is not None:
        factors.append(outputs.reshape(-1, 1, *tail))
    return [factor.T for factor in factors] if transposed else factors


def _joined(variables: Mapping[str, np.ndarray], n_variables: int) -> list[dict[str, np.ndarray]]:
    """The tensors' variables by component: tensors that share a variable belong together."""
    names = list(variables)
    parent = list(range(len(names)))

    def root(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    owner = np.full(n_variables, -1)
    for place, numbers in enumerate(variables.values()):
        own = numbers[numbers >= 0]
        for other in sorted(set(owner[own].tolist())):
            if other >= 0:
                parent[root(place)] = root(other)
        owner[own] = place
    groups: dict[int, dict[str, np.ndarray]] = {}
    for place, name in enumerate(names):
        groups.setdefault(root(place), {})[name] = variables[name]
    return list(groups.values())


def _stretched(
    numbers: np.ndarray,
    factors: np.ndarray,
    offsets: np.ndarray,
    seen: ChannelRange,
    *,
    bounds: tuple[float, float] | None,
    headroom: float,
) -> Stretched:
    values = factors[numbers]
    low = headroom * float(((np.array(seen.low) - offsets) * values).min())
    high = headroom * float(((np.array(seen.high) - offsets) * values).max())
    if bounds is not None:
        # No factor is below 1: where the range ends at the bound, no channel passes it.
        low, high = max(low, bounds[0]), min(high, bounds[1])
    held = Range(low=min(low, 0.0), high=max(high, 0.0))
    return Stretched(factors=values, offsets=offsets, held=held)
