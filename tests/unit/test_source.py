"""Source models: loading, naming, the normal form of the graph, and every refusal."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from autotune.compression.cleanup import clean_up
from autotune.compression.graph import GraphView, unique_names
from autotune.compression.source import SourceModel, export_module, load_source_model
from autotune.errors import InvalidModel, UntrustedCode
from autotune.spec import ModelSpec
from search_spaces import INT8
from tests.unit.compression_models import (
    CLASSES,
    SHAPE,
    export_quietly,
    quantizable,
    run,
    samples,
    save,
    tiny_module,
    tiny_source,
)

PYTHON_SOURCE = "python:tests.unit.compression_models:tiny_module"


def load(source: str, **options: object) -> SourceModel:
    return load_source_model(
        ModelSpec(source=source, **options), input_shape=SHAPE, trust_job_code=True
    )


def refused(source: str, **options: object) -> str:
    with pytest.raises(InvalidModel) as caught:
        load(source, **options)
    return str(caught.value)


def one_conv(**changes: object) -> onnx.ModelProto:
    """A convolution, a global mean and a Gemm, written by hand; parts may be replaced."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(4, CLASSES)).astype(np.float32),
        "axes": np.array([2, 3]),
        "shape": np.array([0, -1]),
        **changes.pop("constants", {}),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("ReduceMean", ["c", "axes"], ["m"]),
        helper.make_node("Reshape", ["m", "shape"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])]
    graph = helper.make_graph(
        changes.pop("nodes", nodes),
        "g",
        changes.pop("inputs", inputs),
        changes.pop("outputs", outputs),
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_graph_answers_as_the_module_does() -> None:
    x = samples(5, seed=7)
    with torch.inference_mode():
        expected = tiny_module()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(tiny_source().fp32_bytes, x), expected, atol=1e-5)


def test_weights_and_nodes_are_named_after_the_parameters() -> None:
    view = GraphView(tiny_source().graph)
    layers = [n.name for n in view.nodes if n.op_type in ("Conv", "Gemm")]
    assert layers[:3] == ["stem.0", "block1.expand.0", "block1.depthwise"]
    assert layers[-2:] == ["hidden", "head"]
    assert {"stem.0.weight", "head.bias"} <= set(view.initializers)


def test_batch_norm_is_folded_and_only_the_batch_axis_is_symbolic() -> None:
    graph = tiny_source().graph.graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (graph.input[0], graph.output[0])]  # fmt: skip
    assert dims == [["N", *SHAPE], ["N", CLASSES]]


def test_the_exporters_notes_are_removed() -> None:
    text = str(tiny_source().graph)
    assert "stack_trace" not in text
    assert "/" not in "".join(n.doc_string for n in tiny_source().graph.graph.node)


def test_a_source_travels_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(tiny_source()))
    assert copy.fp32_bytes == tiny_source().fp32_bytes
    assert copy.module is not None


def test_the_digest_is_the_same_in_another_process() -> None:
    script = "from tests.unit.compression_models import tiny_source; print(tiny_source().digest)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tiny_source().digest


def test_a_module_whose_forward_needs_its_batch_size_is_exported_with_a_free_axis() -> None:
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(768, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            extra = torch.ones(x.shape[0], 1).expand(x.shape[0], 768)
            return self.head(x.reshape(x.shape[0], 768) + extra)

    model = export_module(Reshaping().eval(), SHAPE)
    assert run(model.SerializeToString(), samples(7)).shape == (7, 4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_decide_the_number_of_classes(tmp_path: Path, suffix: str) -> None:
    from autotune.compression.torchvision_repair import import_torchvision

    made = import_torchvision().models.squeezenet1_1(num_classes=7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": made.state_dict()}, path)
    else:
        save_file(made.state_dict(), path)
    spec = ModelSpec(source="torchvision:squeezenet1_1", weights=str(path))
    source = load_source_model(spec, input_shape=(3, 64, 64))
    assert source.num_classes == 7
    x = samples(2, (3, 64, 64))
    with torch.inference_mode():
        expected = made.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(source.fp32_bytes, x), expected, atol=1e-4)


def test_an_onnx_file_that_another_export_made_has_the_same_answers(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_quietly(tiny_module(), path, dynamo=True)
    source = load(f"onnx:{path}")
    x = samples(3)
    assert source.module is None
    np.testing.assert_allclose(
        run(source.fp32_bytes, x), run(tiny_source().fp32_bytes, x), atol=1e-5
    )


def test_an_onnx_file_with_a_batch_of_one_gets_a_free_batch_axis(tmp_path: Path) -> None:
    fixed = one_conv(
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *SHAPE])],
        constants={"shape": np.array([1, 4])},
    )
    source = load(save(fixed, tmp_path / "m.onnx"))
    assert run(source.fp32_bytes, samples(6)).shape == (6, CLASSES)


def test_batch_norm_nodes_and_identities_of_an_onnx_file_are_folded(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    norm = {n: rng.uniform(0.5, 2, 4).astype(np.float32) for n in ("g", "b", "mu", "var")}
    plain = one_conv()
    nodes = list(plain.graph.node)
    nodes[0].output[0] = "c0"
    between = [
        helper.make_node("BatchNormalization", ["c0", *norm], ["c1"], epsilon=1e-3),
        helper.make_node("Identity", ["c1"], ["c"]),
    ]
    model = one_conv(nodes=[nodes[0], *between, *nodes[1:]], constants=norm)
    source = load(save(model, tmp_path / "m.onnx"))
    kinds = [node.op_type for node in source.graph.graph.node]
    assert kinds == ["Conv", "GlobalAveragePool", "Reshape", "MatMul"]
    x = samples(3)
    np.testing.assert_allclose(
        run(source.fp32_bytes, x), run(model.SerializeToString(), x), atol=1e-4
    )


def test_an_old_opset_is_converted(tmp_path: Path) -> None:
    model = one_conv(nodes=[
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["y"]),
    ])  # fmt: skip
    model.opset_import[0].version, model.ir_version = 11, 6
    source = load(save(model, tmp_path / "m.onnx"))
    assert source.graph.opset_import[0].version == 13


def test_code_runs_only_by_consent() -> None:
    with pytest.raises(UntrustedCode, match="--trust-job-code"):
        load_source_model(ModelSpec(source=PYTHON_SOURCE), input_shape=SHAPE)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("torchvision:resnet81", {}, r"no classification model 'resnet81'; did you mean resnet18"),
        ("onnx:/nowhere/model.onnx", {}, r"cannot read the ONNX file /nowhere/model.onnx"),
        ("python:no.such.module:f", {}, r"ModuleNotFoundError"),
        ("python:builtins:dict", {}, r"returned dict; it must return a torch.nn.Module"),
        (PYTHON_SOURCE, {"num_classes": 9}, r"num_classes is 9, but .* gives 5 classes"),
        (PYTHON_SOURCE, {"weights": "/none.pt"}, r"weights file /none.pt does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_refused(
    source: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidModel, match=message):
        load(source, **options)


def test_a_truncated_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(tiny_source().fp32_bytes[:-1000])
    assert "not a valid ONNX file" in refused(f"onnx:{path}")


def test_weights_that_do_not_fit_name_the_key(tmp_path: Path) -> None:
    state = tiny_module().state_dict()
    for name, change in (
        ("head.weight", lambda s: s.pop("head.weight")),
        ("head.bias", lambda s: s.update({"head.bias": torch.zeros(7)})),
        ("extra.weight", lambda s: s.update({"extra.weight": torch.zeros(1)})),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "w.pt")
        message = refused(PYTHON_SOURCE, weights=str(tmp_path / "w.pt"))
        assert repr(name) in message


def test_weights_of_another_model_list_a_few_keys_of_each_fault(tmp_path: Path) -> None:
    state = {f"blocks.{i}.weight": torch.zeros(1) for i in range(9)}
    torch.save(state, tmp_path / "w.pt")
    message = refused(PYTHON_SOURCE, weights=str(tmp_path / "w.pt"))
    assert "they have no 'stem.0.weight', 'stem.1.weight', 'stem.1.bias' and " in message
    assert (
        "the model does not have 'blocks.0.weight', 'blocks.1.weight', 'blocks.2.weight' and 6"
        in (message)
    )
    assert "Not one key agrees: they belong to another model" in message


def test_weights_for_other_classes_say_so(tmp_path: Path) -> None:
    state = dict(tiny_module().state_dict())
    state |= {"head.weight": torch.zeros(9, 64), "head.bias": torch.zeros(9)}
    torch.save(state, tmp_path / "w.pt")
    message = refused(PYTHON_SOURCE, weights=str(tmp_path / "w.pt"))
    assert "'head.weight' has shape (9, 64), the model needs (5, 64)" in message
    assert "Give the num_classes with which they were trained" in message


def test_weights_that_are_nan_or_no_tensors_name_their_key(tmp_path: Path) -> None:
    state = dict(tiny_module().state_dict())
    for value, said in (
        (torch.full((5,), float("nan")), "'head.bias' holds 5 values that are NaN or infinite"),
        ("five", "no state_dict: head.bias are not tensors"),
    ):
        torch.save(state | {"head.bias": value}, tmp_path / "w.pt")
        assert said in refused(PYTHON_SOURCE, weights=str(tmp_path / "w.pt"))


def test_no_message_about_weights_is_torchs_own(tmp_path: Path) -> None:
    torch.save(tiny_module().state_dict(), tmp_path / "w.pt")
    save_file(tiny_module().state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-50])
        message = refused(PYTHON_SOURCE, weights=str(path))
        assert "copy or save it again" in message
        assert not any(word in message for word in ("PytorchStream", "weights_only", "Error"))


def test_pickled_weights_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"model": tiny_module()}, tmp_path / "w.pt")
    message = refused(PYTHON_SOURCE, weights=str(tmp_path / "w.pt"))
    assert "holds more than tensors and is not unpickled" in message


def test_a_damaged_weights_file_is_refused(tmp_path: Path) -> None:
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(b"not a tensor in sight")
        assert name in refused(PYTHON_SOURCE, weights=str(tmp_path / name))


def test_weights_beside_an_onnx_file_are_refused(tmp_path: Path) -> None:
    reference = save(one_conv(), tmp_path / "m.onnx")
    assert "remove `weights`" in refused(reference, weights="w.pt")


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(quantizable("tiny").emit({"stem.0": INT8}))
    assert "already quantized" in refused(f"onnx:{path}")


def test_axes_that_the_data_does_not_explain_and_several_inputs_are_refused(tmp_path: Path) -> None:
    dynamic = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "height"])
    message = refused(save(one_conv(inputs=[dynamic]), tmp_path / "a.onnx"))
    assert "axis 2 of input 'x' is dynamic (height)" in message
    two = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *SHAPE]) for name in ("x", "z")
    ]
    assert "2 inputs ('x', 'z')" in refused(save(one_conv(inputs=two), tmp_path / "b.onnx"))


def test_nan_weights_are_refused_by_name(tmp_path: Path) -> None:
    bad = one_conv(constants={"w": np.full((4, 3, 3, 3), np.nan, np.float32)})
    message = refused(save(bad, tmp_path / "m.onnx"))
    assert "weights 'w' of the Conv node that makes 'c' hold 108 values that are NaN" in message


def test_an_output_that_is_no_classification_is_refused(tmp_path: Path) -> None:
    nodes = list(one_conv().graph.node)[:1]
    nodes[0].output[0] = "y"
    image = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 14, 14])]
    message = refused(save(one_conv(nodes=nodes, outputs=image), tmp_path / "m.onnx"))
    assert "a classifier gives (N, classes)" in message


def test_samples_of_another_shape_are_refused() -> None:
    told = "cannot be exported to ONNX for an input of shape .*; this is the shape of one sample"
    with pytest.raises(InvalidModel, match=told):
        load_source_model(
            ModelSpec(source=PYTHON_SOURCE), input_shape=(4, 16, 16), trust_job_code=True
        )


def test_control_flow_is_refused() -> None:
    model = one_conv(nodes=[helper.make_node("If", ["x"], ["y"], name="choice")])
    with pytest.raises(InvalidModel, match=r"node 'choice' \(If\) is control flow"):
        clean_up(model)


def test_repeated_names_become_unique() -> None:
    assert unique_names(["a", "a#2", "a", "b", "a"]) == ["a", "a#2", "a#3", "b", "a#4"]


class AssertsItsSize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[-1] == 224, "wrong image height")
        return x.flatten(1)


def test_a_module_that_asserts_another_image_size_is_refused_by_name() -> None:
    with pytest.raises(InvalidModel, match=r"AssertsItsSize .*\(3, 8, 8\): wrong image height"):
        export_module(AssertsItsSize(), (3, 8, 8))
