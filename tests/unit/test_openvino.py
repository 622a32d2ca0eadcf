"""OpenVINO measures the same files as onnxruntime and computes the same outputs."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from device_agents.runtimes import (
    InvalidArtifact,
    RuntimeOptions,
    TensorSpec,
    UnsupportedModel,
    load_runtime,
)

pytest.importorskip("openvino", reason="the extra edge-autotune[openvino] is not installed")

ONE_THREAD = RuntimeOptions(provider="CPUExecutionProvider", threads=1)


@pytest.fixture
def convolution(tmp_path):
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "one_convolution",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4, 6, 6])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def test_a_free_batch_is_compiled_as_one_sample(convolution):
    session = load_runtime("openvino").load(convolution, ONE_THREAD)
    assert session.inputs == (TensorSpec(name="x", shape=(1, 3, 8, 8), dtype="float32"),)


def test_the_outputs_are_onnxruntimes(convolution):
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    found = load_runtime("openvino").load(convolution, ONE_THREAD).bind({"x": x})()
    expected = onnxruntime.InferenceSession(convolution).run(None, {"x": x})[0]
    np.testing.assert_allclose(next(iter(found.values())), expected, atol=1e-5)


def test_a_file_that_is_no_model_is_told_apart(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(InvalidArtifact, match="OpenVINO cannot read"):
        load_runtime("openvino").load(path, ONE_THREAD)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(convolution):
    options = RuntimeOptions(provider="NPUExecutionProvider", threads=1)
    with pytest.raises(UnsupportedModel, match="CPUExecutionProvider"):
        load_runtime("openvino").load(convolution, options)
