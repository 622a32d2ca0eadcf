"""An artifact in OpenVINO: the outputs that accuracy is judged by, and what is executed."""

from types import SimpleNamespace

import pytest

from autotune.compression import shipped_runtime
from autotune.compression.accuracy import AccuracyEvaluator
from autotune.compression.shipped_runtime import executed_precisions, open_answers
from autotune.errors import CompressionError
from device_agents.runtimes import ExecutedLayer
from search_spaces import FP16, INT8, W4
from tests.unit.compression_models import labelled, quantizable, run, samples

pytest.importorskip("openvino", reason="the extra edge-autotune[openvino] is not installed")


@pytest.fixture(scope="module")
def graph():
    return quantizable("tiny")


def test_the_answers_are_onnxruntimes_for_the_fp32_model(graph):
    x, model = samples(5), graph.emit({})
    answers = open_answers(model, "openvino", threads=1)
    assert answers(x) == pytest.approx(run(model, x), abs=1e-4)


def test_the_accuracy_of_an_8_bit_artifact_is_judged_in_the_runtime_that_ships(graph):
    model = graph.emit(dict.fromkeys(graph.units, INT8))
    evaluator = AccuracyEvaluator(graph.emit({}), labelled(40), split="search")
    here, there = evaluator.evaluate(model), evaluator.evaluate(model, runtime="openvino")
    assert there.n_samples == 40
    assert there.mean_kl != here.mean_kl
    assert there.mean_kl == pytest.approx(here.mean_kl, abs=0.05)


def test_onnxruntime_stands_in_where_a_simulated_device_computes_nothing(graph):
    model = graph.emit(dict.fromkeys(graph.units, INT8))
    evaluator = AccuracyEvaluator(graph.emit({}), labelled(40), split="search")
    judged = evaluator.evaluate(model, runtime="simulated")
    assert judged.mean_kl == evaluator.evaluate(model).mean_kl


def effective(graph, plan, *, runtime="openvino"):
    groups = executed_precisions(graph.emit(plan), graph.units.values(), plan, runtime=runtime)
    return {group.group: group for group in groups}


def test_fp32_runs_as_planned(graph):
    found = effective(graph, {}).values()
    assert {group.effective for group in found} == {"fp32"}
    assert {group.seen_in.split()[0] for group in found} == {"openvino"}


def test_uniform_8_bit_runs_as_planned_but_for_layers_that_are_compiled_into_one_kernel(graph):
    found = effective(graph, dict.fromkeys(graph.units, INT8))
    unknown = {name for name, group in found.items() if group.effective is None}
    assert unknown <= {"hidden", "head"}, "two linear layers behind one another"
    assert {group.effective for name, group in found.items() if name not in unknown} == {"w8a8"}


def test_packed_weights_of_a_matrix_product_stay_packed(graph):
    assert effective(graph, {"head": W4})["head"].effective == "w4"


def test_float16_is_computed_in_fp32_and_the_reason_says_so(graph):
    group = effective(graph, {"stem.0": FP16})["stem.0"]
    assert (group.planned, group.effective) == ("fp16", "fp32")
    assert "f32" in group.reason


def test_what_the_runtime_cannot_read_is_a_failed_candidate():
    with pytest.raises(CompressionError, match="openvino cannot run the artifact"):
        open_answers(b"no model", "openvino", threads=1)


def test_a_runtime_that_is_not_here_is_named(graph):
    with pytest.raises(CompressionError, match="no-such cannot run the artifact"):
        open_answers(graph.emit({}), "no-such", threads=1)


def test_what_a_runtime_that_tells_nothing_executes_is_unknown(graph, monkeypatch):
    silent = SimpleNamespace(version="1")
    monkeypatch.setattr(shipped_runtime, "load_runtime", lambda name: silent)
    group = effective(graph, {"stem.0": INT8}, runtime="silent")["stem.0"]
    assert (group.planned, group.effective, group.seen_in) == ("w8a8", None, None)
    assert group.reason == "not seen: silent does not tell what it executes"


def lists(*names, precision="u8"):
    """A runtime that lists those kernels alone."""
    kernels = [ExecutedLayer(names=(n,), operator="Conv", precision=precision) for n in names]
    return SimpleNamespace(version="1", executed_layers=lambda path, options: kernels)


def test_a_group_that_the_runtime_does_not_list_is_not_counted_as_quantized(graph, monkeypatch):
    seen = lists(*(layer.name for layer in graph.units["stem.0"].layers))
    monkeypatch.setattr(shipped_runtime, "load_runtime", lambda name: seen)
    groups = effective(graph, {"stem.0": INT8, "mix.0": INT8}, runtime="terse")
    assert groups["stem.0"].effective == "w8a8"
    assert groups["mix.0"].effective is None
    assert "no kernel that it lists is named for 'mix.0'" in groups["mix.0"].reason


def test_one_layer_in_float_decides_though_another_was_not_seen(graph, monkeypatch):
    seen = lists("stem.0", precision="f32")
    monkeypatch.setattr(shipped_runtime, "load_runtime", lambda name: seen)
    assert len(graph.units["stem.0"].layers) > 1
    assert effective(graph, {"stem.0": INT8}, runtime="terse")["stem.0"].effective == "fp32"
