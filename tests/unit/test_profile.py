"""Profiles: kernels timed on the device, and the layer groups that they compute."""

import io
import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from autotune.cli.output import print_rows
from autotune.cli.views.trials import GROUPS as GROUP_ROWS
from autotune.compression.layer_times import with_groups
from autotune.service.views import trial_view
from device_agents.cli import main
from device_agents.measurement import Measurement
from device_agents.profile import kernel_medians, profile
from device_agents.protocol import KernelTime, MeasurementPlan, Profile, RuntimeRequest
from device_agents.runtimes import KernelRun, RuntimeOptions, load_runtime
from device_agents.runtimes.onnxruntime import kernel_runs
from device_agents.runtimes.simulated import SimulatedModel
from search_spaces import LayerGroup
from tests.unit import fabricated_job as fabricated
from tests.unit.records import latency, trial

ONE_THREAD = RuntimeOptions(provider="CPUExecutionProvider", threads=1)


@pytest.fixture
def two_layers(tmp_path):
    """A 3x3 convolution with Relu, and a 1x1 one; each takes some of openvino's microseconds."""
    rng = np.random.default_rng(0)
    weights = {"w1": (8, 3, 3, 3), "w2": (8, 8, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="Relu:b"),
        helper.make_node("Conv", ["b", "w2"], ["y"], name="second"),
    ]
    shapes = {"x": ["n", 3, 64, 64], "y": ["n", 8, 64, 64]}
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    constants = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    graph = helper.make_graph(nodes, "two_layers", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def group(name, *nodes):
    return LayerGroup(name=name, layers=(), nodes=nodes, precisions=("fp32",))


GROUPS = (group("first", "first", "Relu:b"), group("second", "second"))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_kernels_of_both_layers_are_timed_and_found_again(two_layers, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="the extra openvino is not installed")
    found = Profile(**profile(load_runtime(runtime), two_layers, ONE_THREAD, seed=0))
    assert found.missing is None
    mapped = with_groups(found, two_layers.read_bytes(), GROUPS)
    assert {k.group for k in mapped.kernels if "Conv" in k.operator} == {"first", "second"}
    assert all(k.time_ns > 0 for k in mapped.kernels if "Conv" in k.operator)


def test_a_kernel_that_runs_twice_counts_with_its_sum():
    run = [KernelRun(name="a", operator="Conv", duration_ns=ns) for ns in (1.0, 2.0)]
    assert kernel_medians([run, run]) == [{"name": "a", "operator": "Conv", "time_ns": 3.0}]


def test_one_slow_run_does_not_move_a_kernels_median():
    runs = [[KernelRun(name="a", operator="Conv", duration_ns=ns)] for ns in (10.0, 11.0, 9e6)]
    assert kernel_medians(runs)[0]["time_ns"] == 11.0


def test_a_trace_is_cut_into_calls():
    node = {"cat": "Node", "name": "a_kernel_time", "dur": 7, "args": {"op_name": "Conv"}}
    call = {"cat": "Session", "name": "model_run", "dur": 9}
    other = {"cat": "Session", "name": "session_initialization", "dur": 1}
    assert kernel_runs([other, node, call, node, node, call]) == [
        [KernelRun(name="a", operator="Conv", duration_ns=7000.0)],
        [KernelRun(name="a", operator="Conv", duration_ns=7000.0)] * 2,
    ]


@pytest.mark.parametrize(
    ("name", "operator", "expected"),
    [
        ("first_token_4", "QLinearConv", "first"),
        ("b_nchwc", "Conv", "first"),
        ("first/WithoutBiases", "Convolution", "first"),
        ("y_nchwc", "Conv", "second"),
        ("second/mul", "QLinearMul", "second"),
        ("b/q", "QuantizeLinear", None),
        ("ReorderOutput_token_3", "ReorderOutput", None),
        ("input/q", "QuantizeLinear", None),
    ],
)
def test_a_runtimes_name_leads_to_the_group(two_layers, name, operator, expected):
    found = Profile(kernels=(KernelTime(name=name, operator=operator, time_ns=1.0),))
    (kernel,) = with_groups(found, two_layers.read_bytes(), GROUPS).kernels
    assert kernel.group == expected


def measured(path, **settings):
    return Measurement(
        candidate=path,
        reference=path,
        runtime=RuntimeRequest(runtime="simulated"),
        plan=MeasurementPlan(time_cap_s=1.0),
        **settings,
    ).run()


def test_a_measurement_profiles_only_where_it_is_asked_to(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(SimulatedModel(latency_ns=3e5).to_bytes())
    assert measured(path).report.profile is None
    found = measured(path, profile=True).report.profile
    assert [(k.operator, k.time_ns) for k in found.kernels] == [("Simulated", 3e5)]


class Unprofiled:
    """A runtime whose profiler breaks."""

    def load_profiled(self, *_):
        raise RuntimeError("no counters")


def test_a_profiler_that_breaks_costs_the_profile_alone(tmp_path):
    found = Profile(**profile(Unprofiled(), tmp_path, ONE_THREAD, seed=0))
    assert found.kernels == ()
    assert "no counters" in found.missing


def test_the_device_shows_the_kernels_of_a_model_alone(two_layers):
    arguments = ["measure", str(two_layers), "--profile", "--time-cap", "0.2"]
    shown = CliRunner().invoke(main, [*arguments, "-o", "json"])
    kernels = json.loads(shown.stdout)["report"]["profile"]["kernels"]
    assert sum(k["operator"] == "Conv" for k in kernels) == 2
    assert "kernels take" in CliRunner().invoke(main, arguments).stdout


def profiled_trial():
    kernels = (
        KernelTime(name="conv", operator="Conv", time_ns=3e5, group="stem"),
        KernelTime(name="relu", operator="Relu", time_ns=1e5, group="stem"),
        KernelTime(name="in", operator="ReorderInput", time_ns=5e4),
    )
    profile = Profile(kernels=kernels, inference_ns=5e5, n_runs=50)
    groups = [{"group": g, "planned": "fp32", "effective": "fp32"} for g in ("stem", "body")]
    return trial(
        0, 1.0, 0.9, compression={"groups": groups},
        confirmed_latency=latency(1.0).model_copy(update={"profile": profile}),
    )  # fmt: skip


def test_a_trial_shows_what_each_groups_kernels_take_and_what_lies_between():
    shown = trial_view(fabricated.job(fabricated.inventory()), profiled_trial())
    assert {group.group: group.kernel_ns for group in shown.groups} == {"stem": 4e5, "body": None}
    assert shown.profile.other_ns == {"ReorderInput": 5e4}
    table = io.StringIO()
    print_rows(GROUP_ROWS, shown.groups, output_format="table", to=table)
    assert "0.4" in next(line for line in table.getvalue().splitlines() if "stem" in line)
