"""Quantized graphs: what runs in integers, what stays float, how close the outputs are."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autotune.compression.calibration import Calibration, Range, calibrate
from autotune.compression.effective import effective_precisions
from autotune.compression.inventory import precisions_of
from autotune.compression.operators import stream_sums
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.units import Unit
from autotune.compression.weights import block_matrix, quantize_weight
from autotune.errors import CompressionError
from search_spaces import FP32, INT8, W2, W4, W8, Precision
from tests.unit.compression_models import operators, quantizable, run, samples, tiny_source

TORCHVISION = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
FLOAT_WORK = {"Conv", "FusedConv", "Gemm", "FusedGemm", "HardSigmoid", "Sigmoid", "Mul", "Add"}


def uniform(graph: QuantizableGraph, precision: Precision = INT8) -> dict[str, Precision]:
    return {name: precision for name, u in graph.units.items() if precision in precisions_of(u)}


def with_kernels(unit: Unit) -> list[Precision]:
    """What onnxruntime's CPU provider on x86 has kernels for."""
    is_matrix = all(layer.is_matrix_product for layer in unit.layers)
    return [FP32, INT8, *([W8, W4, W2] if is_matrix else [])]


def quantize_static(model: onnx.ModelProto, x: np.ndarray, folder: Path) -> bytes:
    """The oracle: onnxruntime's own tool, u8s8, per channel, min-max."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_static as oracle

    class Reader:
        def __init__(self) -> None:
            self._rest = [{"input": sample[None]} for sample in x]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self._rest.pop(0) if self._rest else None

    onnx.save(model, folder / "fp32.onnx")
    oracle(
        folder / "fp32.onnx",
        folder / "int8.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return (folder / "int8.onnx").read_bytes()


@pytest.mark.parametrize("name", ["tiny", *TORCHVISION])
def test_uniform_int8_leaves_no_float_arithmetic_but_the_sums_of_streams(name: str) -> None:
    graph = quantizable(name)
    artifact = graph.emit(uniform(graph))
    executed = operators(artifact)
    assert not FLOAT_WORK & set(executed), executed
    sums = stream_sums(graph.view)
    assert executed["Sum"] == len(sums)
    # Beside the model's input, what layers read of streams.
    assert executed["QuantizeLinear"] == 1 + len(sums)
    onnx.checker.check_model(onnx.load_from_string(artifact))


@pytest.mark.parametrize("name", ["tiny", *TORCHVISION])
def test_a_mix_runs_as_planned_in_a_plain_session(name: str) -> None:
    graph = quantizable(name)
    rng = random.Random(7)
    plan = {n: rng.choice(with_kernels(u)) for n, u in graph.units.items()}
    report = effective_precisions(graph.emit(plan), graph.units.values(), plan)
    assert [(g.effective, g.reason) for g in report] == [(plan[g.group].name, None) for g in report]


@pytest.mark.parametrize("name", ["tiny", "mobilenet_v3_small"])
def test_a_mix_of_all_precisions_runs_as_planned_or_says_why_not(name: str) -> None:
    graph = quantizable(name)
    for seed in range(4):
        rng = random.Random(seed)
        plan = {n: rng.choice(precisions_of(u)) for n, u in graph.units.items()}
        report = effective_precisions(graph.emit(plan), graph.units.values(), plan)
        for group in report:
            kernels = {p.name for p in with_kernels(graph.units[group.group])}
            if group.planned in kernels:
                assert (group.effective, group.reason) == (group.planned, None)
            else:
                assert group.reason
                assert group.effective in ("fp32", "fp16")


@pytest.mark.parametrize("name", ["tiny", "mobilenet_v2"])
def test_each_group_alone_in_fp32_stays_float(name: str) -> None:
    graph = quantizable(name)
    for group in graph.units:
        plan = {**uniform(graph), group: FP32}
        report = effective_precisions(graph.emit(plan), graph.units.values(), plan)
        assert {g.group for g in report if g.effective == "fp32"} == {group}


@pytest.mark.parametrize("axis", [1, -1])
def test_softmax_between_codes_stays_float(axis: int) -> None:
    """The runtime's 8-bit Softmax answers 0 along an axis of one value, as the last one here."""
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.normal(size=(4, 2, 3, 3)).astype(np.float32),
        "b.weight": np.abs(rng.normal(size=(1, 4, 1, 1))).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "a.weight"], ["a"], "a"),
            helper.make_node("Softmax", ["a"], ["s"], "s", axis=axis),
            helper.make_node("Conv", ["s", "b.weight"], ["output"], "b"),
        ],
        "softmax",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 2, 3, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 1, 1, 1])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
    x = rng.normal(size=(4, 2, 3, 3)).astype(np.float32)
    quantized = QuantizableGraph(model, calibrate(model, x))
    artifact = quantized.emit(uniform(quantized))
    assert operators(artifact)["Softmax"] == 1
    assert run(artifact, x) == pytest.approx(run(model.SerializeToString(), x), rel=0.05)


def test_the_runtime_would_quantize_an_unguarded_float_convolution() -> None:
    """The reason for the guard: without it, the check itself reports the difference."""
    graph = quantizable("mobilenet_v2")
    group = "features.2.conv.1.0"
    plan = {**uniform(graph), group: FP32}
    model = onnx.load_from_string(graph.emit(plan))
    guards = [node for node in model.graph.node if node.name.endswith("/guard")]
    assert len(guards) == 1
    for node in model.graph.node:
        if node.output[0] == guards[0].input[0]:
            node.output[0] = guards[0].output[0]
    model.graph.node.remove(guards[0])
    report = effective_precisions(model.SerializeToString(), graph.units.values(), plan)
    changed = next(g for g in report if g.group == group)
    assert (changed.planned, changed.effective) == ("fp32", "w8a8")
    assert changed.reason is not None and group in changed.reason


def test_all_fp32_is_the_source_model() -> None:
    graph = quantizable("tiny")
    x = samples(4, seed=9)
    assert np.array_equal(run(graph.emit({}), x), run(tiny_source().fp32_bytes, x))


@pytest.mark.parametrize("precision", [INT8, W8, W4])
def test_quantized_outputs_stay_near_fp32(precision: Precision) -> None:
    graph = quantizable("tiny")
    x = samples(32, seed=9)
    expected = run(graph.emit({}), x)
    error = np.abs(run(graph.emit(uniform(graph, precision)), x) - expected).mean()
    allowed = {INT8: 0.06, W8: 0.01, W4: 0.06}[precision]
    assert 0 < error < allowed * expected.std()


def test_uniform_int8_is_as_close_to_fp32_as_quantize_static(tmp_path: Path) -> None:
    graph = quantizable("tiny")
    oracle = quantize_static(tiny_source().graph, samples(8), tmp_path)
    x = samples(64, seed=9)
    expected = run(graph.emit({}), x)
    ours = np.abs(run(graph.emit(uniform(graph)), x) - expected).mean()
    theirs = np.abs(run(oracle, x) - expected).mean()
    assert ours <= 1.05 * theirs


def test_outputs_equal_quantize_static_within_a_step_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On operators that both place alike: convolutions, ReLU, residual Add, pools, Gemm."""
    # The oracle's ranges hold what the ReLU behind the Add swallows as well.
    monkeypatch.setattr("autotune.compression.calibration.cut_terms", lambda view: {})
    model = plain_model()
    x = samples(16, (3, 16, 16))
    graph = QuantizableGraph(model, calibrate(model, x), equalize=False)
    held = graph.calibration.ranges["output"]
    # The oracle quantizes the logits too: its outputs end where the range ends.
    ours = np.clip(run(graph.emit(uniform(graph)), x), held.low, held.high)
    theirs = run(quantize_static(model, x, tmp_path), x)
    assert np.abs(ours - theirs).max() <= held.scale


def test_identical_plans_give_identical_bytes_in_another_process() -> None:
    graph = quantizable("tiny")
    plan = {name: p for name, p in uniform(graph).items() if "1" not in name}
    here = hashlib.sha256(graph.emit(plan)).hexdigest()
    graph.emit(uniform(graph, W4))  # whatever was built in between must not matter
    assert hashlib.sha256(graph.emit(dict(reversed(plan.items())))).hexdigest() == here
    script = (
        "import sys, hashlib, json, onnx\n"
        "from autotune.compression.calibration import Calibration\n"
        "from autotune.compression.quantization import QuantizableGraph\n"
        "from search_spaces import INT8\n"
        "model, ranges, names = sys.stdin.buffer.read().split(b'<split>')\n"
        "graph = QuantizableGraph(onnx.load_from_string(model), "
        "Calibration.from_text(ranges.decode()))\n"
        "data = graph.emit(dict.fromkeys(json.loads(names), INT8))\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    names = str(list(plan)).replace("'", '"')
    text = graph.calibration.to_text()
    stdin = b"<split>".join([tiny_source().fp32_bytes, text.encode(), names.encode()])
    there = subprocess.run(
        [sys.executable, "-c", script], input=stdin, capture_output=True, check=True
    )
    assert there.stdout.decode().strip() == here


def test_int4_weights_take_about_an_eighth_of_the_room() -> None:
    graph = quantizable("mobilenet_v2")
    group = "classifier.1"
    saved = len(graph.emit({})) - len(graph.emit({group: W4}))
    floats = 1280 * 10 * 4
    assert saved == pytest.approx(floats * (1 - 1 / 8 - 1 / 32), rel=0.03)


def test_an_unknown_group_is_named_beside_the_known_ones() -> None:
    with pytest.raises(CompressionError, match=r"no layer group 'nobody'; it has stem.0"):
        quantizable("tiny").emit({"nobody": INT8})


def test_a_constant_or_huge_channel_quantizes_without_overflow() -> None:
    weight = np.zeros((3, 4, 1, 1), np.float32)
    weight[1] = 1e-12
    bias = np.array([0.0, 5.0, -5.0], np.float32)
    quantized = quantize_weight(weight, axis=0, input_scale=0.01, bias=bias)
    assert np.abs(bias / (0.01 * quantized.scale)).max() <= 2**30 + 1
    assert (quantized.codes == 0).all()


def test_block_packing_restores_the_matrix() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    blocked = block_matrix(matrix, bits=4)
    codes, scale = blocked.codes, blocked.scale
    assert codes.shape == (5, 3, 16)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(5, 3, 32).astype(np.float32)
    restored = ((nibbles - 8) * scale.reshape(5, 3, 1)).reshape(5, 96)[:, :70]
    assert np.abs(restored - matrix).max() <= np.abs(scale).max()


def test_calibration_finds_the_least_and_the_largest_value_of_every_tensor() -> None:
    graph = quantizable("tiny")
    x = samples(8)
    ranges = graph.calibration.ranges
    assert ranges["input"] == Range(low=float(x.min()), high=float(x.max()))
    logits = run(tiny_source().fp32_bytes, x)
    assert ranges["output"].low == pytest.approx(logits.min(), abs=1e-5)
    assert ranges["output"].high == pytest.approx(logits.max(), abs=1e-5)


def test_calibration_survives_being_written_down() -> None:
    calibration = quantizable("tiny").calibration
    assert Calibration.from_text(calibration.to_text()) == calibration


def test_calibration_refuses_no_samples_and_nan() -> None:
    model = tiny_source().graph
    with pytest.raises(CompressionError, match="no calibration samples"):
        calibrate(model, samples(0))
    with pytest.raises(CompressionError, match="becomes NaN or infinite"):
        calibrate(model, np.full((2, 3, 16, 16), np.nan, np.float32))


def test_a_constant_calibration_sample_still_gives_a_running_model() -> None:
    model = tiny_source().graph
    graph = QuantizableGraph(model, calibrate(model, np.zeros((1, 3, 16, 16), np.float32)))
    assert np.isfinite(run(graph.emit(uniform(graph)), samples(2))).all()


def plain_model() -> onnx.ModelProto:
    """conv-relu, conv, Add, Relu, GlobalAveragePool, Flatten, Gemm."""
    rng = np.random.default_rng(3)
    weights = {
        "a.weight": rng.normal(0, 0.3, (8, 3, 3, 3)),
        "a.bias": rng.normal(0, 0.1, 8),
        "b.weight": rng.normal(0, 0.2, (8, 8, 3, 3)),
        "b.bias": rng.normal(0, 0.1, 8),
        "c.weight": rng.normal(0, 0.5, (5, 8)),
        "c.bias": rng.normal(0, 0.1, 5),
    }
    nodes = [
        helper.make_node("Conv", ["input", "a.weight", "a.bias"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], "r"),
        helper.make_node("Conv", ["r", "b.weight", "b.bias"], ["b"], "b", pads=[1] * 4),
        helper.make_node("Add", ["b", "r"], ["s"], "s"),
        helper.make_node("Relu", ["s"], ["t"], "t"),
        helper.make_node("GlobalAveragePool", ["t"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "c.weight", "c.bias"], ["output"], "c", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "plain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)
