"""Options of a runtime: identity of a candidate, what is asked of an agent, what a session gets."""

import json

import onnxruntime
import pytest

from device_agents.protocol import RuntimeBuild, RuntimeRequest
from device_agents.runtimes import RuntimeOptions, UnsupportedModel, load_runtime
from device_agents.runtimes.onnxruntime import (
    LEVELS,
    OnnxRuntime,
    provider_chain,
    session_options,
)
from device_agents.runtimes.simulated import SimulatedModel
from search_spaces import GRAPH_LEVELS, Candidate, Precision, SearchSpace
from search_spaces import RuntimeOptions as Chosen
from search_spaces.errors import InvalidChoice
from tests.unit.spaces import inventory

UNUSUAL = Chosen(threads=2, graph_level="extended", memory_arena=False, spinning=False)


def test_the_usual_options_leave_a_candidates_digest_as_it_was():
    written = Candidate(precisions={"fc": Precision(8, 8)}).to_json()
    assert written == {
        "version": 1,
        "precisions": {"fc": "w8a8"},
        "prune_ratios": {},
        "runtime": {"runtime": "onnxruntime", "provider": "CPUExecutionProvider", "threads": 1},
    }


def test_an_unusual_option_makes_another_candidate_of_the_same_artifact():
    plain, other = Candidate(), Candidate(runtime=UNUSUAL)
    assert other.digest != plain.digest
    assert other.artifact_digest == plain.artifact_digest
    assert other.to_json()["version"] == 3
    assert Candidate.from_json(json.loads(other.canonical_json())) == other


def test_a_space_with_unusual_options_reads_back_and_begins_with_the_plain_one():
    gpu = Chosen(provider="ACLExecutionProvider")
    space = SearchSpace.build(
        inventory(), precisions=[], runtimes=[UNUSUAL, gpu, Chosen(spinning=False), Chosen()]
    )
    assert space.runtimes[0] == Chosen()
    assert SearchSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_an_unknown_graph_level_names_the_known_ones():
    with pytest.raises(InvalidChoice, match=r"'high' is not known; write all, layout"):
        Chosen(graph_level="high")


def test_a_request_of_the_usual_options_means_the_same_to_an_older_agent():
    sent = RuntimeRequest(threads=2).model_dump()
    known_then = {key: sent[key] for key in ("runtime", "provider", "threads")}
    assert RuntimeRequest.model_validate(known_then) == RuntimeRequest(threads=2)
    assert RuntimeBuild(name="onnxruntime", version="1.30.0", providers=()).options == ()


def test_every_option_of_a_candidate_reaches_the_agent():
    from autotune.search.fleet import runtime_request

    assert runtime_request(UNUSUAL).model_dump() == UNUSUAL.to_json()
    assert set(RuntimeRequest.model_fields) == set(Chosen.__slots__)


def test_a_runtime_says_what_is_not_usual_about_it():
    asked = RuntimeRequest(threads=2, graph_level="basic", memory_arena=False, spinning=False)
    assert asked.text(version="1.31.1") == (
        "onnxruntime 1.31.1, CPUExecutionProvider, 2 threads, graph level basic, "
        "no memory arena, no spinning"
    )
    assert RuntimeRequest().text() == "onnxruntime, CPUExecutionProvider, 1 thread"


def test_a_session_gets_the_options_and_is_a_plain_one_without():
    plain, usual = onnxruntime.SessionOptions(), session_options(RuntimeOptions())
    assert usual.graph_optimization_level == plain.graph_optimization_level
    assert usual.enable_cpu_mem_arena == plain.enable_cpu_mem_arena
    other = session_options(
        RuntimeOptions(threads=2, graph_level="basic", memory_arena=False, spinning=False)
    )
    assert other.graph_optimization_level == LEVELS["basic"]
    assert not other.enable_cpu_mem_arena
    assert other.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_every_graph_level_is_one_of_onnxruntimes():
    assert tuple(LEVELS) == GRAPH_LEVELS
    assert len(set(LEVELS.values())) == len(GRAPH_LEVELS)


def test_behind_tensorrt_cuda_takes_what_it_leaves_where_the_build_has_it():
    asked = RuntimeOptions(provider="TensorrtExecutionProvider")
    chain = provider_chain(asked, offered=("TensorrtExecutionProvider", "CUDAExecutionProvider"))
    assert [name for name, _ in chain] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    assert len(provider_chain(asked, offered=("TensorrtExecutionProvider",))) == 1


def test_a_provider_with_threads_of_its_own_gets_all_of_them():
    asked = RuntimeOptions(provider="XnnpackExecutionProvider", threads=4)
    assert provider_chain(asked, offered=()) == [
        ("XnnpackExecutionProvider", {"intra_op_num_threads": "4"})
    ]
    assert session_options(asked).intra_op_num_threads == 1


def test_a_provider_that_does_not_start_is_told_and_not_replaced(monkeypatch, tmp_path):
    class OnProcessor:
        def __init__(self, *_: object, **__: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnProcessor)
    with pytest.raises(UnsupportedModel, match=r"CUDAExecutionProvider.*does not start here"):
        OnnxRuntime().load(tmp_path / "m", RuntimeOptions(provider="CUDAExecutionProvider"))


def test_a_provider_that_computes_elsewhere_is_not_offered():
    assert "AzureExecutionProvider" in onnxruntime.get_available_providers()
    assert "AzureExecutionProvider" not in OnnxRuntime().providers()


class Vendors:
    """A runtime of another package, which heeds a provider and threads."""

    name = "vendors"

    def providers(self) -> tuple[str, ...]:
        return ("CPUExecutionProvider",)


def test_a_runtime_without_an_option_refuses_to_be_asked_for_it():
    RuntimeOptions(threads=2).require(Vendors())
    with pytest.raises(UnsupportedModel, match="vendors has no option spinning to set to False"):
        RuntimeOptions(spinning=False).require(Vendors())


def test_unusual_options_cost_a_simulated_device_time(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(SimulatedModel(latency_ns=1000.0).to_bytes())

    def took(**options: object) -> float:
        device = load_runtime("simulated")
        device.load(path, RuntimeOptions(**options)).bind({})()
        return device.clock.now_ns()

    assert took() < took(memory_arena=False) < took(graph_level="basic")
    assert took(spinning=False) == took()
    assert took(threads=2, spinning=False) > took(threads=2)
