"""Layer groups of real models: every pattern found, every group run as planned."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from autotune.compression.calibration import calibrate
from autotune.compression.effective import effective_precisions, optimized_graph
from autotune.compression.inventory import build_inventory
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.source import SourceModel
from search_spaces import FP32, INT8, LayerInventory, Precision
from tests.unit.compression_models import run, samples, torchvision_source
from tests.unit.sketches import near

# Per model, its groups by pattern, what still computes in float under uniform INT8, and the
# least signal to noise in decibels: of the outputs, and of what tells samples apart.
EXPECTED: dict[str, tuple[dict[str, int], dict[str, int], float, float]] = {
    "resnet18": ({"conv_bn_act": 8, "residual": 4, "classifier": 1}, {}, 29, 14),
    "resnet50": ({"conv_bn_act": 33, "residual": 4, "classifier": 1}, {}, 26, 6),
    "mobilenet_v2": ({"conv_bn_act": 37, "residual": 5, "classifier": 1}, {"Sum": 9}, 22, 11),
    "mobilenet_v3_small": (
        {"conv_bn_act": 24, "squeeze_excite": 9, "residual": 4, "linear_act": 1, "classifier": 1},
        {"Sum": 4},
        22,
        16,
    ),
    "efficientnet_b0": (
        {"conv_bn_act": 35, "squeeze_excite": 16, "residual": 5, "classifier": 1},
        {"Sum": 7},
        18,
        17,
    ),
    "regnet_y_400mf": (
        {"conv_bn_act": 33, "squeeze_excite": 16, "residual": 4, "classifier": 1},
        {},
        28,
        16,
    ),
    "squeezenet1_1": ({"conv_bn_act": 9, "concat": 8, "classifier": 1}, {}, 31, 12),
    "densenet121": ({"conv_bn_act": 120, "classifier": 1}, {}, 30, 9),
    # The residual stream of a transformer goes to LayerNorms: it stays float and ties nothing.
    "convnext_tiny": (
        {"conv_bn_act": 22, "linear_act": 36, "classifier": 1},
        {"LayerNormalization": 23, "BiasGelu": 18, "Mul": 18, "Add": 36},
        25,
        24,
    ),
    "vit_b_16": (
        {"conv_bn_act": 1, "attention": 12, "linear_act": 24, "classifier": 1},
        {"LayerNormalization": 25, "BiasGelu": 12, "Softmax": 12, "MatMul": 12,
         "FusedMatMul": 12, "Add": 49, "Concat": 1},
        26,
        23,
    ),
}  # fmt: skip
# What is no group and has no 8-bit kernel. The products of activations are attention's.
LISTED = {
    "convnext_tiny": {"Gelu": 18, "LayerNormalization": 23},
    "vit_b_16": {"Gelu": 12, "LayerNormalization": 25, "MatMul": 24, "Softmax": 12},
}
FLOAT_WORK = {
    "Add", "BatchNormalization", "BiasGelu", "Concat", "Conv", "FusedConv", "FusedGemm",
    "FusedMatMul", "Gelu", "Gemm", "HardSigmoid", "LayerNormalization", "MatMul", "Mul", "Relu",
    "Sigmoid", "Softmax", "Sum",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model with its uniform INT8 file."""

    name: str
    source: SourceModel
    inventory: LayerInventory
    graph: QuantizableGraph
    int8: bytes

    @property
    def uniform(self) -> dict[str, Precision]:
        return dict.fromkeys(self.graph.units, INT8)


SLOW = ("vit_b_16",)  # 86 million weights to draw, trace and write


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXPECTED],
)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Exported once; each model's tests run one after the other."""
    source = torchvision_source(request.param)
    graph = QuantizableGraph(source.graph, calibrate(source.graph, images(8)))
    yield Model(
        name=request.param,
        source=source,
        inventory=build_inventory(dataclasses.replace(source, module=None)),
        graph=graph,
        int8=graph.emit(dict.fromkeys(graph.units, INT8)),
    )


def images(n: int) -> np.ndarray:
    return samples(n, (3, 64, 64))


def test_every_pattern_is_found(model: Model) -> None:
    found = Counter(group.pattern.value for group in model.inventory.groups)
    assert found == EXPECTED[model.name][0]


def test_every_node_with_weights_is_in_exactly_one_group(model: Model) -> None:
    held = {tensor.name for tensor in model.source.graph.graph.initializer}
    weighted = [
        node.name
        for node in model.source.graph.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in held
    ]
    layers = [layer.name for group in model.inventory.groups for layer in group.layers]
    assert sorted(layers) == sorted(weighted)


def test_no_node_is_in_two_groups(model: Model) -> None:
    nodes = Counter(name for group in model.inventory.groups for name in group.nodes)
    assert {name: n for name, n in nodes.items() if n > 1} == {}


def test_uniform_int8_runs_as_planned(model: Model) -> None:
    onnx.checker.check_model(onnx.load_from_string(model.int8))
    report = effective_precisions(model.int8, model.graph.units.values(), model.uniform)
    assert [g for g in report if (g.effective, g.reason) != ("w8a8", None)] == []


def test_only_what_has_no_8_bit_kernel_computes_in_float(model: Model) -> None:
    executed = Counter(node.op_type for node in floats_of(optimized_graph(model.int8)))
    assert {op: n for op, n in executed.items() if op in FLOAT_WORK} == EXPECTED[model.name][1]


def test_uniform_int8_stays_near_fp32(model: Model) -> None:
    x = images(8)
    exact, int8 = run(model.source.fp32_bytes, x), run(model.int8, x)
    whole, apart = EXPECTED[model.name][2:]
    assert near(exact, int8) >= whole
    mean = exact.mean(axis=0)
    assert near(exact - mean, int8 - mean) >= apart


def test_arithmetic_that_stays_float_in_every_candidate_is_listed(model: Model) -> None:
    listed = {entry.operator: entry.count for entry in model.inventory.float_operators}
    moved = ("Expand", "Gather")
    assert {op: n for op, n in listed.items() if op not in moved} == LISTED.get(model.name, {})


def test_a_random_mix_runs_as_planned(model: Model) -> None:
    rng = random.Random(11)
    plan = {name: rng.choice((FP32, INT8)) for name in model.graph.units}
    report = effective_precisions(model.graph.emit(plan), model.graph.units.values(), plan)
    assert [g for g in report if g.effective != g.planned or g.reason] == []


def floats_of(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes without those that compute shapes."""
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(graph).graph.value_info
    }
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return [n for n in graph.graph.node if kinds.get(n.output[0]) not in integers]
