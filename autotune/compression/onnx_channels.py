"""How each ONNX operator passes channels on: one walk through a graph, with labels.

Owns the rules. Every position along a tensor's channel axis carries a label; operators carry
labels along, and labels that must share one fate are joined. What has no rule here stops the
labels that reach it: those channels stay. The groups that follow are `onnx_coupling`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from autotune.compression.graph import GraphView, attribute

_UNARY = (
    "Abs", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Swish", "Tanh",
)  # fmt: skip
_BROADCAST = ("Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum")
_POOLS = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool",
)  # fmt: skip
_REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_OWN_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAxis:
    """The channel axis of a tensor (the batch axis is 0) and the label of each position."""

    axis: int
    labels: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelLayer:
    """A weighted node with the labels of its output channels."""

    node: onnx.NodeProto
    labels: np.ndarray
    is_root: bool


class Labels:
    """Channel labels in disjoint sets; a frozen set is never removed."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._frozen: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, n: int) -> np.ndarray:
        """Labels for `n` channels that a layer makes."""
        start = len(self._parent)
        self._parent.extend(range(start, start + n))
        return np.arange(start, start + n)

    def freeze(self, labels: Iterable[int], reason: str) -> None:
        """These and all that are joined with them stay; the first reason counts."""
        for label in labels:
            self._frozen.setdefault(int(label), reason)

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Position by position; vectors of different lengths have no common fate: frozen."""
        if left.shape != right.shape:
            self.freeze((*left, *right), "its channels meet others of a different number")
            return
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            a, b = sorted((self._root(one), self._root(other)))
            self._parent[b] = a

    def roots(self) -> np.ndarray:
        """The least label of each label's set, which stands for the set."""
        return np.array([self._root(label) for label in range(len(self))], dtype=np.int64)

    def frozen(self) -> dict[int, str]:
        """The sets that stay, by their least label, with the first reason found."""
        return {self._root(label): reason for label, reason in reversed(self._frozen.items())}

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label


@dataclass
class ChannelTrace:
    """One walk through a graph in normal form; a rule returns None where it cannot follow.

    `tensors` has the channel axis of every computed tensor that was followed, `layers` the
    layers that make or carry channels, `constants` the labels along each axis of a node's
    constant input, by node name and position of the input. `idle` names the nodes that only
    make shapes for a Reshape whose result is known; `reshapes` names those Reshapes.
    """

    view: GraphView
    labels: Labels = field(default_factory=Labels)
    tensors: dict[str, ChannelAxis] = field(default_factory=dict)
    layers: list[ChannelLayer] = field(default_factory=list)
    constants: dict[tuple[str, int], Mapping[int, np.ndarray]] = field(default_factory=dict)
    reshapes: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)

    def follow(self) -> None:
        """Label everything; what reaches an output or an unknown operator is frozen."""
        self._find_idle()
        for node in self.view.nodes:
            if node.name in self.idle:
                continue
            rule = _RULES.get(node.op_type) if node.domain in _OWN_DOMAINS else None
            outputs = [name for name in node.output if name]
            followed = rule(self, node) if rule is not None and len(outputs) == 1 else None
            if followed is not None and self._fits(outputs[0], followed):
                self.tensors[outputs[0]] = followed
            else:
                self._stop(node, followed)
        for output in self.view.model.graph.output:
            if output.name in self.tensors:
                track = self.tensors[output.name]
                self.labels.freeze(track.labels, "its channels are an output of the model")

    def _find_idle(self) -> None:
        """Reshapes whose result shape is known need no computed target; nor what makes it."""
        outputs = {output.name for output in self.view.model.graph.output}
        for node in reversed(self.view.nodes):
            if node.op_type == "Reshape" and self._has_known_shape(node):
                self.reshapes.add(node.name)
            takers = [
                taker.name in self.idle
                or (taker.name in self.reshapes and name == taker.input[1] != taker.input[0])
                for name in node.output
                for taker in self.view.consumers.get(name, [])
            ]
            if takers and all(takers) and not outputs & set(node.output):
                self.idle.add(node.name)

    def _has_known_shape(self, node: onnx.NodeProto) -> bool:
        before, after = self.view.shape(node.input[0]), self.view.shape(node.output[0])
        known = min((1, *before, *after)) > 0 and bool(before) and bool(after)
        return known and np.prod(before) == np.prod(after)

    def _fits(self, tensor: str, track: ChannelAxis) -> bool:
        """What the rule says agrees with the inferred shape."""
        shape = self.view.shape(tensor)
        return 1 <= track.axis <= len(shape) and shape[track.axis - 1] == len(track.labels)

    def _stop(self, node: onnx.NodeProto, misfit: ChannelAxis | None) -> None:
        """The channels that flow in stay; so do those of an output that cannot be right."""
        reason = f"its channels reach {node.name!r} ({node.op_type}), which cannot be followed"
        if misfit is not None:
            self.labels.freeze(misfit.labels, reason)
        for name in node.input:
            if name in self.tensors:
                self.labels.freeze(self.tensors[name].labels, reason)

    # The rules. Each takes a node and says where its output's channels are.

    def unary(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Element by element, with nothing but scalar constants beside."""
        if any(name and not self.view.is_constant(name) for name in node.input[1:]):
            return None
        if any(self.view.array(name).size != 1 for name in node.input[1:] if name):
            return None
        return self.tensors.get(node.input[0])

    def broadcast(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Operands are aligned from their last axes; one of extent 1 follows any other."""
        tracks = [self.tensors[name] for name in node.input if name in self.tensors]
        ends = {self._rank(n) - self.tensors[n].axis for n in node.input if n in self.tensors}
        if len(ends) != 1:
            return None
        (end,) = ends
        extents = {name: self._extent(name, end) for name in node.input}
        wide = [track for track in tracks if len(track.labels) > 1]
        if not wide or not set(extents.values()) <= {1, len(wide[0].labels)}:
            return None
        for name, extent in extents.items():
            if name not in self.tensors and not self.view.is_constant(name) and extent > 1:
                return None
        for track in tracks:
            if len(track.labels) > 1:
                self.labels.join(wide[0].labels, track.labels)
            else:
                self.labels.freeze(track.labels, "its one channel is spread over others")
        for place, name in enumerate(node.input):
            if self.view.is_constant(name) and extents[name] > 1:
                axis = self.view.array(name).ndim - end
                self.constants[node.name, place] = {axis: wide[0].labels}
        rank = max(self._rank(name) for name in node.input)
        return ChannelAxis(axis=rank - end, labels=wide[0].labels)

    def conv(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Conv and ConvTranspose: channels on axis 1 before and after."""
        if not all(map(self.view.is_constant, filter(None, node.input[1:]))):
            return None
        track = self.tensors.get(node.input[0])
        if track is not None and track.axis != 1:
            return None
        groups = attribute(node, "group", 1)
        made = self._grouped(node, track, groups) if groups > 1 else self._mixed(node, track)
        if made is None:
            return None
        if len(node.input) > 2 and node.input[2]:
            self.constants[node.name, 2] = {0: made}
        self.layers.append(ChannelLayer(node=node, labels=made, is_root=groups == 1))
        return ChannelAxis(axis=1, labels=made)

    def _mixed(self, node: onnx.NodeProto, track: ChannelAxis | None) -> np.ndarray:
        """Every output channel reads every input channel."""
        made_axis = 1 if node.op_type == "ConvTranspose" else 0
        made = self.labels.fresh(self.view.array(node.input[1]).shape[made_axis])
        read = {} if track is None else {1 - made_axis: track.labels}
        self.constants[node.name, 1] = {made_axis: made} | read
        return made

    def _grouped(
        self, node: onnx.NodeProto, track: ChannelAxis | None, groups: int
    ) -> np.ndarray | None:
        """A group's input and output channels go together, so that no group is left over."""
        outputs = len(self.view.array(node.input[1]))
        if track is None or node.op_type == "ConvTranspose":
            return None
        if groups == len(track.labels) == outputs:
            made = track.labels
        else:
            made = self.labels.fresh(outputs)
            for ins, outs in zip(
                track.labels.reshape(groups, -1), made.reshape(groups, -1), strict=True
            ):
                members = np.concatenate([ins, outs])
                self.labels.join(members[:-1], members[1:])
        self.constants[node.name, 1] = {0: made}
        return made

    def product(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Gemm, or MatMul with a constant matrix on the right; channels on the last axis."""
        source, matrix, *bias = [str(name) for name in node.input]
        if not all(map(self.view.is_constant, filter(None, (matrix, *bias)))):
            return None
        if self.view.array(matrix).ndim != 2 or self.view.is_constant(source):
            return None
        if attribute(node, "transA", 0) or self._rank(source) < 2:
            return None
        last = self._rank(source) - 1
        track = self.tensors.get(source)
        if track is not None and track.axis != last:
            return None
        columns = 0 if attribute(node, "transB", 0) else 1
        made = self.labels.fresh(self.view.array(matrix).shape[columns])
        rows = {} if track is None else {1 - columns: track.labels}
        self.constants[node.name, 1] = {columns: made} | rows
        shape = self.view.array(bias[0]).shape if bias and bias[0] else ()
        if shape and shape[-1] > 1:
            self.constants[node.name, 2] = {len(shape) - 1: made}
        self.layers.append(ChannelLayer(node=node, labels=made, is_root=True))
        return ChannelAxis(axis=last, labels=made)

    def norm(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Statistics per channel: BatchNormalization and InstanceNormalization."""
        track = self.tensors.get(node.input[0])
        constants = [str(name) for name in node.input[1:]]
        if track is None or track.axis != 1 or attribute(node, "training_mode", 0):
            return None
        if not all(map(self.view.is_constant, constants)):
            return None
        for place in range(1, len(node.input)):
            self.constants[node.name, place] = {0: track.labels}
        return track

    def pool(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Over the pixels of each channel."""
        track = self.tensors.get(node.input[0])
        return track if track is not None and track.axis == 1 else None

    def reduction(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Over other axes than that of the channels and that of the batch."""
        track = self.tensors.get(node.input[0])
        rank = self._rank(node.input[0])
        axes = attribute(node, "axes", None)
        if len(node.input) > 1 and self.view.is_constant(node.input[1]):
            axes = self.view.array(node.input[1]).tolist()
        if track is None or axes is None:
            return None
        reduced = {axis % rank for axis in axes}
        if reduced & {0, track.axis}:
            return None
        gone = 0 if attribute(node, "keepdims", 1) else sum(a < track.axis for a in reduced)
        return ChannelAxis(axis=track.axis - gone, labels=track.labels)

    def transpose(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """The channels move with their axis; the batch axis has to stay."""
        track = self.tensors.get(node.input[0])
        order = list(attribute(node, "perm", []))
        if track is None or not order or order[0] != 0:
            return None
        return ChannelAxis(axis=order.index(track.axis), labels=track.labels)

    def concat(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Along the channels one after the other, along another axis position by position."""
        tracks = [self.tensors.get(name) for name in node.input]
        known = [track for track in tracks if track is not None]
        if not known or len({track.axis for track in known}) != 1:
            return None
        axis = known[0].axis
        along = attribute(node, "axis", 0) % self._rank(node.input[tracks.index(known[0])])
        if along != axis:
            return self._stacked(node, axis, known)
        parts = []
        for name, track in zip(node.input, tracks, strict=True):
            if track is not None:
                parts.append(track.labels)
                continue
            extent = self._extent(name, self._rank(name) - axis)
            if extent < 1:
                return None
            parts.append(self.labels.fresh(extent))
            self.labels.freeze(parts[-1], "it is joined with channels of another origin")
        return ChannelAxis(axis=axis, labels=np.concatenate(parts))

    def _stacked(
        self, node: onnx.NodeProto, axis: int, known: list[ChannelAxis]
    ) -> ChannelAxis | None:
        """Joined along another axis, such as a class token: the channels must agree."""
        constants = [p for p, name in enumerate(node.input) if self.view.is_constant(name)]
        if len(known) + len(constants) != len(node.input):
            return None
        for track in known[1:]:
            self.labels.join(known[0].labels, track.labels)
        for place in constants:
            self.constants[node.name, place] = {axis: known[0].labels}
        return known[0]

    def pad(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Of any axis but that of the channels."""
        track = self.tensors.get(node.input[0])
        if track is None or not all(map(self.view.is_constant, node.input[1:])):
            return None
        if len(node.input) not in (2, 3):
            return None
        pads = self.view.array(node.input[1])
        rank = len(pads) // 2
        if pads[track.axis] or pads[track.axis + rank]:
            return None
        return track

    def reshape(self, node: onnx.NodeProto) -> ChannelAxis | None:
        """Followed where each label still fills one whole slab of the result.

        The labels are spread over the whole tensor and reshaped with it, so channels that
        are flattened with their pixels, kept or moved are all seen; a channel shuffle is not
        of that form.
        """
        track = self.tensors.get(node.input[0])
        if track is None or not self._has_known_shape(node):
            return None
        if node.op_type == "Reshape" and node.name not in self.reshapes:
            return None
        before, after = self.view.shape(node.input[0]), self.view.shape(node.output[0])
        along = [1] * len(before)
        along[track.axis - 1] = -1
        spread = np.broadcast_to(track.labels.reshape(along), before).reshape(after)
        for axis in range(len(after)):
            profile = np.moveaxis(spread, axis, 0).reshape(after[axis], -1)
            if after[axis] >= len(track.labels) and (profile == profile[:, :1]).all():
                return ChannelAxis(axis=axis + 1, labels=profile[:, 0].copy())
        return None

    def _rank(self, name: str) -> int:
        if self.view.is_constant(name):
            return self.view.array(name).ndim
        return self.view.rank(name)

    def _extent(self, name: str, end: int) -> int:
        """The extent of the axis `end` places from the last; 1 where there is none."""
        rank = self._rank(name)
        if self.view.is_constant(name):
            return int(self.view.array(name).shape[rank - end]) if rank >= end else 1
        if name in self.tensors:
            return len(self.tensors[name].labels)
        return self.view.shape(name)[rank - end - 1] if rank > end else int(0 < rank < end)


_Rule = Callable[[ChannelTrace, onnx.NodeProto], ChannelAxis | None]
_RULES: Mapping[str, _Rule] = (
    dict.fromkeys(_UNARY, ChannelTrace.unary)
    | dict.fromkeys(_BROADCAST, ChannelTrace.broadcast)
    | dict.fromkeys(_POOLS, ChannelTrace.pool)
    | dict.fromkeys(_REDUCTIONS, ChannelTrace.reduction)
    | dict.fromkeys(_RESHAPES, ChannelTrace.reshape)
    | dict.fromkeys(("Conv", "ConvTranspose"), ChannelTrace.conv)
    | dict.fromkeys(("Gemm", "MatMul"), ChannelTrace.product)
    | dict.fromkeys(("BatchNormalization", "InstanceNormalization"), ChannelTrace.norm)
    | {"Concat": ChannelTrace.concat, "Pad": ChannelTrace.pad, "Transpose": ChannelTrace.transpose}
)
