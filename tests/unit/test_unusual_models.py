"""Models that are not what a tutorial exports: each is tuned, or refused by name with a way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from autotune.compression.accuracy import LARGEST_DIVERGENCE
from autotune.compression.inventory import build_inventory, precisions_of
from autotune.compression.post_training import post_training
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.source import SourceModel, load_source_model
from autotune.errors import CompressionError, InvalidModel
from autotune.spec import ModelSpec, name_uploads, parse_job, resolve_uploads
from search_spaces import INT8
from tests.unit.compression_models import CLASSES, SHAPE, run, samples, save

FLOAT = TensorProto.FLOAT
_IR_OF_OPSET = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}


def constants(**replaced: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
        "conv.bias": rng.normal(0, 0.1, 8).astype(np.float32),
        "fc.weight": rng.normal(0, 0.5, (CLASSES, 8)).astype(np.float32),
        "fc.bias": rng.normal(0, 0.1, CLASSES).astype(np.float32),
        **replaced,
    }


def chain(middle: list[onnx.NodeProto] | None = None) -> list[onnx.NodeProto]:
    """Conv, Relu, what `middle` makes of `r` (it gives `s`), global pool, Flatten, Gemm."""
    return [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        *(middle if middle is not None else [helper.make_node("Identity", ["r"], ["s"])]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], "fc", transB=1),
    ]


def value(name: str, *shape: int | str | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto] | None = None,
    *,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    held: dict[str, np.ndarray] | None = None,
    opset: int = 20,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes or chain(),
        "unusual",
        inputs or [value("x", "N", *SHAPE)],
        outputs or [value("y", "N", CLASSES)],
        [numpy_helper.from_array(a, n) for n, a in (held or constants()).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=_IR_OF_OPSET.get(opset, 11))


def load(made: onnx.ModelProto, folder: Path, shape: tuple[int, ...] = SHAPE) -> SourceModel:
    return load_source_model(ModelSpec(source=save(made, folder / "m.onnx")), input_shape=shape)


def refused(made: onnx.ModelProto, folder: Path) -> str:
    with pytest.raises(InvalidModel) as caught:
        load(made, folder)
    return str(caught.value)


def int8(source: SourceModel, x: np.ndarray | None = None) -> tuple[bytes, QuantizableGraph]:
    """Made a base of, and written with every group in INT8 that can take it."""
    found = post_training(source.graph, samples(8) if x is None else x)
    graph = QuantizableGraph(source.graph, found.calibration, rounding=found.rounding)
    plan = {name: INT8 for name, unit in graph.units.items() if INT8 in precisions_of(unit)}
    return graph.emit(plan), graph


def assert_tunable(made: onnx.ModelProto, folder: Path, *, units: int = 2) -> SourceModel:
    """Loaded with the same answers, and INT8 runs in a plain session with nearly the same."""
    source, x = load(made, folder), samples(8)
    expected = run(source.fp32_bytes, x)
    artifact, graph = int8(source)
    assert len(graph.units) == units
    onnx.checker.check_model(onnx.load_from_string(artifact))
    output = run(artifact, x)
    assert 0 < np.abs(output - expected).mean() < 0.05 * np.ptp(expected)
    return source


@pytest.mark.parametrize("opset", range(13, 25))
def test_every_opset_from_13_to_24_is_tuned(opset: int, tmp_path: Path) -> None:
    source = assert_tunable(model(opset=opset), tmp_path)
    assert source.graph.opset_import[0].version == opset


def test_dynamic_spatial_axes_take_the_extents_of_the_data(tmp_path: Path) -> None:
    dynamic = model(inputs=[value("x", "batch", 3, "height", None)])
    source = assert_tunable(dynamic, tmp_path)
    assert source.input_shape == SHAPE
    (notice,) = source.notices
    assert "input 'x' has dynamic axes (2, 3)" in notice and "(3, 16, 16) alone" in notice


def test_a_classes_axis_without_a_name_is_read_off_the_graph(tmp_path: Path) -> None:
    made = model(outputs=[value("y", None, None)])
    assert assert_tunable(made, tmp_path).num_classes == CLASSES


def test_shapes_that_the_graph_computes_are_resolved(tmp_path: Path) -> None:
    """Older exporters flatten by Shape, Gather, Concat and Reshape."""
    nodes = [
        *chain()[:3],
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Shape", ["p"], ["p_shape"]),
        helper.make_node("Gather", ["p_shape", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "minus_one"], ["target"], axis=0),
        helper.make_node("Reshape", ["p", "target"], ["f"]),
        chain()[-1],
    ]
    held = constants(zero=np.array(0), axes=np.array([0]), minus_one=np.array([-1]))
    inventory = build_inventory(assert_tunable(model(nodes, held=held), tmp_path))
    assert inventory.float_operators == (), "computing a shape is no arithmetic of the model"
    assert inventory.groups[-1].macs == 8 * CLASSES


def test_weights_behind_a_transpose_are_constant_and_keep_their_name(tmp_path: Path) -> None:
    nodes = chain()
    nodes[-1] = helper.make_node("MatMul", ["f", "turned"], ["y"])
    nodes.insert(0, helper.make_node("Transpose", ["fc.weight"], ["turned"]))
    source = assert_tunable(model(nodes), tmp_path)
    assert [group.name for group in build_inventory(source).groups] == ["conv", "fc"]


def test_functions_of_the_model_are_inlined(tmp_path: Path) -> None:
    body = [
        helper.make_node("Sigmoid", ["a"], ["g"]),
        helper.make_node("Mul", ["a", "g"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 20)]
    swish = helper.make_function("local", "Swish", ["a"], ["b"], body, opsets)
    made = model(
        chain([helper.make_node("Swish", ["r"], ["s"], domain="local")]), domains=("local",)
    )
    made.functions.append(swish)
    source = assert_tunable(made, tmp_path)
    assert not source.graph.functions
    assert {"Sigmoid", "Mul"} <= {node.op_type for node in source.graph.graph.node}


def test_operators_that_nothing_is_known_of_stay_float_and_say_why(tmp_path: Path) -> None:
    middle = [
        helper.make_node("Erf", ["r"], ["e"]),
        helper.make_node("Gelu", ["e"], ["g"], domain="com.microsoft"),
        helper.make_node("CumSum", ["g", "axis"], ["s"]),
    ]
    made = model(chain(middle), held=constants(axis=np.array(3)), domains=("com.microsoft",))
    listed = [str(o) for o in build_inventory(assert_tunable(made, tmp_path)).float_operators]
    assert listed == [
        "1 CumSum (nothing is known about quantizing it)",
        "1 Erf (onnxruntime's CPU provider has no 8-bit kernel for it)",
        "1 com.microsoft:Gelu (nothing is known about quantizing it)",
    ]


def test_sequences_inside_a_model_stay_float(tmp_path: Path) -> None:
    middle = [
        helper.make_node("SplitToSequence", ["r"], ["parts"], axis=1, keepdims=1),
        helper.make_node("ConcatFromSequence", ["parts"], ["s"], axis=1),
    ]
    source = assert_tunable(model(chain(middle)), tmp_path)
    kinds = [operator.operator for operator in build_inventory(source).float_operators]
    assert kinds == ["ConcatFromSequence", "SplitToSequence"]


BRANCH = helper.make_graph(
    [helper.make_node("Relu", ["r"], ["out"])], "branch", [], [value("out", None, 8, 16, 16)]
)
CONTROL_FLOW = {
    "If": helper.make_node("If", ["yes"], ["s"], "", then_branch=BRANCH, else_branch=BRANCH),
    "Loop": helper.make_node(
        "Loop",
        ["", "yes", "r"],
        ["s"],
        "again",
        body=parser.parse_graph(
            "body (int64 i, bool go, float[N,8,16,16] a) => (bool on, float[N,8,16,16] b)"
            " { on = Identity(go) b = Relu(a) }"
        ),
    ),
    "Scan": helper.make_node(
        "Scan",
        ["r"],
        ["s"],
        "rows",
        num_scan_inputs=1,
        body=parser.parse_graph("body (float[8,16,16] a) => (float[8,16,16] b) { b = Relu(a) }"),
    ),
}


@pytest.mark.parametrize("kind", CONTROL_FLOW)
def test_control_flow_is_refused_by_the_name_of_its_node(kind: str, tmp_path: Path) -> None:
    made = model(chain([CONTROL_FLOW[kind]]), held=constants(yes=np.array(True)))
    message = refused(made, tmp_path)
    name = CONTROL_FLOW[kind].name
    shown = f"node {name!r} ({kind})" if name else f"the {kind} node that makes 's'"
    assert f"{shown} is control flow" in message
    assert "export the model with fixed control flow" in message


def test_control_flow_inside_a_function_is_refused(tmp_path: Path) -> None:
    chosen = onnx.NodeProto()
    chosen.CopyFrom(CONTROL_FLOW["Loop"])
    body = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        chosen,
    ]
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("local", "Again", ["r"], ["s"], body, opsets)
    made = model(
        chain([helper.make_node("Again", ["r"], ["s"], domain="local")]), domains=("local",)
    )
    made.functions.append(function)
    assert "(Loop) is control flow" in refused(made, tmp_path)


def test_several_inputs_and_outputs_are_refused_with_a_way_to_cut_them(tmp_path: Path) -> None:
    two = model(outputs=[value("y", "N", CLASSES), value("p", "N", 8, 1, 1)])
    message = refused(two, tmp_path)
    assert "2 outputs ('y', 'p')" in message and "onnx.utils.extract_model" in message
    more = model(inputs=[value("x", "N", *SHAPE), value("mask", "N", 8)])
    assert "2 inputs ('x', 'mask')" in refused(more, tmp_path)


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "UINT8", "INT64", "BFLOAT16"])
def test_an_input_of_another_type_is_refused(kind: str, tmp_path: Path) -> None:
    number = TensorProto.DataType.Value(kind)
    nodes = [helper.make_node("Cast", ["raw"], ["x"], to=FLOAT), *chain()]
    made = model(nodes, inputs=[value("raw", "N", *SHAPE, kind=number)])
    message = refused(made, tmp_path)
    assert f"input 'raw' is {kind}" in message and "export the model in float32" in message


def test_layers_in_half_precision_are_refused_by_name(tmp_path: Path) -> None:
    middle = [
        helper.make_node("Cast", ["r"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "half.weight"], ["hc"], "half"),
        helper.make_node("Cast", ["hc"], ["s"], to=FLOAT),
    ]
    held = constants(**{"half.weight": np.ones((8, 8, 1, 1), np.float16)})
    message = refused(model(chain(middle), held=held), tmp_path)
    assert "node 'half' (Conv) computes in FLOAT16; give the model in FP32" in message


def test_double_precision_between_float_layers_stays_as_it_is(tmp_path: Path) -> None:
    middle = [
        helper.make_node("Cast", ["r"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Add", ["d", "d"], ["dd"]),
        helper.make_node("Cast", ["dd"], ["s"], to=FLOAT),
    ]
    assert_tunable(model(chain(middle)), tmp_path)


def test_inputs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("x", FLOAT, None)
    message = refused(model(inputs=[sequence]), tmp_path)
    assert "input 'x' is sequence; a float32 tensor is needed" in message
    tensor = helper.make_tensor_type_proto(FLOAT, ["N", *SHAPE])
    optional = helper.make_value_info("x", helper.make_optional_type_proto(tensor))
    assert "input 'x' is optional;" in refused(model(inputs=[optional]), tmp_path)
    text = value("x", "N", *SHAPE, kind=TensorProto.STRING)
    assert "input 'x' is STRING; a float32 input is needed" in refused(
        model(inputs=[text]), tmp_path
    )


def test_external_weights_are_read_from_beside_the_file(tmp_path: Path) -> None:
    whole = load(model(), tmp_path)
    path = tmp_path / "split.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    source = load_source_model(ModelSpec(source=f"onnx:{path}"), input_shape=SHAPE)
    assert source.digest == whole.digest


def test_external_weights_that_are_missing_cut_or_elsewhere_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    data = tmp_path / "w.data"
    for damage in (lambda: data.write_bytes(data.read_bytes()[:100]), data.unlink):
        damage()
        with pytest.raises(InvalidModel, match=r"'conv.weight' in the file 'w.data'.*one file"):
            load_source_model(ModelSpec(source=f"onnx:{path}"), input_shape=SHAPE)
    outside = model()
    tensor = outside.graph.initializer[0]
    (tmp_path.parent / "outside.data").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "../outside.data")
    tensor.ClearField("raw_data")
    assert "lies outside its folder" in refused(outside, tmp_path)


def test_an_upload_that_left_its_weights_behind_is_named_by_the_jobs_key(tmp_path: Path) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    stored = path.rename(tmp_path / ("ab" * 32))
    (tmp_path / "w.data").unlink()
    keys = {"data": {"evaluation": "npz:e.npz"}}
    submitted = parse_job({"model": {"source": f"onnx:sha256:{'ab' * 32}"}, **keys})
    resolved = resolve_uploads(submitted, lambda digest: stored)
    with pytest.raises(InvalidModel) as caught:
        load_source_model(resolved.model, input_shape=SHAPE)
    message = name_uploads(str(caught.value), submitted, resolved)
    assert message.startswith("model.source keeps its weights 'conv.weight' in the file 'w.data'")
    assert "as one file, as an upload must be" in message


def test_what_the_runtime_does_not_know_is_named(tmp_path: Path) -> None:
    whiten = helper.make_node("Whiten", ["r"], ["s"], "wash", domain="org.acme")
    message = refused(model(chain([whiten]), domains=("org.acme",)), tmp_path)
    assert "node 'wash' (Whiten) is of the domain 'org.acme'" in message
    assert "its opset 28 is newer than this runtime" in refused(model(opset=28), tmp_path)


QUANTIZED = {
    "DynamicQuantizeLinear": ("", 3), "QuantizeLinear": ("", 1), "ConvInteger": ("", 1),
    "MatMulNBits": ("com.microsoft", 1), "QLinearAdd": ("com.microsoft", 1),
    "QAttention": ("com.microsoft", 1),
}  # fmt: skip


@pytest.mark.parametrize("operator", QUANTIZED)
def test_a_model_that_is_quantized_already_is_refused_by_its_node(
    operator: str, tmp_path: Path
) -> None:
    from autotune.compression.cleanup import clean_up

    domain, outputs = QUANTIZED[operator]
    made = [f"s{i}" if i else "s" for i in range(outputs)]
    node = helper.make_node(operator, ["r"], made, "squeezed", domain=domain)
    with pytest.raises(InvalidModel, match=r"'squeezed'.*give the FP32 model") as caught:
        clean_up(model(chain([node]), domains=("com.microsoft",)))
    assert operator in str(caught.value)


def test_training_mode_and_random_values_are_refused(tmp_path: Path) -> None:
    dropout = helper.make_node("Dropout", ["r", "", "yes"], ["s"], "drop")
    message = refused(model(chain([dropout]), held=constants(yes=np.array(True))), tmp_path)
    assert "node 'drop' (Dropout) is in training mode" in message
    noise = [helper.make_node("RandomNormalLike", ["r"], ["z"], "noise"),
             helper.make_node("Add", ["r", "z"], ["s"])]  # fmt: skip
    assert "node 'noise' (RandomNormalLike) gives random values" in refused(
        model(chain(noise)), tmp_path
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_name_their_layer(bad: float, tmp_path: Path) -> None:
    weight = constants()["fc.weight"].copy()
    weight[1, 2] = bad
    message = refused(model(held=constants(**{"fc.weight": weight})), tmp_path)
    assert "weights 'fc.weight' of node 'fc' (Gemm) hold 1 values" in message


def test_infinity_as_a_bound_is_no_fault(tmp_path: Path) -> None:
    middle = [helper.make_node("Clip", ["r", "", "high"], ["s"])]
    assert_tunable(model(chain(middle), held=constants(high=np.float32(np.inf))), tmp_path)


def test_a_batch_norm_that_folds_into_infinity_is_refused(tmp_path: Path) -> None:
    nodes = chain()
    norm = helper.make_node(
        "BatchNormalization", ["c", "one", "zero", "zero", "minus"], ["n"], "norm"
    )
    nodes[1].input[0] = "n"
    held = constants(
        one=np.ones(8, np.float32), zero=np.zeros(8, np.float32), minus=-np.ones(8, np.float32)
    )
    message = refused(model([nodes[0], norm, *nodes[1:]], held=held), tmp_path)
    assert "node 'norm' (BatchNormalization) cannot be folded into node 'conv'" in message


def test_axes_and_weights_without_a_value_are_refused(tmp_path: Path) -> None:
    empty = model(inputs=[value("x", "N", 3, 0, 16)])
    assert "axis 2 of input 'x' has extent 0" in refused(empty, tmp_path)
    hollow = constants(
        **{"fc.weight": np.zeros((0, 8), np.float32), "fc.bias": np.zeros(0, np.float32)}
    )
    message = refused(model(held=hollow, outputs=[value("y", "N", None)]), tmp_path)
    assert "weights 'fc.weight' of node 'fc' (Gemm) have shape (0, 8)" in message


def test_an_empty_tensor_inside_a_model_is_passed_over(tmp_path: Path) -> None:
    middle = [
        helper.make_node("Slice", ["r", "from", "from", "axes"], ["none"]),
        helper.make_node("Concat", ["r", "none"], ["s"], axis=1),
    ]
    held = constants(**{"from": np.array([0]), "axes": np.array([1])})
    assert_tunable(model(chain(middle), held=held), tmp_path)


CALIBRATIONS = {
    "one image": samples(1),
    "zeros": np.zeros((4, *SHAPE), np.float32),
    "a constant": np.full((4, *SHAPE), 3.0, np.float32),
    "one value of 1e30": np.where(np.arange(768).reshape(SHAPE) == 5, 1e30, samples(4)),
    "denormals": np.full((4, *SHAPE), 1e-42, np.float32),
    "the largest float": np.full((1, *SHAPE), np.finfo(np.float32).max, np.float32),
}


def test_int8_that_gives_no_numbers_diverges_as_far_as_anything_can(tmp_path: Path) -> None:
    """A Sigmoid of 8 bits has a 0, whose logarithm nothing can be compared with."""
    nodes = [
        *chain()[:3],
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Conv", ["p", "last"], ["l"]),
        helper.make_node("Sigmoid", ["l"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Log", ["f"], ["y"]),
    ]
    last = np.random.default_rng(1).normal(0, 2, (CLASSES, 8, 1, 1)).astype(np.float32)
    source, x = load(model(nodes, held=constants(last=last)), tmp_path), samples(8)
    assert np.isfinite(run(source.fp32_bytes, x)).all()
    assert post_training(source.graph, x).mean_kl == LARGEST_DIVERGENCE
    with pytest.raises(CompressionError, match="output becomes NaN or infinite"):
        post_training(source.graph, 100 * x)


def test_a_transposed_convolution_among_8_bit_layers_stays_as_it_is(tmp_path: Path) -> None:
    up = helper.make_node("ConvTranspose", ["r", "up.weight"], ["s"], "up", strides=[2, 2])
    weight = np.random.default_rng(1).normal(0, 0.3, (8, 8, 2, 2)).astype(np.float32)
    assert_tunable(model(chain([up]), held=constants(**{"up.weight": weight})), tmp_path, units=3)


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_strange_calibration_set_gives_a_running_model_or_says_what_overflows(
    name: str, tmp_path: Path
) -> None:
    source = load(model(), tmp_path)
    try:
        artifact, _ = int8(source, CALIBRATIONS[name].astype(np.float32))
    except CompressionError as error:
        assert name == "the largest float"
        assert "becomes NaN or infinite on the calibration samples" in str(error)
        return
    assert np.isfinite(run(artifact, samples(4))).all()


DEAD = {
    "a channel of zeros": ("conv.weight", lambda w: w * (np.arange(8) != 3).reshape(8, 1, 1, 1)),
    "all weights zero": ("conv.weight", lambda w: w * 0),
    "a Relu that never fires": ("conv.bias", lambda b: b - 1e3),
    "a bias beyond int32": ("conv.bias", lambda b: b + 1e9),
    "weights of 1e-30": ("conv.weight", lambda w: w * 1e-30),
    "denormal weights": ("fc.weight", lambda w: w * 1e-40),
}


@pytest.mark.parametrize("name", DEAD)
def test_dead_and_huge_layers_quantize_to_what_they_compute(name: str, tmp_path: Path) -> None:
    weight, change = DEAD[name]
    changed = change(constants()[weight]).astype(np.float32)
    source, x = load(model(held=constants(**{weight: changed})), tmp_path), samples(8)
    expected = run(source.fp32_bytes, x)
    artifact, _ = int8(source)
    error = np.abs(run(artifact, x) - expected).max()
    assert error <= 0.05 * max(np.ptp(expected), np.abs(expected).max())
