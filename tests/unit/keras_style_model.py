"""An ONNX file in a style that torch does not write.

As Keras and older converters do: opset 13, IR version 3 with every initializer listed as an
input, weights without speaking names, Pad nodes in front of convolutions, BatchNormalization
as nodes, a Gemm that is not transposed, Reshapes whose first extent is the batch of 1.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autotune.compression.source import SourceModel, load_source_model
from autotune.spec import ModelSpec

SHAPE = (3, 32, 32)


def keras_style_source() -> SourceModel:
    """The file as a job takes it: read from disk, into its normal form."""
    with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(keras_style().SerializeToString(deterministic=True))
        return load_source_model(ModelSpec(source=f"onnx:{path}"), input_shape=SHAPE)


@functools.cache
def keras_style() -> onnx.ModelProto:
    """Stem, squeeze-and-excite, residual Add, Concat, upsampling, depthwise, two dense layers."""
    build = _Builder()
    stem = build.conv_bn("images", "net/stem/Conv2D", (16, 3, 3, 3), padded=1, strides=[2, 2])
    stem = build.node("Relu", stem)
    mean = build.node("ReduceMean", stem, axes=[2, 3], keepdims=1)
    down = build.node("Relu", build.conv(mean, "net/excite/down/Conv2D", (4, 16, 1, 1)))
    gate = build.node("Sigmoid", build.conv(down, "net/excite/up/Conv2D", (16, 4, 1, 1)))
    excited = build.node("Mul", stem, gate)
    body = build.conv_bn(excited, "net/body/Conv2D", (16, 16, 3, 3), padded=1)
    x = build.node("Relu", build.node("Add", body, stem))
    left = build.clipped(build.conv_bn(x, "net/left/Conv2D", (8, 16, 1, 1)))
    right = build.clipped(build.conv_bn(x, "net/right/Conv2D", (8, 16, 3, 3), padded=1))
    joined = build.node("Concat", left, right, axis=1)
    weight = build.drawn((16, 8, 2, 2), 0.2)
    grown = build.node("ConvTranspose", joined, weight, name="net/grow/Conv2DTranspose",
                       strides=[2, 2])  # fmt: skip
    mixed = build.conv_bn(grown, "net/mix/depthwise", (8, 1, 3, 3), padded=1, group=8)
    pooled = build.node("AveragePool", build.node("Relu", mixed), kernel_shape=[8, 8],
                        strides=[8, 8])  # fmt: skip
    flat = build.node("Reshape", pooled, build.held(np.array([1, 8 * 4 * 4])))
    hidden = build.node("MatMul", flat, build.drawn((128, 32), 0.1), name="net/hidden/MatMul")
    hidden = build.node("Relu", build.node("Add", hidden, build.drawn((32,), 0.1)))
    scores = build.node("Gemm", hidden, build.drawn((32, 6), 0.3), build.drawn((6,), 0.1),
                        name="net/scores/Gemm", transB=0)  # fmt: skip
    return build.model(build.node("Softmax", scores, axis=1), classes=6)


class _Builder:
    def __init__(self) -> None:
        self._rng = np.random.default_rng(5)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def held(self, array: np.ndarray) -> str:
        name = f"const_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def drawn(self, shape: tuple[int, ...], spread: float) -> str:
        return self.held(self._rng.normal(0, spread, shape).astype(np.float32))

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: object) -> str:
        out = f"tensor_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [out], name=name, **attributes))
        return out

    def conv(self, x: str, name: str, weight: tuple[int, ...], **attributes: object) -> str:
        filters = self.drawn(weight, float(np.prod(weight[1:])) ** -0.5)
        return self.node("Conv", x, filters, name=name, **attributes)

    def conv_bn(
        self, x: str, name: str, weight: tuple[int, ...], *, padded: int = 0, **attributes: object
    ) -> str:
        if padded:
            amounts = np.array([0, 0, padded, padded] * 2)
            x = self.node("Pad", x, self.held(amounts))
        made = self.conv(x, name, weight, **attributes)
        statistics = [self.drawn((weight[0],), 0.3) for _ in range(2)]
        gain = self.held(self._rng.uniform(0.5, 1.5, weight[0]).astype(np.float32))
        spread = self.held(self._rng.uniform(0.5, 2, weight[0]).astype(np.float32))
        return self.node("BatchNormalization", made, gain, *statistics, spread, epsilon=1e-3)

    def clipped(self, x: str) -> str:
        bounds = [self.held(np.array(v, np.float32)) for v in (0, 6)]
        return self.node("Clip", x, *bounds)

    def model(self, output: str, *, classes: int) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, *SHAPE])]
        inputs += [
            helper.make_tensor_value_info(c.name, c.data_type, c.dims) for c in self._constants
        ]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, classes])]
        graph = helper.make_graph(self._nodes, "keras", inputs, outputs, self._constants)
        imports = [helper.make_opsetid("", 13)]
        return helper.make_model(
            graph, opset_imports=imports, ir_version=3, producer_name="another converter"
        )
