"""Small float graphs written line by line, for tests of one pattern each."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autotune.compression.calibration import calibrate
from autotune.compression.cleanup import clean_up
from autotune.compression.quantization import QuantizableGraph


class Sketch:
    """A graph with one input `x`; every line returns the tensor that it makes.

    Weights are drawn so that activations keep their size; the same sketch gives the same graph.
    """

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self._rng = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}

    def constant(self, name: str, value: object) -> str:
        """A constant with the value given."""
        self._constants[name] = np.asarray(value)
        return name

    def drawn(self, name: str, *shape: int, spread: float = 1.0) -> str:
        """A constant drawn from a normal distribution."""
        return self.constant(name, self._rng.normal(0, spread, shape).astype(np.float32))

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: object) -> str:
        """A node with one output."""
        out = f"t{len(self._nodes)}"
        made = helper.make_node(operator, list(inputs), [out], name=name, **attributes)
        self._nodes.append(made)
        return out

    def conv(self, x: str, name: str, *weight: int, gain: float = 1.0, **attributes: object) -> str:
        """A convolution with bias; `weight` is (out, in / groups, height, width)."""
        spread = gain * float(np.prod(weight[1:])) ** -0.5
        filters = self.drawn(f"{name}.weight", *weight, spread=spread)
        bias = self.drawn(f"{name}.bias", weight[0], spread=0.1)
        return self.node("Conv", x, filters, bias, **attributes)

    def linear(self, x: str, name: str, taken: int, made: int) -> str:
        """A MatMul with an Add behind it, as exporters write a layer on sequences."""
        matrix = self.drawn(f"{name}.weight", taken, made, spread=taken**-0.5)
        product = self.node("MatMul", x, matrix)
        return self.node("Add", product, self.drawn(f"{name}.bias", made, spread=0.1))

    def model(self, output: str, *, opset: int = 20) -> onnx.ModelProto:
        """The graph in normal form."""
        values = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self._shape]),
            helper.make_tensor_value_info(output, TensorProto.FLOAT, None),
        ]
        constants = [numpy_helper.from_array(a, n) for n, a in self._constants.items()]
        graph = helper.make_graph(self._nodes, "sketch", values[:1], values[1:], constants)
        imports = [helper.make_opsetid("", opset)]
        return clean_up(helper.make_model(graph, opset_imports=imports, ir_version=10))

    def samples(self, n: int = 8) -> np.ndarray:
        """Inputs for it."""
        rng = np.random.default_rng(1)
        return rng.standard_normal((n, *self._shape)).astype(np.float32)

    def quantizable(self, output: str) -> QuantizableGraph:
        """The graph, calibrated."""
        model = self.model(output)
        return QuantizableGraph(model, calibrate(model, self.samples()))


def near(exact: np.ndarray, approximate: np.ndarray) -> float:
    """Signal to quantization noise in decibels; larger is nearer."""
    signal, noise = exact.astype(np.float64), (exact - approximate).astype(np.float64)
    return float(10 * np.log10((signal**2).sum() / max((noise**2).sum(), 1e-300)))
