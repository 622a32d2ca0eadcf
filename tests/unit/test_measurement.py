"""One child per measurement: every way it can end is an outcome of its own."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_agents import measurement_child
from device_agents.feeds import make_feeds
from device_agents.files import NO_ROOM_EXIT
from device_agents.isolation import can_leave_network
from device_agents.measurement import ChildEnd, Measurement, interpret
from device_agents.measurement_child import LARGEST_FILE_BYTES, ChildJob
from device_agents.protocol import MeasurementPlan, Outcome, RuntimeRequest
from device_agents.rest import RestMemory
from device_agents.runtimes import RuntimeOptions, TensorSpec, UnsupportedModel
from device_agents.runtimes.simulated import SimulatedModel

SIMULATED = RuntimeRequest(runtime="simulated")


def artifact(folder, name="candidate", **fields):
    path = folder / name
    path.write_bytes(SimulatedModel(**fields).to_bytes())
    return path


def measurement(folder, *, runtime=SIMULATED, timeout_s=30.0, memory_limit_bytes=None, **fields):
    return Measurement(
        candidate=artifact(folder, **fields),
        reference=artifact(folder, "reference", latency_ns=8e5, noise=0.01),
        runtime=runtime,
        plan=MeasurementPlan(timeout_s=timeout_s, seed=3),
        memory_limit_bytes=memory_limit_bytes,
    )


def test_a_measurement_reports_the_ratio_of_two_simulated_models(tmp_path):
    ended = measurement(tmp_path, latency_ns=4e5, noise=0.01).run()
    assert ended.outcome is Outcome.OK
    report = ended.report
    assert report.ratio == pytest.approx(0.5, rel=0.02)
    assert report.ratio_low < 0.5 < report.ratio_high
    assert report.is_steady
    assert {block.subject for block in report.blocks} == {"candidate", "reference"}
    assert report.n_samples == sum(len(block.samples_ns) for block in report.blocks)
    assert report.process_s > report.wall_s > 0
    assert report.peak_memory_bytes > 2**20
    assert report.after.available_memory_bytes is not None
    assert len(report.between) == max(block.sitting for block in report.blocks)
    assert all(x.available_memory_bytes and not x.missing for x in report.between)


def test_a_model_cannot_reach_the_network(tmp_path):
    if not can_leave_network():
        pytest.skip("this kernel gives an unprivileged process no network of its own")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        ended = measurement(tmp_path, verb="call_home", port=port).run()
        with pytest.raises(BlockingIOError):  # nobody waits to be let in
            listener.accept()
    assert ended.outcome is Outcome.OK


@pytest.mark.parametrize(
    ("verb", "outcome", "said"),
    [
        ("segfault", Outcome.RUNTIME_CRASH, "SIGSEGV"),
        ("abort", Outcome.RUNTIME_CRASH, "SIGABRT"),
        ("raise", Outcome.RUNTIME_CRASH, "the simulated kernel failed"),
        ("garbage", Outcome.RUNTIME_CRASH, "without a result"),
        ("backwards_clock", Outcome.RUNTIME_CRASH, "ns by the clock"),
        ("unsupported", Outcome.UNSUPPORTED, "no kernel for this operator"),
    ],
)
def test_each_failure_has_its_outcome_and_reason(tmp_path, verb, outcome, said):
    ended = measurement(tmp_path, verb=verb).run()
    assert ended.outcome is outcome
    assert said in ended.reason
    assert ended.report is None


def test_a_crash_while_loading_is_a_crash_too(tmp_path):
    ended = measurement(tmp_path, verb="segfault", after_calls=0).run()
    assert ended.outcome is Outcome.RUNTIME_CRASH


def test_a_model_that_takes_all_memory_meets_its_limit(tmp_path):
    ended = measurement(tmp_path, verb="oom", memory_limit_bytes=400 * 2**20).run()
    assert ended.outcome is Outcome.OOM
    assert "memory" in ended.reason


def test_a_child_that_ignores_sigterm_is_ended_at_the_time_limit(tmp_path):
    ended = measurement(tmp_path, verb="hang", timeout_s=1.5).run()
    assert ended.outcome is Outcome.TIMEOUT
    assert "1.5 s" in ended.reason


def test_a_measurement_can_be_cancelled_while_it_runs(tmp_path):
    running = measurement(tmp_path, verb="hang")
    threading.Timer(0.5, running.cancel).start()
    assert running.run().outcome is Outcome.CANCELLED


def test_a_measurement_cancelled_before_it_runs_starts_no_process(tmp_path):
    never = measurement(tmp_path)
    never.cancel()
    assert never.run().outcome is Outcome.CANCELLED


def test_a_device_that_goes_on_drifting_is_unstable_with_its_figures(tmp_path):
    ended = Measurement(
        candidate=artifact(tmp_path, latency_ns=2e5, drift_per_s=0.3),
        reference=artifact(tmp_path, "reference", drift_per_s=0.3),
        runtime=SIMULATED,
        plan=MeasurementPlan(target_half_width=0.001, time_cap_s=15.0),
    ).run()
    assert ended.outcome is Outcome.UNSTABLE
    assert "4 attempts" in ended.reason
    assert not ended.report.is_steady
    assert ended.report.n_restarts == 3
    assert ended.report.ratio == pytest.approx(0.5, rel=0.01)


def test_a_ratio_that_changes_all_the_time_is_unstable_with_its_figures(tmp_path):
    ended = Measurement(
        candidate=artifact(tmp_path, noise=0.01, drift_per_s=0.5),
        reference=artifact(tmp_path, "reference", noise=0.01),
        runtime=SIMULATED,
        plan=MeasurementPlan(target_half_width=0.0005, time_cap_s=5.0),
    ).run()
    assert ended.outcome is Outcome.UNSTABLE
    assert "wide at the time cap" in ended.reason
    assert ended.report.unsteady_reason == ended.reason
    assert ended.report.ratio_high - ended.report.ratio_low > 0.4


def test_what_was_measured_while_the_device_was_throttled_is_left_out(tmp_path):
    spell = {"throttle_after_s": 0.3, "throttle_until_s": 1.0, "throttle_factor": 1.8}
    ended = Measurement(
        candidate=artifact(tmp_path, noise=0.01, **spell),
        reference=artifact(tmp_path, "reference", noise=0.01),
        runtime=SIMULATED,
        plan=MeasurementPlan(target_half_width=0.0005, time_cap_s=3.0),
    ).run()
    assert ended.outcome is Outcome.OK
    assert ended.report.ratio == pytest.approx(1.0, rel=0.01)
    assert ended.report.tainted_pairs["throttled"] > 5


@pytest.mark.parametrize(("pinned", "ratio"), [(SIMULATED, 0.55), (None, 1.0)])
def test_the_reference_runs_with_its_own_options_where_it_has_some(tmp_path, pinned, ratio):
    ended = Measurement(
        candidate=artifact(tmp_path, noise=0.01),
        reference=artifact(tmp_path, "reference", noise=0.01),
        runtime=RuntimeRequest(runtime="simulated", threads=2),
        reference_runtime=pinned,  # the simulated device halves nine tenths with two threads
        plan=MeasurementPlan(),
    ).run()
    assert ended.report.ratio == pytest.approx(ratio, rel=0.02)
    assert ended.report.runtime.threads == 2


def test_an_unknown_runtime_is_unsupported_and_the_known_ones_are_named(tmp_path):
    ended = measurement(tmp_path, runtime=RuntimeRequest(runtime="abacus")).run()
    assert ended.outcome is Outcome.UNSUPPORTED
    assert "onnxruntime, openvino, simulated" in ended.reason


def test_a_provider_that_is_not_there_is_unsupported(tmp_path):
    runtime = RuntimeRequest(runtime="simulated", provider="AbacusExecutionProvider")
    assert measurement(tmp_path, runtime=runtime).run().outcome is Outcome.UNSUPPORTED


@pytest.mark.parametrize("content", [b"", b"no model at all", b"{}"])
def test_a_file_that_is_no_model_is_corrupt(tmp_path, content):
    (tmp_path / "model").write_bytes(content)
    ended = Measurement(
        candidate=tmp_path / "model",
        reference=tmp_path / "model",
        runtime=RuntimeRequest(),
        plan=MeasurementPlan(),
    ).run()
    assert ended.outcome is Outcome.ARTIFACT_CORRUPT
    assert "not an ONNX model" in ended.reason
    assert str(tmp_path) not in ended.reason


def test_an_onnx_model_is_measured_against_itself(tmp_path):
    model = small_onnx_model(tmp_path / "model.onnx", shape=("N", 3, 16, 16))
    ended = Measurement(
        candidate=model,
        reference=model,
        runtime=RuntimeRequest(),
        plan=MeasurementPlan(time_cap_s=1.0, target_half_width=0.3),
    ).run()
    assert ended.outcome in (Outcome.OK, Outcome.UNSTABLE)
    assert 0.2 < ended.report.ratio < 5
    assert ended.report.p50_ns > 1_000


def test_a_model_with_free_sizes_is_unsupported_with_the_way_out(tmp_path):
    model = small_onnx_model(tmp_path / "model.onnx", shape=("N", 3, "H", "W"))
    ended = Measurement(
        candidate=model, reference=model, runtime=RuntimeRequest(), plan=MeasurementPlan()
    ).run()
    assert ended.outcome is Outcome.UNSUPPORTED
    assert "export the model with fixed sizes" in ended.reason


def small_onnx_model(path, *, shape):
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), dtype=np.float32), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "weight"], ["y"])],
        "one convolution",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [weight],
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    )
    return path


def test_a_child_whose_parent_is_killed_dies_with_it(tmp_path):
    model = artifact(tmp_path, verb="kill_agent")
    reference = artifact(tmp_path, "reference")
    program = f"""
from pathlib import Path
from device_agents.measurement import Measurement
from device_agents.protocol import MeasurementPlan, RuntimeRequest
Measurement(candidate=Path({str(model)!r}), reference=Path({str(reference)!r}),
            runtime=RuntimeRequest(runtime="simulated"), plan=MeasurementPlan()).run()
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    assert wait_until_gone(str(tmp_path))


def wait_until_gone(text):
    """True once no process has the text in its command line; False after 10 s."""
    quiet = threading.Event()
    for _ in range(200):
        if not any(text in command_line(path) for path in Path("/proc").glob("[0-9]*")):
            return True
        quiet.wait(0.05)
    return False


def command_line(process):
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def end(**changes):
    fields = {
        "return_code": 0,
        "process_s": 1.5,
        "killed": None,
        "was_oom_killed": False,
        "document": None,
        "log_tail": "",
    }
    return interpret(ChildEnd(**fields | changes), runtime=SIMULATED, timeout_s=9)


def test_an_interval_without_an_end_is_no_report():
    report = {"ratio_high": float("inf")}
    told = end(document={"outcome": "unstable", "reason": "2 blocks only", "report": report})
    assert (told.outcome, told.reason, told.report) == (Outcome.UNSTABLE, "2 blocks only", None)


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        ({"return_code": -9}, Outcome.OOM, "most likely"),
        ({"return_code": -9, "was_oom_killed": True}, Outcome.OOM, "the kernel ran out"),
        ({"return_code": -9, "killed": Outcome.TIMEOUT}, Outcome.TIMEOUT, "9 s"),
        ({"return_code": -24}, Outcome.TIMEOUT, "SIGXCPU"),
        ({"return_code": -6, "log_tail": "x\nstd::bad_alloc\n"}, Outcome.OOM, "bad_alloc"),
        ({"return_code": -4}, Outcome.RUNTIME_CRASH, "SIGILL"),
        ({"return_code": NO_ROOM_EXIT}, Outcome.DEVICE_DISK, "TMPDIR"),
        ({"return_code": 1, "log_tail": "a\nb\n\n"}, Outcome.RUNTIME_CRASH, "last wrote: b"),
        ({"document": {"outcome": "fine"}}, Outcome.RUNTIME_CRASH, "makes no sense"),
        ({"document": {"outcome": "ok", "report": {}}}, Outcome.RUNTIME_CRASH, "no sense"),
    ],
)
def test_every_end_of_a_child_has_an_outcome(changes, outcome, said):
    ended = end(**changes)
    assert ended.outcome is outcome
    assert said in ended.reason


@pytest.mark.parametrize(
    ("function", "number", "outcome"),
    [
        ("tempfile.mkdtemp", errno.ENOSPC, Outcome.DEVICE_DISK),
        ("pathlib.Path.write_text", errno.EDQUOT, Outcome.DEVICE_DISK),
        ("subprocess.Popen", errno.EAGAIN, Outcome.OOM),
        ("subprocess.Popen", errno.ENOMEM, Outcome.OOM),
    ],
)
def test_a_device_without_room_for_a_child_is_an_outcome(
    tmp_path, monkeypatch, function, number, outcome
):
    never = measurement(tmp_path)

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(function, refused)
    assert never.run().outcome is outcome


def test_a_device_that_has_no_folder_for_temporary_files_is_out_of_room(tmp_path, monkeypatch):
    never = measurement(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/full"])
    assert never.run().outcome is Outcome.DEVICE_DISK


def test_a_process_that_cannot_be_started_for_another_reason_is_no_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"):
        measurement(tmp_path).run()


def test_a_child_may_write_no_file_without_end_and_compute_no_longer_than_its_time(tmp_path):
    job = job_file(tmp_path, cpu_limit_s=77, memory_limit_bytes=2**30)
    program = f"""
import json, resource
from pathlib import Path
from device_agents.measurement_child import ChildJob, confine
confine(ChildJob.read(Path({str(job)!r})))
kinds = ("FSIZE", "CPU", "DATA", "CORE")
print(json.dumps([resource.getrlimit(getattr(resource, "RLIMIT_" + kind)) for kind in kinds]))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, stdout=subprocess.PIPE)
    assert json.loads(done.stdout) == [[x, x] for x in (LARGEST_FILE_BYTES, 77, 2**30, 0)]


def test_a_report_without_room_is_not_laid_at_the_models_door(tmp_path):
    job = job_file(tmp_path)
    (tmp_path / "report.part").symlink_to("/dev/full")
    command = [sys.executable, "-m", "device_agents.measurement_child"]
    ended = subprocess.run([*command, job, tmp_path / "report.json"], timeout=60)
    assert ended.returncode == NO_ROOM_EXIT


def job_file(folder, **changes):
    """The job of a child that this process starts."""
    job = child_job(folder, parent_pid=os.getpid(), **changes)
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    return folder / "job.json"


def child_job(folder, **changes):
    fields = {
        "candidate_path": str(artifact(folder, noise=0.01)),
        "reference_path": str(artifact(folder, "reference", noise=0.01)),
        "runtime": "simulated",
        "options": RuntimeOptions(),
        "reference_runtime": "simulated",
        "reference_options": RuntimeOptions(),
        "target_half_width": 0.02,
        "time_cap_s": 10.0,
        "rest_ns": None,
        "rest_cap_s": None,
        "is_calibration": False,
        "min_blocks": 8,
        "seed": 0,
        "reference_latency_ns": None,
        "memory_limit_bytes": None,
        "cpu_limit_s": 100,
        "parent_pid": os.getppid(),
        "profile": False,
    }
    return ChildJob(**fields | changes)


def test_the_childs_report_is_plain_json_that_the_protocol_reads(tmp_path):
    document = json.loads(json.dumps(measurement_child.measure(child_job(tmp_path))))
    ended = end(document=document)
    assert ended.outcome is Outcome.OK
    assert ended.report.runtime_version == "1"


def test_a_given_reference_latency_calibrates_the_report(tmp_path):
    document = measurement_child.measure(child_job(tmp_path, reference_latency_ns=1e6))
    report = document["report"]
    assert report["p50_ns"] == pytest.approx(report["ratio"] * 1e6)


def test_the_reference_against_itself_is_told_from_any_other_candidate(tmp_path):
    job = child_job(tmp_path, reference_latency_ns=1e6)
    itself = replace(job, candidate_path=job.reference_path)
    otherwise = replace(itself, options=RuntimeOptions(threads=2))
    assert [x.is_reference for x in (job, itself, otherwise)] == [False, True, False]
    moved, alike = (measurement_child.measure(x)["report"] for x in (job, itself))
    assert alike["ratio_high"] / alike["ratio"] < 1.25 < moved["ratio_high"] / moved["ratio"]


def test_a_measurement_waits_for_a_device_at_rest_as_long_as_it_was_told(tmp_path):
    job = child_job(tmp_path, rest_ns=1e5, time_cap_s=1.0)
    waiting = replace(job, rest_cap_s=4.0)
    waited, ended = (measurement_child.measure(x)["report"]["n_blocks"] for x in (waiting, job))
    assert waited > 2 * ended


def test_the_reference_against_itself_does_not_wait_for_a_device_at_rest(tmp_path):
    own, reference = artifact(tmp_path, noise=0.01), artifact(tmp_path, "reference", noise=0.01)
    plan = MeasurementPlan(time_cap_s=1.0, reference_latency_ns=1e5)
    waited, alike = (
        Measurement(candidate=path, reference=reference, runtime=SIMULATED, plan=plan).run()
        for path in (own, reference)
    )
    assert waited.report.n_blocks > 2 * alike.report.n_blocks


def test_what_one_measurement_found_of_rest_the_next_one_is_told(tmp_path):
    own, reference = artifact(tmp_path, noise=0.01), artifact(tmp_path, "reference", noise=0.01)
    memory = RestMemory()

    def measure(**known):
        plan = MeasurementPlan(time_cap_s=1.0, **known)
        ended = Measurement(
            candidate=own, reference=reference, runtime=SIMULATED, plan=plan, memory=memory
        ).run()
        return ended.report

    first = measure()
    assert first.reference_rest_ns is None
    after = measure(reference_latency_ns=2 * first.reference_p50_ns)
    assert after.reference_rest_ns == first.reference_p50_ns, "whatever was calibrated"


def test_two_measurements_with_one_seed_are_equal_on_a_simulated_device(tmp_path):
    first, second = (measurement_child.measure(child_job(tmp_path))["report"] for _ in range(2))
    assert first["blocks"] == second["blocks"]
    assert first["ratio_low"] == second["ratio_low"]


def test_inputs_are_the_same_numbers_wherever_the_shapes_agree():
    spec = TensorSpec(name="a", shape=(None, 3, 4), dtype="float32")
    first = make_feeds([spec], seed=5)["a"]
    second = make_feeds([TensorSpec(name="b", shape=(1, 3, 4), dtype="float32")], seed=5)["b"]
    assert first.shape == (1, 3, 4)
    assert (first == second).all()


def test_a_free_dimension_that_is_not_the_batch_is_refused():
    with pytest.raises(UnsupportedModel, match="only the first axis"):
        make_feeds([TensorSpec(name="a", shape=(None, 3, None), dtype="float32")], seed=0)
