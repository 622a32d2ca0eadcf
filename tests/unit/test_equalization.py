"""Stretched channels: the same function in FP32, fewer errors in 8 bits, only where they may be."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autotune.compression.calibration import ChannelRange, calibrate
from autotune.compression.equalization import Equalization, scaled_weight
from autotune.compression.free_channels import FreeChannels
from autotune.compression.graph import GraphView, model_bytes
from autotune.compression.hard_swish import gate_arrays, swish_factors
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.rounding import Rounding, round_weights
from autotune.compression.units import find_layers
from search_spaces import FP32, INT8
from tests.unit.compression_models import operators, run, samples, tiny_source


def chain(activation: str, *, gains: np.ndarray, pad: int = 0) -> onnx.ModelProto:
    """conv, activation, conv, pool, Gemm; the first conv's channels have those gains."""
    rng, n = np.random.default_rng(0), len(gains)
    one = rng.normal(0, 0.3, (n, 3, 3, 3)) * gains[:, None, None, None]
    arrays = {
        "a.weight": one,
        "a.bias": rng.normal(0.5, 0.1, n) * gains,
        "b.weight": rng.normal(0, 0.3, (8, n, 3, 3)) / gains[None, :, None, None],
        "b.bias": rng.normal(0, 0.1, 8),
        "c.weight": rng.normal(0, 0.5, (5, 8)),
        "c.bias": rng.normal(0, 0.1, 5),
        "lo": np.array(0.0),
        "hi": np.array(6.0),
    }
    middle = {
        "Relu": [helper.make_node("Relu", ["a"], ["r"], "r")],
        "Clip": [helper.make_node("Clip", ["a", "lo", "hi"], ["r"], "r")],
        "HardSwish": [helper.make_node("HardSwish", ["a"], ["r"], "r")],
        "None": [],
    }[activation]
    nodes = [
        helper.make_node("Conv", ["input", "a.weight", "a.bias"], ["a"], "a", pads=[1] * 4),
        *middle,
        helper.make_node(
            "Conv", ["r" if middle else "a", "b.weight", "b.bias"], ["b"], "b", pads=[pad] * 4
        ),
        helper.make_node("GlobalAveragePool", ["b"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "c.weight", "c.bias"], ["output"], "c", transB=1),
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in arrays.items() if n in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


SPREAD = np.exp2(np.arange(8.0) - 4)
MANY = np.exp2(np.arange(32.0) / 8 - 1)
X = samples(32)


def equalization(model: onnx.ModelProto) -> Equalization:
    return Equalization(GraphView(model), calibrate(model, X))


@pytest.mark.parametrize("activation", ["Relu", "None"])
def test_folded_into_the_weights_the_fp32_function_stays(activation: str) -> None:
    model = chain(activation, gains=SPREAD)
    view, stretched = GraphView(model), equalization(model).whole
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    arrays = {}
    for layer in find_layers(view):
        before, after = stretched.get(layer.input), stretched.get(layer.output)
        weight, bias = view.array(layer.weight), view.array(layer.bias).astype(np.float64)
        if before is not None:
            moved = scaled_weight(weight, layer, inputs=before.offsets)
            bias = bias + moved.sum(axis=tuple(range(1, weight.ndim)))
        gain = 1.0 if after is None else after.factors
        arrays[layer.bias] = gain * (bias - (0.0 if after is None else after.offsets))
        arrays[layer.weight] = scaled_weight(
            weight,
            layer,
            inputs=None if before is None else 1 / before.factors,
            outputs=None if after is None else after.factors,
        )
    for tensor in changed.graph.initializer:
        array = arrays[tensor.name].astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert stretched["a"].factors.max() > 4
    assert stretched["a"].offsets.any() == (activation == "None")
    expected = run(model_bytes(model), X)
    assert run(model_bytes(changed), X) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("activation", ["Relu", "Clip", "None"])
def test_badly_spread_channels_lose_no_more_than_even_ones(activation: str) -> None:
    errors = {}
    for name, gains in (("even", np.ones(8)), ("spread", SPREAD)):
        model = chain(activation, gains=gains if activation != "Clip" else np.minimum(gains, 1))
        expected, calibration = run(model_bytes(model), X), calibrate(model, X)
        for kind, held in (("with", calibration), ("without", without_channels(calibration))):
            graph = QuantizableGraph(model, held)
            found = run(graph.emit(dict.fromkeys(graph.units, INT8)), X)
            errors[name, kind] = float(np.abs(found - expected).mean() / expected.std())
    assert errors["spread", "without"] > 2 * errors["spread", "with"]
    assert errors["spread", "with"] < 2 * errors["even", "with"]


def test_relu6_keeps_its_bound_in_every_stretched_channel() -> None:
    model = chain("Clip", gains=np.minimum(SPREAD, 1))
    stretched = equalization(model).whole["r"]
    assert stretched.factors.min() >= 1
    assert stretched.held.high <= 6
    assert (stretched.held.high / stretched.factors <= 6).all()


def test_a_hard_swish_of_few_channels_pins_them() -> None:
    model = chain("HardSwish", gains=SPREAD)
    free = FreeChannels(GraphView(model))
    assert (free.variables("a") == -1).all() and (free.variables("r") == -1).all()
    assert not {"a", "r"} & set(equalization(model).whole)


def test_a_hard_swish_passes_factors_on_and_its_gate_takes_them_back() -> None:
    model = chain("HardSwish", gains=MANY)
    stretched = equalization(model).whole
    assert stretched["a"].factors.max() > 1.5
    assert (stretched["a"].factors == stretched["r"].factors).all()
    weight, bias = gate_arrays(stretched["a"].factors)
    x = np.linspace(-4, 4, 32)
    again = weight.ravel() * stretched["a"].factors * x + bias
    assert again == pytest.approx(x + 3, abs=1e-6)


def test_a_stretched_hard_swish_is_rounded_less_by_as_many_8_bit_kernels() -> None:
    model = chain("HardSwish", gains=MANY)
    expected, calibration = run(model_bytes(model), X), calibrate(model, X)
    errors, kernels = {}, {}
    for kind, held in (("with", calibration), ("without", without_channels(calibration))):
        graph = QuantizableGraph(model, held)
        artifact = graph.emit(dict.fromkeys(graph.units, INT8))
        errors[kind] = float(np.abs(run(artifact, X) - expected).mean())
        kernels[kind] = operators(artifact)
    assert errors["with"] < 0.8 * errors["without"]
    assert kernels["with"].total() == kernels["without"].total()
    assert kernels["with"]["QLinearConv"] == 1 + kernels["without"]["QLinearConv"]
    assert kernels["with"]["QLinearAdd"] == kernels["without"]["QLinearAdd"] - 1


def test_a_hard_swish_keeps_its_cheaper_gate_where_little_is_gained() -> None:
    taken = ChannelRange(low=(-3.0,) * 8, high=(5.0, *(4.0,) * 7))
    made = ChannelRange(low=(-0.375,) * 8, high=taken.high)
    assert (swish_factors(np.array([1.0, *[1.05] * 7]), taken, made) == 1).all()
    narrow = dataclasses.replace(made, high=(5.0, *(1.0,) * 7))
    factors = swish_factors(np.array([1.0, *[4.0] * 7]), narrow, narrow)
    assert factors[0] == 1 and (factors[1:] > 2).all()


def test_zero_padding_forbids_an_offset() -> None:
    assert equalization(chain("None", gains=SPREAD)).whole["a"].offsets.any()
    assert not equalization(chain("None", gains=SPREAD, pad=1)).whole["a"].offsets.any()


def test_channels_are_stretched_only_where_every_neighbour_computes_on_codes() -> None:
    model = chain("Relu", gains=SPREAD)
    calibration = calibrate(model, X)
    graph = QuantizableGraph(model, calibration)
    plain = QuantizableGraph(model, without_channels(calibration))
    alone = {"a": INT8, "b": FP32, "c": FP32}
    assert graph.emit(alone) == plain.emit(alone)
    uniform = dict.fromkeys("abc", INT8)
    assert graph.emit(uniform) != plain.emit(uniform)


def test_a_residual_stream_is_scaled_as_one() -> None:
    free = FreeChannels(GraphView(tiny_source().graph))
    view = GraphView(tiny_source().graph)
    adds = [n for n in view.nodes if n.op_type == "Add" and len(view.data_inputs(n)) == 2]
    assert adds
    for add in adds:
        left, right, out = (free.variables(name) for name in (*add.input, add.output[0]))
        assert (left == right).all() and (left == out).all()


def test_rounded_weights_come_closer_than_nearest_codes() -> None:
    model = tiny_source().graph
    calibration, view = calibrate(model, X), GraphView(model)
    stretched = Equalization(view, calibration).whole
    rounding = round_weights(view, X, stretched)
    x = samples(64, seed=9)
    expected = run(model_bytes(model), x)
    errors = []
    for held in (rounding, Rounding()):
        graph = QuantizableGraph(model, calibration, rounding=held)
        found = run(graph.emit(dict.fromkeys(graph.units, INT8)), x)
        errors.append(float(((found - expected) ** 2).mean()))
    assert errors[0] < errors[1]


def without_channels(calibration: object) -> object:
    import dataclasses

    return dataclasses.replace(calibration, channels={})


def test_a_single_channel_joined_with_itself_is_calibrated() -> None:
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], "a", strides=[2, 2]),
        helper.make_node("Concat", ["a", "a"], ["j"], "j", axis=1),
        helper.make_node("Conv", ["j", "b.weight"], ["output"], "b"),
    ]
    graph = helper.make_graph(
        nodes,
        "joined",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 3, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 1, 2, 2])],
        [
            numpy_helper.from_array(np.full((1, 1, 1, 1), 0.125, np.float32), "a.weight"),
            numpy_helper.from_array(np.array([[[[-0.1]], [[0.5]]]], np.float32), "b.weight"),
        ],
    )
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
    x = np.random.default_rng(0).normal(size=(8, 1, 3, 3)).astype(np.float32)
    whole = Equalization(GraphView(model), calibrate(model, x)).whole
    assert all((stretched.factors >= 1).all() for stretched in whole.values())
