"""The kernel benchmark: its models, its figures, and where they are kept."""

import errno
import os
import signal
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest

from autotune.compression.effective import optimized_graph
from autotune.compression.kernel_models import FOLDER, LAYERS, make_models
from device_agents import kernel_benchmark
from device_agents.kernel_benchmark import kernel_speeds, remembered
from device_agents.protocol import KernelSpeed, RuntimeBuild

HARDWARE = "f" * 64
SPEED = KernelSpeed(
    runtime="onnxruntime", operator="matmul", precision="w4", ratio=0.3, ratio_low=0.2,
    ratio_high=0.4,
)  # fmt: skip


def build(name, *providers):
    return RuntimeBuild(name=name, version="1", providers=providers or ("CPUExecutionProvider",))


def test_the_shipped_models_are_those_that_the_script_makes():
    shipped = {path.name: path.read_bytes() for path in FOLDER.glob("*.onnx")}
    assert shipped == make_models()
    assert max(map(len, shipped.values())) < 4096


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("conv3x3.w8a8-u8s8", "QLinearConv"),
        ("conv1x1.w8a8-u8s8", "QLinearConv"),
        ("depthwise.w8a8-u8s8", "QLinearConv"),
        ("matmul.w8a8-u8s8", "QLinearMatMul"),
        ("matmul.w4", "MatMulNBits"),
        ("conv3x3.fp32", "Conv"),
    ],
)
def test_onnxruntime_executes_the_models_in_the_kernels_that_they_are_about(name, kernel):
    nodes = optimized_graph(make_models()[f"{name}.onnx"]).graph.node
    assert Counter(node.op_type for node in nodes)[kernel] == LAYERS


def test_a_runtime_that_does_not_load_leaves_a_reason_for_every_figure():
    found, is_whole = kernel_speeds("no-such-runtime", limit_s=60)
    assert is_whole
    assert len(found) == 14
    assert all("no-such-runtime" in speed.missing for speed in found)


def test_what_the_time_limit_cuts_off_is_told_as_missing_and_not_kept(tmp_path):
    found = remembered(tmp_path, HARDWARE, [build("onnxruntime")], limit_s=0.0)
    assert {speed.ratio for speed in found} == {None}
    assert "was over" in found[0].missing
    assert list(tmp_path.iterdir()) == []


def ended(return_code, output=b""):
    """A child process that ended so, whatever it was told to run."""
    child = SimpleNamespace(returncode=return_code, communicate=lambda timeout: (output, b""))
    return lambda command, **options: child


@pytest.mark.parametrize(
    ("return_code", "is_kept"), [(0, True), (-signal.SIGSEGV, True), (-signal.SIGINT, False)]
)
def test_figures_that_somebody_interrupted_are_not_kept(
    monkeypatch, tmp_path, return_code, is_kept
):
    line = SPEED.model_dump_json().encode() + b"\n"
    monkeypatch.setattr(subprocess, "Popen", ended(return_code, line + b'{"half'))
    found = remembered(tmp_path, HARDWARE, [build("onnxruntime")])
    assert found[0] == SPEED
    assert [speed.missing for speed in found[1:]] == [
        f"the benchmark ended with code {return_code}"
    ] * 13
    assert bool(list(tmp_path.iterdir())) is is_kept


def test_a_figure_compares_a_model_with_its_twin(monkeypatch):
    monkeypatch.setattr(kernel_benchmark, "PAIR_S", 0.05)
    model = FOLDER / "conv1x1.w8a8-u8s8.onnx"
    found = kernel_benchmark._compare("onnxruntime", model, FOLDER / "conv1x1.fp32.onnx")
    assert 0 < found["ratio_low"] <= found["ratio"] <= found["ratio_high"]


@pytest.fixture
def measured(monkeypatch):
    calls = []

    def instead(runtime, *, limit_s):
        calls.append(runtime)
        return [SPEED], True

    monkeypatch.setattr(kernel_benchmark, "kernel_speeds", instead)
    return calls


def test_the_figures_of_a_build_are_measured_once_on_the_same_hardware(measured, tmp_path):
    said = []
    for _ in range(2):
        assert remembered(tmp_path, HARDWARE, [build("openvino")], say=said.append) == (SPEED,)
    assert len(measured) == len(said) == 1
    remembered(tmp_path, "e" * 64, [build("openvino")])
    remembered(tmp_path, HARDWARE, [build("onnxruntime")])
    assert measured == ["openvino", "openvino", "onnxruntime"]


def test_runtimes_that_do_not_read_the_models_are_left_out(measured, tmp_path):
    builds = [build("simulated"), build("vendor"), build("openvino", "NPUExecutionProvider")]
    assert remembered(tmp_path, HARDWARE, builds) == ()
    assert measured == []


@pytest.mark.parametrize("content", ["", "{}", '{"version": 99, "speeds": []}', "[1]"])
def test_figures_that_cannot_be_read_are_measured_again(measured, tmp_path, content):
    (tmp_path / f"kernel-speeds-{HARDWARE[:16]}-openvino-1.json").write_text(content)
    assert remembered(tmp_path, HARDWARE, [build("openvino")]) == (SPEED,)
    assert len(measured) == 1


def test_figures_that_cannot_be_kept_are_no_error(measured, tmp_path):
    (tmp_path / "file").write_text("")
    assert remembered(tmp_path / "file", HARDWARE, [build("openvino")]) == (SPEED,)


def test_figures_that_find_no_room_on_the_disk_are_told_all_the_same(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(subprocess, "Popen", ended(0, SPEED.model_dump_json().encode() + b"\n"))
    monkeypatch.setattr(os, "fsync", full)
    assert remembered(tmp_path, HARDWARE, [build("onnxruntime")])[0] == SPEED
    assert list(tmp_path.iterdir()) == []
