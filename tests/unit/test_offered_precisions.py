"""What a job is offered follows from the device's kernels and the job's objectives."""

from __future__ import annotations

import pytest

from autotune.compression.device_kernels import DeviceKernels
from autotune.compression.kernels import ARM_DOT_HALF, X86_VNNI
from autotune.errors import InvalidJob
from autotune.search.conclusion import build_space, left_out, limits
from autotune.spec import JobSpec, parse_job
from device_agents.protocol import KernelSpeed
from search_spaces import (
    FP16,
    FP32,
    INT8,
    W4,
    W8,
    Layer,
    LayerGroup,
    LayerInventory,
    LayerKind,
    Precision,
)

X86 = DeviceKernels(kernels=X86_VNNI)
ARM = DeviceKernels(kernels=ARM_DOT_HALF)
ALL = ("fp32", "w8", "w4", "w2", "w1", "fp16", "w8a16", "w8a8")


def group(name: str, kind: LayerKind) -> LayerGroup:
    layer = Layer(
        name=name, kind=kind, op_type="Conv", macs=1, parameters=1,
        weight_shape=(8, 8), input_shape=(8,), output_shape=(8,),
    )  # fmt: skip
    return LayerGroup(name=name, layers=(layer,), nodes=(name,), precisions=ALL)


def inventory() -> LayerInventory:
    groups = (group("stem", LayerKind.CONV), group("head", LayerKind.GEMM))
    return LayerInventory(model_digest="0" * 64, groups=groups)


def job(*precisions: str, objectives: tuple[str, ...] | None = None) -> JobSpec:
    search: dict[str, object] = {"prune_ratios": [0.0]}
    if precisions:
        search["precisions"] = list(precisions)
    if objectives is not None:
        search["objectives"] = list(objectives)
    return parse_job(
        {"model": {"source": "onnx:m"}, "data": {"evaluation": "npz:e"}, "search": search}
    )


def test_by_default_packed_weights_are_offered_where_a_kernel_reads_them() -> None:
    space = build_space(job(), inventory(), kernels=[X86])
    assert space.precisions == {"stem": (FP32, INT8), "head": (FP32, W8, W4, INT8)}


def test_the_user_is_told_what_is_left_out_and_how_to_have_it() -> None:
    (notice,) = left_out(job(), inventory(), kernels=[X86])
    assert notice.startswith("w8, w4 not offered to layer group stem: the runtime has no conv")
    assert "add size to search.objectives to have it" in notice
    assert notice in limits(job(), inventory(), has_training=True, kernels=[X86])


def test_with_size_as_an_objective_everything_that_is_asked_for_is_offered() -> None:
    wanted = job(*ALL, objectives=("accuracy", "latency", "size"))
    space = build_space(wanted, inventory(), kernels=[X86])
    assert [p.name for p in space.precisions["stem"]] == list(ALL)
    assert left_out(wanted, inventory(), kernels=[X86]) == []


def test_float16_follows_the_device() -> None:
    wanted = job("fp16", "w8a16")
    on_arm = build_space(wanted, inventory(), kernels=[ARM])
    on_x86 = build_space(wanted, inventory(), kernels=[X86])
    assert on_arm.precisions["stem"] == (FP32, FP16)
    assert on_x86.precisions["stem"] == (FP32,)
    notices = left_out(wanted, inventory(), kernels=[X86])
    assert len(notices) == 2
    assert all("any layer group" in notice for notice in notices)


def test_blocks_are_offered_to_matrix_products_and_the_rest_is_told() -> None:
    wanted = job("w4-block64", objectives=("accuracy", "latency", "size"))
    space = build_space(wanted, inventory())
    assert space.precisions["head"] == (FP32, Precision.parse("w4-block64"))
    assert space.precisions["stem"] == (FP32,)
    (notice,) = left_out(wanted, inventory())
    assert notice == (
        "w4-block64 not offered to layer group stem: only matrix products share scales by blocks"
    )


def test_uniform_int8_takes_the_form_of_int8_that_is_offered() -> None:
    symmetric = Precision.parse("w8a8-symmetric")
    space = build_space(job("w8a8-symmetric"), inventory())
    assert space.uniform_int8().precisions == {"stem": symmetric, "head": symmetric}


@pytest.mark.parametrize("objectives", [("size",), ("accuracy", "size"), ()])
def test_accuracy_and_latency_are_always_objectives(objectives: tuple[str, ...]) -> None:
    with pytest.raises(InvalidJob, match="accuracy and latency are always objectives"):
        job(objectives=objectives)


def test_an_unknown_option_of_a_precision_says_how_one_is_written() -> None:
    with pytest.raises(InvalidJob, match=r"'w4-blocks' is not a precision.*w4-block64"):
        job("w4-blocks")


def measured(*figures: tuple[str, str, float], runtime: str = "onnxruntime") -> DeviceKernels:
    """A device with x86 kernels that measured these (operator, precision, ratio) to ±5 %."""
    speeds = tuple(
        KernelSpeed(
            runtime=runtime, operator=operator, precision=precision,
            ratio=ratio, ratio_low=0.95 * ratio, ratio_high=1.05 * ratio,
        )
        for operator, precision, ratio in figures
    )  # fmt: skip
    return DeviceKernels(kernels=X86_VNNI, speeds=speeds)


def test_what_the_device_measured_as_slower_is_left_out_and_the_figure_is_told() -> None:
    device = measured(("matmul", "w4", 1.4))
    assert W4 not in build_space(job(), inventory(), kernels=[device]).precisions["head"]
    notices = left_out(job(), inventory(), kernels=[device])
    assert any("1.4 (1.33 to 1.47) of FP32's time" in notice for notice in notices)
    with_size = job(objectives=("accuracy", "latency", "size"))
    assert W4 in build_space(with_size, inventory(), kernels=[device]).precisions["head"]


def test_what_the_device_measured_as_faster_beats_the_table() -> None:
    space = build_space(job("fp16"), inventory(), kernels=[measured(("conv3x3", "fp16", 0.6))])
    assert space.precisions["stem"] == (FP32, FP16)


def test_a_figure_whose_interval_holds_one_leaves_it_to_the_table() -> None:
    device = measured(("matmul", "w4", 1.02), ("conv3x3", "fp16", 0.99))
    space = build_space(job("w4", "fp16"), inventory(), kernels=[device])
    assert space.precisions == {"stem": (FP32,), "head": (FP32, W4)}


def test_8_bit_is_left_out_only_where_no_kind_of_operator_is_faster() -> None:
    slow_depthwise = measured(("depthwise", "w8a8/u8s8", 1.3), ("conv3x3", "w8a8/u8s8", 0.3))
    assert INT8 in build_space(job(), inventory(), kernels=[slow_depthwise]).precisions["stem"]
    some_slow = measured(("depthwise", "w8a8/u8s8", 1.3), ("conv3x3", "w8a8/u8s8", 1.2))
    assert INT8 in build_space(job(), inventory(), kernels=[some_slow]).precisions["stem"]
    kinds = ("conv3x3", "conv1x1", "depthwise", "matmul")
    all_slow = measured(*((kind, "w8a8/u8s8", 1.2) for kind in kinds))
    assert INT8 not in build_space(job(), inventory(), kernels=[all_slow]).precisions["stem"]


def test_figures_of_other_signs_runtimes_and_devices_do_not_count() -> None:
    kinds = ("conv3x3", "conv1x1", "depthwise", "matmul")
    signed = measured(*((kind, "w8a8/s8s8", 2.0) for kind in kinds))
    slow_ones = [(kind, "w8a8/u8s8", 2.0) for kind in kinds]
    elsewhere, slow = measured(*slow_ones, runtime="openvino"), measured(*slow_ones)
    for devices in ([signed], [elsewhere], [slow, X86]):
        assert INT8 in build_space(job(), inventory(), kernels=devices).precisions["stem"]
