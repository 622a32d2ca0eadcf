"""Which channels of a graph's tensors may be scaled, and which only together.

Owns the rules of what keeps a channel's factor on its way through the operators, and the variables
that tied channels share. What the factors are is `equalization.py`'s.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
import onnx

from autotune.compression.graph import GraphView, attribute
from autotune.compression.hard_swish import has_free_gate
from autotune.compression.operators import clip_bounds, find_layers

# f(a x) = a f(x) for a > 0, channel by channel, and the output has the input's channels.
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"})
FLATTENING = frozenset({"Flatten", "Reshape", "Squeeze"})
"""They keep the values, and the channels where all but one axis has length 1."""


class FreeChannels:
    """Which channels of which tensors may be scaled, and which only together.

    Each channel of each tensor has a variable; what must share a factor shares a variable.
    Sigmoid and whatever is not known to be homogeneous pin their channels to the factor 1.
    `clip(a x, 0, 6) / a` is another function than `clip(x, 0, 6)`; ReLU6 is let pass
    because its bound is the end of an 8-bit range: a channel stretched by `a >= 1` then ends
    at `6 / a`, which is that channel's range and never beyond 6. HardSwish in 8 bits is the
    product of `a x` with a gate of its own, `clip(x + 3, 0, 6)`, for which a depthwise
    convolution takes the factor back: the product has it still.
    """

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._layers = {layer.name for layer in find_layers(view)}
        # Tens of thousands of variables: as objects they would outweigh a small model.
        self._parents = array("q")
        self._is_pinned = bytearray()
        self._variables: dict[str, np.ndarray] = {}
        self.bounds: dict[str, tuple[float, float]] = {}
        """Tensors behind a Clip, with its bounds."""
        self.swishes: dict[str, str] = {}
        """What a HardSwish takes whose channels are free, with what it makes."""
        self._pin(view.input_name)
        for node in view.nodes:
            self._visit(node)
        self._pin(view.output_name)
        self._numbers = self._settled()

    @property
    def tensors(self) -> list[str]:
        """Every tensor with a free channel, in graph order."""
        return [name for name in self._variables if (self.variables(name) >= 0).any()]

    @property
    def n_variables(self) -> int:
        """All numbers are below this one."""
        return len(self._numbers)

    def variables(self, tensor: str) -> np.ndarray:
        """One number per channel; equal numbers must have equal factors; -1 must have 1."""
        return self._numbers[self._variables[tensor]]

    def _settled(self) -> np.ndarray:
        """Each variable's number."""
        roots = np.array(self._parents, dtype=np.int64)
        while not np.array_equal(above := roots[roots], roots):
            roots = above
        is_pinned = np.zeros(len(roots), dtype=bool)
        is_pinned[roots[np.frombuffer(self._is_pinned, dtype=bool)]] = True
        return np.where(is_pinned[roots], -1, roots)

    def _visit(self, node: onnx.NodeProto) -> None:
        inputs = self._view.data_inputs(node)
        out = str(node.output[0])
        if node.name in self._layers:
            self._of(out)
        elif self._keeps_channels(node) and len(inputs) == 1:
            self._variables[out] = self._of(inputs[0])
            bounds = clip_bounds(self._view, node)
            if node.op_type == "Clip" and bounds is not None:
                self.bounds[out] = bounds
        elif node.op_type == "HardSwish" and has_free_gate(self._view, node):
            self._variables[out] = self._of(inputs[0])
            self.swishes[inputs[0]] = out
        elif node.op_type == "Add" and self._alike(node, inputs):
            self._variables[out] = self._of(inputs[0])
            self._tie(inputs[0], inputs[1])
        elif node.op_type == "Mul" and len(inputs) == 2:
            self._gate(node, inputs)
        elif node.op_type == "Concat" and attribute(node, "axis", 0) == 1:
            self._variables[out] = np.concatenate([self._of(name) for name in node.input])
        else:
            self._pin_all(node)

    def _keeps_channels(self, node: onnx.NodeProto) -> bool:
        """It is homogeneous, or nothing moves between channels: `(N, C, 1, 1)` to `(N, C)`."""
        if len(node.output) != 1:
            return False
        if node.op_type == "Clip":
            bounds = clip_bounds(self._view, node)
            return bounds is not None and bounds[0] <= 0.0 <= bounds[1]
        if node.op_type in FLATTENING:
            before, after = self._view.shape(node.input[0]), self._view.shape(node.output[0])
            return len(before) > 1 and set(before[1:]) == {1} and after == before[:1]
        return node.op_type in _HOMOGENEOUS

    def _gate(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        """A product takes the factor of its larger side; the smaller one, a gate, keeps 1."""
        large, small = sorted(inputs, key=lambda name: -math.prod(self._view.shape(name)))
        if large == small or self._view.shape(large) != self._view.shape(node.output[0]):
            self._pin_all(node)
            return
        self._pin(small)
        self._variables[node.output[0]] = self._of(large)

    def _alike(self, node: onnx.NodeProto, inputs: list[str]) -> bool:
        shapes = [self._view.shape(name) for name in inputs]
        return len(inputs) == len(node.input) == 2 and shapes[0] == shapes[1] and bool(shapes[0])

    def _of(self, tensor: str) -> np.ndarray:
        if tensor not in self._variables:
            shape = self._view.shape(tensor)
            count = shape[0] if shape else 0
            fresh = np.arange(len(self._parents), len(self._parents) + count)
            self._parents.extend(fresh.tolist())
            self._is_pinned.extend(bytes(count))
            self._variables[tensor] = fresh
            # Images and flat features have their channels in the first axis, sequences do not.
            if len(shape) not in (1, 3) or self._view.is_constant(tensor):
                self._pin(tensor)
        return self._variables[tensor]

    def _pin_all(self, node: onnx.NodeProto) -> None:
        for name in (*self._view.data_inputs(node), *(n for n in node.output if n)):
            self._pin(name)

    def _pin(self, tensor: str) -> None:
        for variable in self._of(tensor).tolist():
            self._is_pinned[variable] = True

    def _tie(self, left: str, right: str) -> None:
        for a, b in zip(self._of(left), self._of(right), strict=True):
            self._parents[self._root(int(a))] = self._root(int(b))

    def _root(self, variable: int) -> int:
        while self._parents[variable] != variable:
            self._parents[variable] = self._parents[self._parents[variable]]
            variable = self._parents[variable]
        return variable
