"""Every precision: the file's real numbers against numpy, its real size, what runs it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autotune.compression.calibration import calibrate
from autotune.compression.effective import effective_precisions, optimized_graph
from autotune.compression.kernels import (
    ARM_DOT,
    X86,
    X86_VNNI,
    KernelClass,
    as_checked_here,
)
from autotune.compression.quantization import KERNELS_KEY, QuantizableGraph
from autotune.compression.weights import block_matrix, code_weight
from autotune.errors import CompressionError
from search_spaces import (
    FP16,
    FP32,
    INT8,
    W1,
    W2,
    W4,
    W8,
    W8A16,
    PerChannel,
    PerTensor,
    Precision,
)
from tests.unit.compression_models import run, samples

SHAPE = (16, 8, 8)
STORED = [W8, W4, W2, W1, *map(Precision.parse, ("w4-tensor", "w2-asymmetric", "w8-tensor"))]


def conv_model(*, opset: int = 13, channels: int = 64) -> onnx.ModelProto:
    """One 3x3 convolution of 16 to `channels` channels; opset 13 has every operator used."""
    rng = np.random.default_rng(0)
    weights = {
        "a.weight": rng.normal(0, 0.1, (channels, 16, 3, 3)),
        "a.bias": rng.normal(0, 0.1, channels),
    }
    node = helper.make_node("Conv", ["input", "a.weight", "a.bias"], ["output"], "a", pads=[1] * 4)
    return model_of([node], weights, (channels, 8, 8), SHAPE, opset=opset)


def gemm_model(*, n: int = 24, k: int = 80, transposed: bool = True) -> onnx.ModelProto:
    """One Gemm with a bias, its matrix stored as `(n, k)` where `transposed`."""
    rng = np.random.default_rng(1)
    matrix = rng.normal(0, 0.2, (n, k))
    weights = {
        "a.weight": matrix if transposed else matrix.T,
        "a.bias": rng.normal(0, 0.1, n),
    }
    node = helper.make_node(
        "Gemm", ["input", "a.weight", "a.bias"], ["output"], "a", transB=int(transposed)
    )
    return model_of([node], weights, (n,), (k,))


def every_constant_model() -> onnx.ModelProto:
    """A convolution, a HardSwish of uneven channels, another one, an Add, a norm, two more."""
    rng = np.random.default_rng(11)
    sizes = np.geomspace(0.02, 1, 32)[:, None, None, None]
    arrays = {
        "a.weight": rng.normal(0, 0.2, (32, 16, 3, 3)) * sizes,
        "b.weight": rng.normal(0, 0.2, (8, 32, 1, 1)),
        "c.weight": rng.normal(0, 0.3, (8, 8, 3, 3)),
        "d.weight": rng.normal(0, 0.1, (256, 8, 3, 3)),
        "shift": rng.normal(0, 1, (8, 1, 1)),
        "gain": rng.uniform(0.5, 2, 8),
        "offset": rng.normal(0, 1, 8),
        "mean": rng.normal(0, 1, 8),
        "variance": rng.uniform(0.5, 2, 8),
    }
    norm = ["added", "gain", "offset", "mean", "variance"]
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], "a", pads=[1] * 4),
        helper.make_node("HardSwish", ["a"], ["swished"], "swish"),
        helper.make_node("Conv", ["swished", "b.weight"], ["b"], "b"),
        helper.make_node("Add", ["b", "shift"], ["added"], "add"),
        helper.make_node("BatchNormalization", norm, ["normal"], "norm"),
        helper.make_node("Relu", ["normal"], ["r"], "r"),
        helper.make_node("Conv", ["r", "c.weight"], ["c"], "c"),
        helper.make_node("Conv", ["c", "d.weight"], ["output"], "d"),
    ]
    return model_of(nodes, arrays, (256, 4, 4), SHAPE)


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    made: tuple[int, ...],
    taken: tuple[int, ...],
    *,
    opset: int = 20,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *taken])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", *made])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def quantizable_of(
    model: onnx.ModelProto, x: np.ndarray, kernels: KernelClass = X86_VNNI
) -> QuantizableGraph:
    return QuantizableGraph(model, calibrate(model, x), kernels=kernels)


def with_weight(model: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The FP32 model with other weights: what a weight-only file must compute."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name == "a.weight":
            changed = change(numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    return copy.SerializeToString()


def image() -> np.ndarray:
    return samples(4, SHAPE, seed=3)


@pytest.mark.parametrize("precision", STORED, ids=str)
def test_packed_convolution_weights_compute_what_their_codes_say(precision: Precision) -> None:
    model, x = conv_model(), image()

    def rounded(weight: np.ndarray) -> np.ndarray:
        coded = code_weight(
            weight,
            axis=0,
            bits=precision.weight_bits,
            granularity=precision.granularity or PerChannel(),
            symmetric=precision.is_symmetric,
        )
        return (coded.codes.astype(np.float32) - coded.zero) * coded.scale

    got = run(quantizable_of(model, x).emit({"a": precision}), x)
    assert np.allclose(got, run(with_weight(model, rounded), x), atol=1e-4)


@pytest.mark.parametrize("precision", [W4, W2, W1])
def test_weights_that_end_inside_a_byte_are_unpacked_whole(precision: Precision) -> None:
    rng = np.random.default_rng(4)
    weights = {"a.weight": rng.normal(0, 0.2, (3, 1, 3, 3)), "a.bias": rng.normal(0, 0.1, 3)}
    node = helper.make_node("Conv", ["input", "a.weight", "a.bias"], ["output"], "a")
    model = model_of([node], weights, (3, 6, 6), (1, 8, 8), opset=13)
    x = samples(2, (1, 8, 8))
    got = run(quantizable_of(model, x).emit({"a": precision}), x)
    assert got.shape == (2, 3, 6, 6)
    assert np.corrcoef(got.ravel(), run(model.SerializeToString(), x).ravel())[0, 1] > 0.7


def test_binary_weights_are_the_sign_times_the_mean_of_the_channel() -> None:
    """Rastegari et al. 2016, eq. 6, against its naive form."""
    model, x = conv_model(), image()

    def binary(weight: np.ndarray) -> np.ndarray:
        return np.stack([np.where(c >= 0, 1, -1) * np.abs(c).mean() for c in weight])

    got = run(quantizable_of(model, x).emit({"a": W1}), x)
    assert np.allclose(got, run(with_weight(model, binary), x), atol=1e-4)


def test_two_bit_scales_are_no_worse_than_those_of_the_largest_weight() -> None:
    weight = np.random.default_rng(5).normal(0, 1, (8, 4, 3, 3)).astype(np.float32)
    coded = code_weight(weight, axis=0, bits=2, granularity=PerChannel(), symmetric=True)
    error = np.square((coded.codes - coded.zero) * coded.scale - weight).sum()
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 2
    naive = np.square(np.clip(np.rint(weight / largest), -2, 1) * largest - weight).sum()
    assert error < 0.8 * naive


def test_two_bits_do_not_move_the_sum_of_a_channel() -> None:
    """Cutting off one side would: the layers behind a channel amplify what it adds to all."""
    weight = np.random.default_rng(7).normal(0, 1, (64, 64, 3, 3)).astype(np.float32)
    coded = code_weight(weight, axis=0, bits=2, granularity=PerChannel(), symmetric=True)
    moved = ((coded.codes - coded.zero) * coded.scale - weight).mean(axis=(1, 2, 3))
    assert np.abs(moved).max() < 0.1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_channel_of_zeros_stays_zero(bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(8).normal(0, 1, (3, 4, 3, 3)).astype(np.float32)
    weight[1] = 0
    coded = code_weight(weight, axis=0, bits=bits, granularity=PerChannel(), symmetric=symmetric)
    assert (((coded.codes - coded.zero) * coded.scale)[1] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_matrix_can_be_read_back(bits: int, symmetric: bool) -> None:
    matrix = np.random.default_rng(9).normal(0, 1, (5, 70)).astype(np.float32)
    blocked = block_matrix(matrix, bits=bits, symmetric=symmetric)

    def unpacked(packed: np.ndarray) -> np.ndarray:
        shifts = np.arange(0, 8, bits).astype(np.uint8)
        return (packed[..., None] >> shifts & (2**bits - 1)).reshape(*packed.shape[:-1], -1)

    codes = unpacked(blocked.codes).astype(np.float32)
    zero = np.full((5, 3), 2 ** (bits - 1), np.float32)
    if blocked.zero is not None:
        zero = unpacked(blocked.zero.reshape(5, -1))[:, :3].astype(np.float32)
    restored = ((codes - zero[..., None]) * blocked.scale.reshape(5, 3, 1)).reshape(5, -1)[:, :70]
    bound = {2: 0.45, 4: 0.09, 8: 0.006}[bits]
    assert np.abs(restored - matrix).mean() < bound


@pytest.mark.parametrize(("precision", "bits"), [(W8, 8), (W4, 4), (W2, 2), (W1, 1)])
def test_convolution_weights_take_their_bits_in_the_file(precision: Precision, bits: int) -> None:
    model, x = conv_model(channels=512), image()
    graph = quantizable_of(model, x)
    n_weights, per_channel = 512 * 16 * 9, 4 * 512
    size = len(graph.emit({"a": precision}))
    rest = len(graph.emit({})) - 4 * n_weights
    assert size - rest - per_channel == pytest.approx(n_weights * bits / 8, rel=0.02, abs=900)


@pytest.mark.parametrize("precision", STORED, ids=str)
def test_packed_convolution_weights_are_unpacked_once_and_named_as_float(
    precision: Precision,
) -> None:
    graph = quantizable_of(conv_model(), image())
    artifact = graph.emit({"a": precision})
    onnx.checker.check_model(onnx.load_from_string(artifact))
    (group,) = effective_precisions(artifact, graph.units.values(), {"a": precision})
    assert (group.planned, group.effective) == (precision.name, "fp32")
    assert group.stored_bits == precision.weight_bits
    assert group.reason is not None
    assert "when the file is loaded" in group.reason
    left = {node.op_type for node in optimized_graph(artifact).graph.node}
    assert not left & {"Cast", "Mod", "BitShift", "Mul", "Sub"}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "name", ["w8", "w4", "w2", "w4-block64", "w4-block16", "w4-asymmetric", "w2-asymmetric"]
)
def test_matrices_of_few_bits_run_packed_and_near_their_codes(name: str, transposed: bool) -> None:
    precision = Precision.parse(name)
    model = gemm_model(transposed=transposed)
    x = np.random.default_rng(2).normal(0, 1, (6, 80)).astype(np.float32)
    graph = quantizable_of(model, x)
    artifact = graph.emit({"a": precision})
    (group,) = effective_precisions(artifact, graph.units.values(), {"a": precision})
    assert (group.effective, group.reason) == (name, None)
    bound = {8: 0.02, 4: 0.2, 2: 0.7}[precision.weight_bits]
    expected = run(model.SerializeToString(), x)
    assert np.abs(run(artifact, x) - expected).mean() < bound * expected.std()


@pytest.mark.parametrize("name", ["w4-channel", "w4-tensor", "w1"])
def test_matrices_without_a_packed_kernel_are_named_as_float(name: str) -> None:
    x = np.random.default_rng(2).normal(0, 1, (6, 80)).astype(np.float32)
    graph = quantizable_of(gemm_model(), x)
    plan = {"a": Precision.parse(name)}
    (group,) = effective_precisions(graph.emit(plan), graph.units.values(), plan)
    assert (group.planned, group.effective) == (name, "fp32")


def test_sixteen_bit_activations_lose_less_than_eight_and_are_named_as_float() -> None:
    model, x = conv_model(opset=20), image()
    graph = quantizable_of(model, x)
    expected = run(model.SerializeToString(), x)

    def loss(precision: Precision) -> float:
        return float(np.abs(run(graph.emit({"a": precision}), x) - expected).mean())

    assert loss(W8A16) < 0.7 * loss(INT8)
    assert loss(Precision.parse("w8a16-tensor")) > loss(W8A16)
    plan = {"a": W8A16}
    (group,) = effective_precisions(graph.emit(plan), graph.units.values(), plan)
    assert (group.effective, group.stored_bits) == ("fp32", 8)
    assert "16-bit activations" in (group.reason or "")


def test_half_weights_take_half_the_room_and_round_to_float16() -> None:
    model, x = conv_model(channels=256), image()
    graph = quantizable_of(model, x)
    artifact = graph.emit({"a": FP16})
    assert len(artifact) < 0.55 * len(graph.emit({}))
    expected = run(with_weight(model, lambda w: w.astype(np.float16)), x)
    assert np.allclose(run(artifact, x), expected, rtol=5e-3, atol=5e-3)


def test_a_half_group_that_the_runtime_computes_in_float_says_so() -> None:
    graph = quantizable_of(conv_model(), image())
    artifact = graph.emit({"a": FP16})
    (group,) = effective_precisions(artifact, graph.units.values(), {"a": FP16})
    executed = optimized_graph(artifact).graph
    has_half = any(t.data_type == TensorProto.FLOAT16 and len(t.dims) == 4
                   for t in executed.initializer)  # fmt: skip
    assert group.effective == ("fp16" if has_half else "fp32")
    assert (group.reason is None) == has_half


def test_weights_beyond_float16_are_refused() -> None:
    model = conv_model()
    big = onnx.load_from_string(with_weight(model, lambda w: w * 1e6))
    graph = quantizable_of(big, image())
    with pytest.raises(CompressionError, match=r"'a' cannot take fp16.*65504"):
        graph.emit({"a": FP16})


@pytest.mark.parametrize("kernels", [X86_VNNI, X86, ARM_DOT])
def test_eight_bit_codes_follow_the_kernel_class(kernels: KernelClass) -> None:
    graph = quantizable_of(conv_model(opset=20), image(), kernels)
    model = onnx.load_from_string(graph.emit({"a": INT8}))
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert np.abs(arrays["a.weight/q"].astype(int)).max() == kernels.largest_weight_code
    zeros = {a.dtype for n, a in arrays.items() if n.startswith("zero_point/")}
    assert zeros == {np.dtype(np.int8 if kernels.signed_activations else np.uint8)}
    assert {p.key: p.value for p in model.metadata_props} == {KERNELS_KEY: kernels.name}


def test_signed_codes_stand_for_the_same_numbers_as_unsigned_ones() -> None:
    model, x = conv_model(opset=20), image()
    unsigned = run(quantizable_of(model, x).emit({"a": INT8}), x)
    signed = run(quantizable_of(model, x, ARM_DOT).emit({"a": INT8}), x)
    assert np.allclose(unsigned, signed, atol=1e-5)


def test_one_graph_writes_for_each_kernel_class_what_a_fresh_graph_writes() -> None:
    """Weights, an operand of an Add, and what stands for a BatchNorm or a stretched HardSwish."""
    model, x = every_constant_model(), image()
    calibration = calibrate(model, x)
    # What of an Arm file runs here is seen on its unsigned twin.
    classes = [X86_VNNI, X86, ARM_DOT, as_checked_here(ARM_DOT, architecture="x86_64"), X86_VNNI]
    expected = run(model.SerializeToString(), x)
    shared = QuantizableGraph(model, calibration)
    plan = dict.fromkeys("abc", INT8)  # as much as `d` weighs may be kept of other classes
    for kernels in classes:
        artifact = shared.emit(plan, kernels=kernels)
        names = {t.name for t in onnx.load_from_string(artifact).graph.initializer}
        assert names >= {"a.weight/q", "shift/q", "norm.weight/q", "swish.weight/q"}
        assert artifact == QuantizableGraph(model, calibration).emit(plan, kernels=kernels)
        assert np.abs(run(artifact, x) - expected).mean() < 0.02 * np.ptp(expected)


def test_weights_per_tensor_share_one_scale() -> None:
    graph = quantizable_of(conv_model(opset=20), image())
    plan = {"a": Precision(8, 8, PerTensor())}
    artifact = graph.emit(plan)
    scales = {t.name: t.dims for t in onnx.load_from_string(artifact).graph.initializer}
    assert list(scales["a.weight/w8a8-tensor/scale"]) == []
    (group,) = effective_precisions(artifact, graph.units.values(), plan)
    assert (group.effective, group.reason) == ("w8a8-tensor", None)


def test_symmetric_activations_have_zero_in_the_middle() -> None:
    graph = quantizable_of(conv_model(opset=20), image())
    model = onnx.load_from_string(graph.emit({"a": Precision(8, 8, None, True)}))
    zeros = {
        int(numpy_helper.to_array(t))
        for t in model.graph.initializer
        if t.name.startswith("zero_point/")
    }
    assert zeros == {128}


def test_blocks_are_for_matrix_products() -> None:
    graph = quantizable_of(conv_model(), image())
    with pytest.raises(CompressionError, match=r"'a' cannot take w4-block64.*take w4"):
        graph.emit({"a": Precision.parse("w4-block64")})


def test_fp32_beside_any_precision_stays_float() -> None:
    """The runtime quantizes nothing on its own, whatever stands on both sides."""
    rng = np.random.default_rng(6)
    names = "abc"
    weights = {f"{n}.weight": rng.normal(0, 0.1, (16, 16, 3, 3)) for n in names}
    weights |= {f"{n}.bias": rng.normal(0, 0.1, 16) for n in names}
    tensors = ["input", "ra", "rb", "output"]
    nodes = []
    for name, taken, made in zip(names, tensors, tensors[1:], strict=False):
        inputs = [taken, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [name], name, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [name], [made], f"r{name}"))
    graph = quantizable_of(model_of(nodes, weights, SHAPE, SHAPE), image())
    for outer in (INT8, W8A16, FP16, W4, Precision.parse("w8a8-symmetric")):
        for inner in (FP32, W4, W8, W1, FP16, W8A16):
            plan = {"a": outer, "b": inner, "c": INT8}
            report = effective_precisions(graph.emit(plan), graph.units.values(), plan)
            ran = {g.group: g.effective for g in report}
            assert ran["b"] == "fp32", (outer, inner, report)
            assert ran["c"] == "w8a8", (outer, inner, report)
