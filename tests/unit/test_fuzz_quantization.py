"""Random graphs with random precisions: every file loads, runs and answers, or the error is typed.

The bound: with 8-bit weights and activations, samples that were calibrated on, and weights of
ordinary size, the mean error is below 5 % of the output's range; a wrong scale, axis or wire is
off by far more. Hostile graphs (zeros, denormals, 1e12) and other precisions must run.
"""

from __future__ import annotations

import os
from datetime import timedelta

import numpy as np
import onnx
import onnx.printer
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from autotune.compression.calibration import calibrate
from autotune.compression.cleanup import clean_up
from autotune.compression.effective import effective_precisions
from autotune.compression.graph import GraphView, model_bytes
from autotune.compression.inventory import precisions_of
from autotune.compression.kernels import KERNEL_CLASSES, X86, X86_VNNI
from autotune.compression.post_training import post_training
from autotune.compression.quantization import QuantizableGraph
from autotune.errors import CompressionError, InvalidModel
from search_spaces import FP16, FP32, INT8, W8, W8A16, Precision
from tests.unit.random_graphs import graphs

# A long run: AUTOTUNE_FUZZ_EXAMPLES=5000 pytest tests/unit/test_fuzz_quantization.py
EXAMPLES = int(os.environ.get("AUTOTUNE_FUZZ_EXAMPLES", "0"))
if EXAMPLES:  # as long as it takes; each example has its deadline
    pytestmark = pytest.mark.timeout(0)
MAX_MEAN_ERROR = 0.05
MEAN_ERROR_PRECISIONS = (FP32, FP16, W8A16, INT8, W8)


def fuzz(examples: int) -> settings:
    """The same examples in every run, unless a long run is asked for."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=EXAMPLES == 0,
        database=None,
        deadline=timedelta(seconds=30),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def samples(model: onnx.ModelProto, n: int = 4) -> np.ndarray:
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(0).standard_normal((n, *dims)).astype(np.float32)


def based(data: st.DataObject, model: onnx.ModelProto, x: np.ndarray) -> QuantizableGraph:
    """The graph as a base has it, or with ranges alone."""
    if data.draw(st.booleans(), label="post-training"):
        found = post_training(model, x)
        return QuantizableGraph(model, found.calibration, rounding=found.rounding)
    return QuantizableGraph(model, calibrate(model, x))


def planned(
    data: st.DataObject, graph: QuantizableGraph, allowed: tuple[Precision, ...] | None = None
) -> dict[str, Precision]:
    """A precision for each group: all alike, or drawn one by one."""
    choices = {
        name: [p for p in precisions_of(unit) if allowed is None or p in allowed]
        for name, unit in graph.units.items()
    }
    if data.draw(st.booleans(), label="uniform INT8"):
        return {name: INT8 for name, possible in choices.items() if INT8 in possible}
    return {
        name: data.draw(st.sampled_from(possible), label=name) for name, possible in choices.items()
    }


@fuzz(90)
@given(model=graphs(mood="plain"), data=st.data())
def test_every_candidate_of_a_random_graph_answers_nearly_as_fp32(
    model: onnx.ModelProto, data: st.DataObject
) -> None:
    note(onnx.printer.to_text(model))
    graph_of = clean_up(model)
    x = samples(model)
    expected = run(model.SerializeToString(), x)
    np.testing.assert_allclose(run(model_bytes(graph_of), x), expected, rtol=1e-4, atol=1e-4)
    graph = based(data, graph_of, x)
    plan = planned(data, graph, MEAN_ERROR_PRECISIONS)
    kernels = data.draw(st.sampled_from([X86_VNNI, X86]), label="kernels")
    artifact = graph.emit(plan, kernels=kernels)
    onnx.checker.check_model(onnx.load_from_string(artifact))
    output = run(artifact, x)
    assert output.shape == expected.shape
    width = max(float(np.ptp(expected)), float(np.abs(expected).max()), 1e-6)
    assert np.abs(output - expected).mean() <= MAX_MEAN_ERROR * width
    report = effective_precisions(artifact, graph.units.values(), plan)
    for group in report:
        if group.planned == "fp32":
            assert group.effective == "fp32", group.reason


@fuzz(90)
@given(model=graphs(mood="hostile"), data=st.data())
def test_hostile_weights_run_or_are_refused_by_name(
    model: onnx.ModelProto, data: st.DataObject
) -> None:
    note(onnx.printer.to_text(model))
    try:
        graph_of = clean_up(model)
        x = samples(model)
        if data.draw(st.booleans(), label="constant calibration"):
            x = np.full_like(x, data.draw(st.sampled_from([0.0, 1e-42, 1.0, -3.0, 1e30])))
        graph = based(data, graph_of, x)
        kernels = data.draw(st.sampled_from(list(KERNEL_CLASSES.values())), label="kernels")
        artifact = graph.emit(planned(data, graph), kernels=kernels)
    except (CompressionError, InvalidModel) as error:
        assert len(str(error)) > 20
        return
    onnx.checker.check_model(onnx.load_from_string(artifact))
    output = run(artifact, x)
    assert np.isfinite(output).all() or not np.isfinite(run(model_bytes(graph_of), x)).all()


@fuzz(60)
@given(model=graphs(mood="plain"))
def test_a_random_graph_in_normal_form_describes_itself(model: onnx.ModelProto) -> None:
    view = GraphView(clean_up(model))
    names = [node.name for node in view.nodes]
    assert len(set(names)) == len(names)
    assert all(view.rank(name) > 0 for node in view.nodes for name in node.output if name)
