"""Why a group does not run as planned: each cause is told from the graph that really runs."""

from __future__ import annotations

import platform

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from autotune.compression.effective import GroupPrecision, effective_precisions
from autotune.compression.kernels import ARM_DOT, ARM_DOT_HALF, X86_VNNI, as_checked_here
from autotune.compression.quantization import QuantizableGraph
from search_spaces import FP16, INT8, Precision
from tests.unit.compression_models import quantizable


def judge(model: onnx.ModelProto, group: str, planned: Precision = INT8) -> GroupPrecision:
    graph = quantizable("tiny")
    report = effective_precisions(model.SerializeToString(), graph.units.values(), {group: planned})
    return next(entry for entry in report if entry.group == group)


def emitted(group: str, precision: Precision = INT8) -> onnx.ModelProto:
    return onnx.load_from_string(quantizable("tiny").emit({group: precision}))


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def test_a_layer_between_q_and_dq_runs_in_integers() -> None:
    entry = judge(emitted("mix.0"), "mix.0")
    assert (entry.effective, entry.reason, entry.stored_bits) == ("w8a8", None, 8)


def test_a_float_consumer_of_a_quantized_layer_is_named() -> None:
    model = emitted("mix.0")
    conv = node_of(model, "mix.0")
    taker = next(n for n in model.graph.node if conv.output[0] in n.input)
    where = list(model.graph.node).index(taker)
    model.graph.node.insert(where, helper.make_node("Exp", [conv.output[0]], ["e"], "exp"))
    model.graph.output.append(helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, None))
    entry = judge(model, "mix.0")
    assert entry.effective == "fp32"
    assert "float consumer: 'mix.0'" in (entry.reason or "")


def test_a_float_input_of_a_quantized_layer_is_named() -> None:
    model = emitted("mix.0")
    conv = node_of(model, "mix.0")
    quantized = {n.output[0]: n for n in model.graph.node}
    conv.input[0] = quantized[quantized[conv.input[0]].input[0]].input[0]
    entry = judge(model, "mix.0")
    assert entry.effective == "fp32"
    assert "un-fused Q/DQ: 'mix.0' gets its data as float" in (entry.reason or "")


def test_a_missing_kernel_is_named() -> None:
    """On x86, onnxruntime has none for signed activations behind a MaxPool."""
    signed = QuantizableGraph(
        quantizable("tiny").fp32, quantizable("tiny").calibration, kernels=ARM_DOT
    )
    plan = dict.fromkeys(signed.units, INT8)
    report = effective_precisions(signed.emit(plan), signed.units.values(), plan)
    missing = [g for g in report if g.effective == "fp32"]
    if as_checked_here(ARM_DOT) == ARM_DOT:
        pytest.skip("this machine has the kernels of the class")
    assert missing
    assert all("missing kernel" in (g.reason or "") for g in missing)


def test_signed_codes_are_checked_on_their_unsigned_twin_on_x86() -> None:
    twin = as_checked_here(ARM_DOT, architecture="x86_64")
    assert not twin.signed_activations
    assert as_checked_here(ARM_DOT, architecture="aarch64") == ARM_DOT
    graph = quantizable("tiny")
    plan = dict.fromkeys(graph.units, INT8)
    data = graph.emit(plan, kernels=twin)
    report = effective_precisions(data, graph.units.values(), plan, kernels=ARM_DOT)
    assert {g.effective for g in report} == {"w8a8"}


def test_what_was_seen_in_a_stand_in_says_so_and_on_which_machine() -> None:
    graph = quantizable("tiny")
    plan = {"mix.0": INT8}
    units, data = graph.units.values(), graph.emit(plan)
    itself = effective_precisions(data, units, plan, kernels=X86_VNNI)
    twin = effective_precisions(data, units, plan, kernels=ARM_DOT, stands_in=X86_VNNI)
    here = f"onnxruntime {onnxruntime.__version__} on {platform.machine()}"
    assert {g.seen_in for g in itself} == {here}
    assert {g.seen_in for g in twin} == {f"a u8s8 stand-in for the s8s8 file, {here}"}


def test_float16_of_a_device_that_has_it_is_unknown_where_this_machine_has_not() -> None:
    graph = quantizable("tiny")
    plan = {"mix.0": FP16}
    report = effective_precisions(
        graph.emit(plan), graph.units.values(), plan, kernels=ARM_DOT_HALF
    )
    entry = next(g for g in report if g.group == "mix.0")
    assert entry.effective in ("fp16", None)
    assert (entry.effective is None) == ("not seen" in (entry.reason or ""))


def test_entries_survive_json() -> None:
    entry = judge(emitted("mix.0"), "mix.0")
    assert GroupPrecision(**entry.to_json()) == entry
    assert np.isfinite(entry.stored_bits)
