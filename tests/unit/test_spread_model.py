"""Badly spread channels: what uniform INT8 loses comes back where the worst groups stay FP32.

Equalization, which would undo the spread, is off: these tests are about the float groups.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

from autotune.compression.calibration import calibrate
from autotune.compression.effective import effective_precisions
from autotune.compression.quantization import QuantizableGraph
from search_spaces import FP32, INT8, Precision
from tests.unit.compression_models import run

NAMES = ("one", "two", "three")
SPREAD = 4.0
"""Channels differ by factors of up to 2 ** (2 * SPREAD)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A digit classifier before and after its channels were rescaled, with held-out digits."""

    plain: onnx.ModelProto
    spread: onnx.ModelProto
    x: np.ndarray
    y: np.ndarray
    calibration: np.ndarray


def test_the_spread_model_computes_the_same_function() -> None:
    planted = model()
    before = run(planted.plain.SerializeToString(), planted.x)
    after = run(planted.spread.SerializeToString(), planted.x)
    assert np.allclose(before, after, atol=1e-3 * np.abs(before).max())


def test_uniform_int8_loses_on_the_spread_model_and_nothing_on_the_plain_one() -> None:
    planted = model()
    plain = QuantizableGraph(planted.plain, calibrate(planted.plain, planted.calibration))
    loss = accuracy(planted.plain.SerializeToString()) - accuracy(emit(plain, INT8))
    assert loss < 0.02
    assert fp32_accuracy() - accuracy(emit(quantizable(), INT8)) > 0.03


def test_the_groups_at_the_spread_are_the_worst() -> None:
    graph = quantizable()
    damage = {name: mean_kl(graph.emit({name: INT8})) for name in graph.units}
    assert set(worst(damage)) == {"two", "three"}
    assert min(damage["two"], damage["three"]) > 10 * max(damage["one"], damage["head"])


def test_accuracy_comes_back_in_a_default_session_with_the_worst_groups_in_fp32() -> None:
    graph = quantizable()
    plan = {name: FP32 if name in ("two", "three") else INT8 for name in graph.units}
    artifact = graph.emit(plan)
    report = effective_precisions(artifact, graph.units.values(), plan)
    assert {g.group for g in report if g.effective == "fp32"} == {"two", "three"}
    assert all(g.reason is None for g in report)
    assert accuracy(artifact) > fp32_accuracy() - 0.01
    assert mean_kl(artifact) < 0.05 * mean_kl(emit(graph, INT8))


@pytest.mark.parametrize("kept", ["one", "two", "three"])
def test_a_group_left_in_fp32_needs_no_session_option(kept: str) -> None:
    """WeightBiasQuantization may look at the file; there is nothing for it to change."""
    graph, x = quantizable(), model().x
    artifact = graph.emit({name: INT8 for name in graph.units if name != kept})
    without = onnxruntime.InferenceSession(
        artifact,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    assert np.array_equal(run(artifact, x), without.run(None, {"input": x})[0])


def worst(damage: dict[str, float]) -> list[str]:
    return sorted(damage, key=lambda name: -damage[name])[:2]


def emit(graph: QuantizableGraph, precision: Precision) -> bytes:
    return graph.emit(dict.fromkeys(graph.units, precision))


@functools.cache
def fp32_accuracy() -> float:
    return accuracy(model().spread.SerializeToString())


def accuracy(artifact: bytes) -> float:
    planted = model()
    return float((run(artifact, planted.x).argmax(axis=1) == planted.y).mean())


def mean_kl(artifact: bytes) -> float:
    planted = model()
    expected = log_softmax(run(planted.spread.SerializeToString(), planted.x))
    got = log_softmax(run(artifact, planted.x))
    return float((np.exp(expected) * (expected - got)).sum(axis=1).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = 8 * (logits - logits.max(axis=1, keepdims=True))  # a ridge head is too unsure
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@functools.cache
def quantizable() -> QuantizableGraph:
    planted = model()
    calibration = calibrate(planted.spread, planted.calibration)
    return QuantizableGraph(planted.spread, calibration, equalize=False)


@functools.cache
def model() -> Planted:
    """Random convolutions and a head fitted to digits by ridge regression: 94 % without training.

    The channels between the second and the third convolution are rescaled: ReLU lets a positive
    factor through, so the function stays what it was.
    """
    digits = load_digits()
    x = (digits.images[:, None] / 16).astype(np.float32)
    train, test = slice(0, 1200), slice(1200, None)
    rng = np.random.default_rng(0)
    weights = {}
    for name, (out, into) in zip(NAMES, ((16, 1), (24, 16), (32, 24)), strict=True):
        deviation = np.sqrt(2 / (9 * into))
        weights[f"{name}.weight"] = rng.normal(0, deviation, (out, into, 3, 3))
        weights[f"{name}.bias"] = rng.normal(0, 0.1, out)
    features = run(network(weights, n_outputs=512).SerializeToString(), x)
    design = np.c_[features[train], np.ones(1200)].astype(np.float64)
    target = np.eye(10)[digits.target[train]]
    gram = design.T @ design + 10.0 * np.eye(design.shape[1])
    head = np.linalg.solve(gram, design.T @ target)
    weights |= {"head.weight": head[:-1].T, "head.bias": head[-1]}
    factors = 2.0 ** rng.uniform(-SPREAD, SPREAD, 24)
    spread = dict(weights)
    spread["two.weight"] = weights["two.weight"] * factors[:, None, None, None]
    spread["two.bias"] = weights["two.bias"] * factors
    spread["three.weight"] = weights["three.weight"] / factors[None, :, None, None]
    return Planted(
        plain=network(weights, n_outputs=10),
        spread=network(spread, n_outputs=10),
        x=x[test],
        y=digits.target[test],
        calibration=x[train][:128],
    )


def network(weights: dict[str, np.ndarray], *, n_outputs: int) -> onnx.ModelProto:
    """Three convolutions with ReLU, flattened; a Gemm where there are weights for it."""
    nodes, tensor = [], "input"
    for index, name in enumerate(NAMES):
        inputs = [tensor, f"{name}.weight", f"{name}.bias"]
        strides = [2, 2] if index == 2 else [1, 1]
        nodes.append(helper.make_node("Conv", inputs, [name], name, pads=[1] * 4, strides=strides))
        nodes.append(helper.make_node("Relu", [name], [f"{name}.r"], f"{name}.r"))
        tensor = f"{name}.r"
    has_head = "head.weight" in weights
    nodes.append(
        helper.make_node("Flatten", [tensor], ["flat" if has_head else "output"], "flatten")
    )
    if has_head:
        inputs = ["flat", "head.weight", "head.bias"]
        nodes.append(helper.make_node("Gemm", inputs, ["output"], "head", transB=1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", n_outputs])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)
