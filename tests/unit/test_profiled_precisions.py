"""What the kernels in a device's profile tell of the precision that each group runs in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autotune.compression.inventory import build_inventory
from autotune.compression.layer_times import with_groups
from autotune.compression.profiled_precisions import SEEN_IN, seen_by_device
from device_agents.profile import profile
from device_agents.protocol import KernelTime, Profile
from device_agents.runtimes import RuntimeOptions, load_runtime
from search_spaces import INT8, Layer, LayerGroup, LayerKind, LayerPattern
from tests.unit.compression_models import quantizable, tiny_source

GROUP = LayerGroup(
    name="g",
    layers=tuple(
        Layer(
            name=name,
            kind=LayerKind.CONV,
            op_type="Conv",
            macs=1,
            parameters=1,
            weight_shape=(1, 1, 1, 1),
            input_shape=(1, 1, 1),
            output_shape=(1, 1, 1),
        )
        for name in ("a", "b")
    ),
    nodes=("a", "b"),
    precisions=("fp32", "w8a8"),
)


def entry(planned: str, effective: str | None) -> dict[str, object]:
    return {"group": "g", "planned": planned, "effective": effective, "reason": "r", "seen_in": "s"}


def told(planned: str, *operators: str, group: LayerGroup = GROUP) -> tuple[object, object, object]:
    """Effective precision, reason and where it was seen, of two layers behind those kernels."""
    kernels = [
        KernelTime(name=f"k{i}", operator=operator, time_ns=1.0, group="g")
        for i, operator in enumerate(operators)
    ]
    (found,) = seen_by_device([entry(planned, "before")], Profile(kernels=tuple(kernels)), [group])
    return found["effective"], found["reason"], found["seen_in"]


@pytest.mark.parametrize(
    ("planned", "operators"),
    [
        ("w8a8", ["QLinearConv", "QLinearConv", "QLinearAdd"]),
        ("w8a8", ["QLinearMatMul", "MatMulIntegerToFloat", "MatMul"]),
        ("fp32", ["FusedConv", "Conv", "QLinearConv"]),
        ("w4", ["MatMulNBits", "MatMulNBits"]),
    ],
)
def test_kernels_that_fit_the_plan_confirm_it(planned: str, operators: list[str]) -> None:
    assert told(planned, *operators) == (planned, None, SEEN_IN)


def test_a_float_kernel_in_an_8_bit_group_makes_it_float_whatever_a_stand_in_showed() -> None:
    effective, reason, seen_in = told("w8a8", "QLinearConv", "FusedConv")
    assert (effective, seen_in) == ("fp32", SEEN_IN)
    assert reason == "the device computes it in FusedConv"


def test_integer_kernels_in_an_fp32_group_are_told() -> None:
    effective, reason, _ = told("fp32", "QLinearConv", "QLinearConv")
    assert (effective, reason) == ("w8a8", "the device computes it in QLinearConv")


@pytest.mark.parametrize("operators", [[], ["QLinearConv"], ["TRTKernel"], ["Convolution"] * 2])
def test_kernels_that_may_not_be_all_of_the_layers_change_nothing(operators: list[str]) -> None:
    assert told("w8a8", *operators) == ("before", "r", "s")


def test_attentions_own_products_are_not_taken_for_layers() -> None:
    layers = GROUP.layers * 2
    attention = replace(GROUP, layers=layers, pattern=LayerPattern.ATTENTION)
    quantized = ["MatMulIntegerToFloat"] * 4 + ["MatMul"] * 2
    assert told("w8a8", *quantized, group=attention)[0] == "w8a8"
    assert told("w8a8", *quantized[1:], group=attention)[0] == "before", "one was not found"
    assert told("w8a8", *["MatMul"] * 6, group=attention)[0] == "fp32"


def test_onnxruntimes_profile_confirms_uniform_8_bit(tmp_path: Path) -> None:
    graph, path = quantizable("tiny"), tmp_path / "model.onnx"
    path.write_bytes(graph.emit(dict.fromkeys(graph.units, INT8)))
    options = RuntimeOptions(provider="CPUExecutionProvider", threads=1)
    found = Profile(**profile(load_runtime("onnxruntime"), path, options, seed=0))
    groups = build_inventory(tiny_source()).groups
    entries = [{"group": g.name, "planned": "w8a8", "effective": None} for g in groups]
    told = seen_by_device(entries, with_groups(found, path.read_bytes(), groups), groups)
    assert {(e["effective"], e["seen_in"]) for e in told} == {("w8a8", SEEN_IN)}
