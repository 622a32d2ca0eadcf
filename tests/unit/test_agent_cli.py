"""`autotune-agent` as people use it: what it prints, and with which code it ends."""

import json
import re

import pytest
from click.testing import CliRunner

from device_agents.cli import EXIT_CODES, OUTCOME_EXIT_CODES, main
from device_agents.protocol import LatencyReport, Outcome
from device_agents.runtimes.simulated import SimulatedModel


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def simulated(tmp_path):
    def make(name="model", **fields):
        path = tmp_path / name
        path.write_bytes(SimulatedModel(**({"noise": 0.01} | fields)).to_bytes())
        return path

    return make


def measure(*arguments):
    return invoke("measure", "--runtime", "simulated", *arguments)


def test_a_model_is_measured_on_its_own(simulated):
    done = measure(simulated(latency_ns=4e5))
    assert done.exit_code == 0
    assert re.search(r"latency +0\.[34]\d* ms \(0\.\d+ to 0\.\d+, 95% interval\)", done.stdout)
    assert "of itself" in done.stdout
    assert re.search(r"samples .*; (100|9\d)% undisturbed", done.stdout)
    assert "steady   yes" in done.stdout


def test_a_model_is_measured_against_another(simulated):
    done = measure(simulated(latency_ns=4e5), "--against", simulated("other", latency_ns=8e5))
    assert re.search(r"ratio +0\.(49|50)\d .* of other at 0\.\d+ ms", done.stdout)


def test_json_holds_the_whole_report(simulated):
    done = measure(simulated(), "--threads", 2, "-o", "json")
    document = json.loads(done.stdout)
    report = LatencyReport.model_validate(document["report"])
    assert document["outcome"] == "ok"
    assert report.runtime.threads == 2
    assert report.blocks


@pytest.mark.parametrize(("verb", "code"), [("segfault", 20), ("unsupported", 12), ("raise", 20)])
def test_a_failed_measurement_ends_with_its_own_code(simulated, verb, code):
    done = measure(simulated(verb=verb))
    assert done.exit_code == code
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_a_file_that_is_no_model_is_told_in_one_line(tmp_path):
    (tmp_path / "model.onnx").write_text("not a model")
    done = invoke("measure", tmp_path / "model.onnx")
    assert done.exit_code == 3
    assert done.stderr.startswith("Error: artifact_corrupt: not an ONNX model")


@pytest.mark.parametrize(
    "arguments", [("nowhere.onnx",), (__file__, "--threads", "0"), (__file__, "--target", "2")]
)
def test_wrong_usage_is_refused_before_anything_is_measured(arguments):
    assert invoke("measure", *arguments).exit_code == 2


def test_an_unknown_runtime_is_told_with_the_known_ones():
    done = invoke("measure", __file__, "--runtime", "abacus")
    assert done.exit_code == 12
    assert "onnxruntime, openvino, simulated" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--service", "http://127.0.0.1:9"), 1, "not enrolled yet"),
        (("--service", "nowhere"), 1, "looks like http://"),
        ((), 2, "--service"),
    ],
)
def test_an_agent_that_cannot_start_says_why(tmp_path, arguments, code, said):
    done = invoke("run", "--state-dir", tmp_path, *arguments)
    assert done.exit_code == code
    assert said in done.stderr


def test_the_probe_shows_the_device_and_its_runtimes():
    done = invoke("probe")
    assert re.search(r"^fingerprint +[0-9a-f]{64}$", done.stdout, re.MULTILINE)
    assert re.search(r"^runtime onnxruntime +\d", done.stdout, re.MULTILINE)
    assert json.loads(invoke("probe", "-o", "json").stdout)["device"]["logical_cpus"] >= 1


def test_every_outcome_of_a_measurement_has_a_documented_exit_code():
    services_own = {Outcome.LOST, Outcome.CANCELLED, Outcome.QUARANTINED}
    assert set(OUTCOME_EXIT_CODES) == {str(x) for x in Outcome} - services_own
    documented = {int(number) for number in re.findall(r"\b\d+\b", EXIT_CODES)}
    assert set(OUTCOME_EXIT_CODES.values()) <= documented
