"""Layer groups of an ONNX file in a style that torch does not write.

As Keras and older converters do: opset 13, IR version 3 with every initializer listed as an
input, weights without speaking names, Pad nodes in front of convolutions, BatchNormalization
as nodes, a Gemm that is not transposed, Reshapes whose first extent is the batch of 1.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autotune.compression.calibration import calibrate
from autotune.compression.effective import effective_precisions, optimized_graph
from autotune.compression.inventory import build_inventory
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.source import SourceModel, load_source_model
from autotune.spec import ModelSpec
from search_spaces import INT8
from tests.unit.compression_models import run
from tests.unit.sketches import near

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    path = tmp_path_factory.mktemp("foreign") / "model.onnx"
    path.write_bytes(keras_style().SerializeToString())
    return load(path)


def load(path: Path) -> SourceModel:
    return load_source_model(ModelSpec(source=f"onnx:{path}"), input_shape=SHAPE)


@pytest.fixture(scope="module")
def graph(source: SourceModel) -> QuantizableGraph:
    return QuantizableGraph(source.graph, calibrate(source.graph, images()))


def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((8, *SHAPE)).astype(np.float32)


def test_groups_are_named_after_the_nodes_and_found_by_pattern(source: SourceModel) -> None:
    groups = build_inventory(source).groups
    assert [(g.name, g.pattern.value, len(g.layers)) for g in groups] == [
        ("net/stem/Conv2D", "residual", 2),
        ("net/excite/down/Conv2D", "squeeze_excite", 2),
        ("net/left/Conv2D", "concat", 2),
        ("net/grow/Conv2DTranspose", "conv_transpose", 1),
        ("net/mix/depthwise", "conv_bn_act", 1),
        ("net/hidden/MatMul", "linear_act", 1),
        ("net/scores/Gemm", "classifier", 1),
    ]


def test_names_are_stable_between_runs(source: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "again.onnx"
    path.write_bytes(keras_style().SerializeToString())
    again = load(path)
    assert again.digest == source.digest
    assert build_inventory(again).groups == build_inventory(source).groups


def test_every_node_with_weights_is_in_exactly_one_group(source: SourceModel) -> None:
    held = {tensor.name for tensor in source.graph.graph.initializer}
    kinds = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    weighted = [n.name for n in source.graph.graph.node if n.op_type in kinds]
    assert all(n.input[1] in held for n in source.graph.graph.node if n.op_type in kinds)
    layers = [layer.name for group in build_inventory(source).groups for layer in group.layers]
    assert sorted(layers) == sorted(weighted)


def test_uniform_int8_runs_as_planned_but_the_transposed_convolution(
    graph: QuantizableGraph,
) -> None:
    plan = {name: INT8 for name in graph.units if name != "net/grow/Conv2DTranspose"}
    artifact = graph.emit(plan)
    report = effective_precisions(artifact, graph.units.values(), plan)
    assert {g.group: g.effective for g in report if g.effective != "w8a8"} == {
        "net/grow/Conv2DTranspose": "fp32"
    }
    assert all(g.reason is None for g in report)
    executed = Counter(node.op_type for node in optimized_graph(artifact).graph.node)
    assert (executed["QLinearConv"], executed["QLinearConcat"], executed["Pad"]) == (7, 1, 0)
    assert executed["Conv"] + executed["FusedConv"] + executed["BatchNormalization"] == 0


def test_uniform_int8_stays_near_fp32(source: SourceModel, graph: QuantizableGraph) -> None:
    plan = {name: INT8 for name in graph.units if name != "net/grow/Conv2DTranspose"}
    exact, int8 = run(source.fp32_bytes, images()), run(graph.emit(plan), images())
    assert near(exact, int8) > 25
    assert near(exact - exact.mean(axis=0), int8 - int8.mean(axis=0)) > 15


def test_the_normal_form_answers_as_the_file(source: SourceModel) -> None:
    single = np.concatenate([run(keras_style().SerializeToString(), x[None]) for x in images()])
    assert np.abs(run(source.fp32_bytes, images()) - single).max() < 1e-5


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
