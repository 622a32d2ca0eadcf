"""Random small graphs of the operators that classifiers are made of, drawn by hypothesis.

Owns the drawing alone: every graph is valid ONNX, runs in onnxruntime and may be a chain or a
DAG, with shared weights, dead branches and its output taken anywhere. The structure is drawn,
so that hypothesis can shrink it; the numbers come from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

MOODS = ("plain", "hostile")
OPSETS = tuple(range(13, 25))
_IR_OF_OPSET = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}

Shape = tuple[int, ...]


@dataclass
class Draft:
    """A graph that grows node by node; shapes have no batch axis."""

    draw: st.DrawFn
    rng: np.random.Generator
    mood: str
    opset: int
    shapes: dict[str, Shape] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def one(self, *values: object) -> object:
        return self.draw(st.sampled_from(values))

    def add(self, operator: str, inputs: list[str], shape: Shape, **attributes: object) -> None:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        self.shapes[name] = shape

    def constant(self, array: np.ndarray, suffix: str = "") -> str:
        name = f"c{len(self.constants)}{suffix}"
        self.constants[name] = array
        return name

    def weight(self, shape: Shape, fan_in: int, suffix: str = ".weight") -> str:
        """New weights, or those of an earlier layer of the same shape."""
        same = [n for n, a in self.constants.items() if a.shape == shape and n.endswith(suffix)]
        if same and self.draw(st.integers(0, 4)) == 0:
            return same[0]
        array = self.rng.standard_normal(shape) / math.sqrt(max(fan_in, 1))
        return self.constant(self.spoiled(array).astype(np.float32), suffix)

    def bias(self, n: int) -> list[str]:
        if not self.draw(st.booleans()):
            return []
        return [self.constant(self.spoiled(0.3 * self.rng.standard_normal(n)).astype(np.float32))]

    def spoiled(self, array: np.ndarray) -> np.ndarray:
        if self.mood == "plain":
            return array
        factor = self.one(1.0, 0.0, "row", 1e-12, 1e-30, 1e-42, 1e4, 1e12)
        if factor == "row":
            array = array.copy()
            array[: max(1, len(array) // 2)] = 0.0
            return array
        return array * factor


def _conv(g: Draft, x: str) -> None:
    channels, height, width = g.shapes[x]
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    group = g.draw(st.sampled_from(divisors))
    out = group * g.draw(st.integers(1, 3))
    if group == channels and g.draw(st.booleans()):
        out = channels
    kernel = g.one(1, 3) if min(height, width) >= 3 else 1
    stride, pad = g.one(1, 1, 2), g.one(0, 1) if kernel == 3 else 0
    shape = tuple((extent + 2 * pad - kernel) // stride + 1 for extent in (height, width))
    fan_in = channels // group * kernel * kernel
    weight = g.weight((out, channels // group, kernel, kernel), fan_in)
    attributes = {"group": group, "strides": [stride] * 2, "pads": [pad] * 4}
    g.add("Conv", [x, weight, *g.bias(out)], (out, *shape), **attributes)


def _conv_transpose(g: Draft, x: str) -> None:
    channels, height, width = g.shapes[x]
    out = g.draw(st.integers(1, 4))
    weight = g.weight((channels, out, 2, 2), channels)
    g.add("ConvTranspose", [x, weight, *g.bias(out)], (out, 2 * height, 2 * width), strides=[2, 2])


def _batch_norm(g: Draft, x: str) -> None:
    n = g.shapes[x][0]
    parts = [
        g.rng.uniform(0.5, 1.5, n), 0.3 * g.rng.standard_normal(n),
        0.3 * g.rng.standard_normal(n), g.rng.uniform(0.5, 2.0, n),
    ]  # fmt: skip
    names = [g.constant(part.astype(np.float32)) for part in parts]
    g.add("BatchNormalization", [x, *names], g.shapes[x])


def _gemm(g: Draft, x: str) -> None:
    (k,), n = g.shapes[x], g.draw(st.integers(1, 40))
    if g.draw(st.booleans()):
        weight = g.weight((k, n), k, ".kernel")
        g.add("MatMul", [x, weight], (n,))
        return
    transposed = g.draw(st.booleans())
    weight = g.weight((n, k) if transposed else (k, n), k)
    attributes: dict[str, object] = {"transB": 1} if transposed else {}
    if g.draw(st.integers(0, 5)) == 0:
        attributes["alpha"] = 0.5
    g.add("Gemm", [x, weight, *g.bias(n)], (n,), **attributes)


def _matmul(g: Draft, x: str) -> None:
    *others, k = g.shapes[x]
    n = g.draw(st.integers(1, 6))
    g.add("MatMul", [x, g.weight((k, n), k, ".kernel")], (*others, n))


def _activation(g: Draft, x: str) -> None:
    kinds = ["Relu", "Clip", "HardSigmoid", "Sigmoid", "LeakyRelu", "Tanh", "Softmax", "Identity"]
    kind = g.draw(st.sampled_from([*kinds, "HardSwish"] if g.opset >= 14 else kinds))
    inputs, attributes = [x], {}
    if kind == "Clip":
        low, high = g.one(
            (0.0, 6.0), (-1.0, 1.0), (0.25, 2.0), (None, 1.0), (0.0, None), (0.0, 0.0)
        )
        inputs += ["" if b is None else g.constant(np.float32(b)) for b in (low, high)]
    elif kind == "HardSigmoid":
        attributes = dict(zip(("alpha", "beta"), g.one((0.2, 0.5), (1 / 6, 0.5), (0.5, 0.0))))  # noqa: B905
    g.add(kind, inputs, g.shapes[x], **attributes)


def _elementwise(g: Draft, x: str) -> None:
    """With itself, another tensor of the same or a broadcast shape, or a constant."""
    shape = g.shapes[x]
    kind = g.one("Add", "Mul")
    gates = [n for n, s in g.shapes.items() if len(s) == 3 and s == (shape[0], 1, 1)]
    others = [n for n, s in g.shapes.items() if s == shape] + (gates if len(shape) == 3 else [])
    other = g.draw(st.sampled_from([*others, ""]))
    if not other:
        extents = g.one(shape, (1,) * len(shape), (shape[0],) + (1,) * (len(shape) - 1))
        other = g.constant(g.rng.standard_normal((1, *extents)).astype(np.float32))
    g.add(kind, [x, other] if g.draw(st.booleans()) else [other, x], shape)


def _concat(g: Draft, x: str) -> None:
    first, *rest = g.shapes[x]
    fitting = [n for n, s in g.shapes.items() if len(s) == 1 + len(rest) and s[1:] == tuple(rest)]
    others = g.draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=2))
    total = first + sum(g.shapes[n][0] for n in others)
    g.add("Concat", [x, *others], (total, *rest), axis=1)


def _pool(g: Draft, x: str) -> None:
    channels, height, width = g.shapes[x]
    kind = g.one("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean")
    if kind == "GlobalAveragePool":
        g.add(kind, [x], (channels, 1, 1))
    elif kind == "ReduceMean" and g.opset < 18:
        g.add(kind, [x], (channels, 1, 1), axes=[2, 3])
    elif kind == "ReduceMean":
        g.add(kind, [x, g.constant(np.array([-2, -1]))], (channels, 1, 1))
    elif min(height, width) >= 2:
        shape = ((height - 2) // 2 + 1, (width - 2) // 2 + 1)
        g.add(kind, [x], (channels, *shape), kernel_shape=[2, 2], strides=[2, 2])


def _reshape(g: Draft, x: str) -> None:
    shape = g.shapes[x]
    kind = g.one("Flatten", "Reshape", "Transpose", "Squeeze")
    if kind == "Flatten":
        g.add(kind, [x], (math.prod(shape),))
    elif kind == "Reshape":
        target = g.one((math.prod(shape),), (shape[0], math.prod(shape[1:])))
        g.add(
            kind, [x, g.constant(np.array([0, -1] if len(target) == 1 else [0, *target]))], target
        )
    elif kind == "Transpose":
        order = g.draw(st.permutations(range(len(shape))))
        g.add(kind, [x], tuple(shape[i] for i in order), perm=[0, *(i + 1 for i in order)])
    elif len(shape) == 3 and shape[1:] == (1, 1):
        g.add("Squeeze", [x, g.constant(np.array([2, 3]))], shape[:1])


_BY_RANK: dict[int, tuple[Callable[[Draft, str], None], ...]] = {
    1: (_gemm, _gemm, _gemm, _activation, _elementwise, _concat),
    2: (_matmul, _matmul, _activation, _elementwise, _reshape, _concat),
    3: (
        _conv, _conv, _conv, _conv, _conv_transpose, _batch_norm, _activation, _activation,
        _elementwise, _concat, _pool, _reshape,
    ),
}  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn, *, mood: str, max_nodes: int = 10) -> onnx.ModelProto:
    """A model with input `x`; its output is any tensor that some node makes."""
    opset = draw(st.sampled_from(OPSETS))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    g = Draft(draw=draw, rng=rng, mood=mood, opset=opset)
    g.shapes["x"] = tuple(draw(st.integers(1, high)) for high in (8, 9, 9))
    wanted = draw(st.integers(1, max_nodes))
    while len(g.nodes) < wanted:
        names = list(g.shapes)
        # Mostly on from the last tensor: chains are what networks are made of.
        x = draw(st.sampled_from([*names, *names[-1:] * 2 * len(names)]))
        draw(st.sampled_from(_BY_RANK[len(g.shapes[x])]))(g, x)
    made = [name for name in g.shapes if name != "x"]
    output = draw(st.sampled_from([*made[-1:] * 4, *made]))
    return _model(g, output)


def _model(g: Draft, output: str) -> onnx.ModelProto:
    graph = helper.make_graph(
        g.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *g.shapes["x"]])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", *g.shapes[output]])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in g.constants.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", g.opset)],
        ir_version=_IR_OF_OPSET.get(g.opset, 11),
    )
