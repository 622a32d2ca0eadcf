"""Runtimes compete in a job: what is asked for, what can be judged, which one wins."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from autotune.errors import DeviceUnavailable, InvalidJob
from autotune.search import tuning
from autotune.search.evaluation import Evaluation
from autotune.search.runtimes import (
    asked_for,
    contending,
    remarks,
    require_judges,
    require_offered,
)
from autotune.spec import SearchSpec, parse_job
from device_agents.protocol import KernelTime, Profile, RuntimeBuild
from search_spaces import RuntimeOptions
from storage.records import JobState, TargetFigures
from tests.unit.fakes import fake_ms
from tests.unit.records import latency, trial
from tests.unit.spaces import inventory, space

ORT = RuntimeOptions()
OPENVINO = RuntimeOptions(runtime="openvino")
BOTH = replace(space(), runtimes=(ORT, OPENVINO))


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OPTIONS = ("graph_level", "memory_arena", "spinning")


def build(name, *providers, options=()):
    return RuntimeBuild(name=name, version="1", providers=(CPU, *providers), options=options)


def device(*builds):
    return SimpleNamespace(name="pi4", description=SimpleNamespace(runtimes=builds))


def baseline(options, p50_ms, **changes):
    return trial(0, p50_ms, 0.9, candidate=BOTH.fp32(options), proposed_by="baseline", **changes)


def test_every_runtime_competes_with_every_number_of_threads():
    asked = asked_for(SearchSpec(runtimes=("onnxruntime", "openvino"), threads=(1, 2)))
    assert len(asked) == len(set(asked)) == 4
    assert RuntimeOptions(runtime="openvino", threads=2) in asked


def test_a_runtime_that_this_host_cannot_judge_is_refused_with_the_way_out():
    with pytest.raises(InvalidJob, match=r"openvino.*pip install 'edge-autotune\[openvino\]'"):
        require_judges(BOTH.runtimes, probe=lambda names: [])
    require_judges(BOTH.runtimes, probe=lambda names: [build(name) for name in names])


def test_a_job_on_onnxruntime_alone_probes_nothing():
    require_judges(space().runtimes, probe=lambda names: pytest.fail("probed"))


def test_a_runtime_far_behind_is_not_searched_further():
    trials = [baseline(ORT, 2.0), baseline(OPENVINO, 3.1)]
    assert contending(BOTH, trials).runtimes == (ORT,)
    assert contending(BOTH, [trials[0], baseline(OPENVINO, 2.9)]).runtimes == (ORT, OPENVINO)


def test_a_runtime_that_is_fast_on_one_of_two_devices_is_searched_further():
    slow_there = TargetFigures(device_id="b", latency=latency(9.0))
    fast_there = TargetFigures(device_id="b", latency=latency(3.0))
    trials = [
        baseline(ORT, 2.0, further=(slow_there,)),
        baseline(OPENVINO, 9.0, further=(fast_there,)),
    ]
    assert contending(BOTH, trials).runtimes == (ORT, OPENVINO)


def test_without_its_baselines_no_runtime_is_left_out():
    assert contending(BOTH, [baseline(ORT, 2.0)]) == BOTH


def test_the_user_is_told_of_a_runtime_that_every_device_has():
    search = SearchSpec()
    ours, other = build("onnxruntime", CUDA), build("openvino")
    assert remarks(search, [(build("onnxruntime"), build("simulated"))]) == []
    assert remarks(search, [(ours, other), (build("onnxruntime"),)]) == []
    runtimes, providers = remarks(search, [(ours, other)])
    assert "openvino: search.runtimes lets it compete" in runtimes
    assert f"{CUDA}: search.providers lets it compete" in providers


def test_a_simulated_job_is_told_of_no_real_runtime():
    search = SearchSpec(runtimes=("simulated",))
    assert remarks(search, [(build("onnxruntime"), build("simulated"))]) == []


def test_who_judges_another_provider_is_told():
    search = SearchSpec(providers=(CPU, CUDA))
    (remark,) = remarks(search, [(build("onnxruntime", CUDA),)])
    assert "judged on this host's processor; CUDAExecutionProvider may round otherwise" in remark


def test_a_runtime_takes_part_with_the_options_that_its_build_has():
    search = SearchSpec(
        runtimes=("onnxruntime", "openvino"), providers=(CPU, CUDA), graph_levels=("all", "basic")
    )
    here = (build("onnxruntime", CUDA, options=OPTIONS), build("openvino"))
    assert asked_for(search, [here]) == require_offered(search, [device(*here)])
    assert {(o.runtime, o.provider, o.graph_level) for o in asked_for(search, [here])} == {
        *(
            ("onnxruntime", provider, level)
            for provider in (CPU, CUDA)
            for level in ("all", "basic")
        ),
        ("openvino", CPU, "all"),
    }


def test_a_single_thread_is_not_asked_whether_it_spins():
    search = SearchSpec(threads=(1, 2), spinning=(True, False))
    assert [(o.threads, o.spinning) for o in asked_for(search)] == [
        (1, True),
        (2, True),
        (2, False),
    ]


def test_not_to_spin_with_one_thread_is_a_mistake_in_the_job_file():
    document = {"model": {"source": "onnx:m"}, "data": {"evaluation": "npz:e"}}
    with pytest.raises(
        InvalidJob, match=r"search\.spinning: one thread .* add 2 to search.threads"
    ):
        parse_job({**document, "search": {"spinning": [True, False]}})


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"runtimes": ("openvino",)}, "device pi4 has no runtime openvino; it has onnxruntime"),
        ({"providers": (CPU, CUDA)}, f"search.providers names {CUDA}, which no runtime of the job"),
        ({"memory_arena": (True, False)}, r"search.memory_arena names false.*older release"),
    ],
)
def test_what_no_runtime_of_a_device_has_is_refused_with_what_it_has(asked, reason):
    with pytest.raises(DeviceUnavailable, match=reason):
        require_offered(SearchSpec(**asked), [device(build("onnxruntime"))])


def test_a_runtime_that_the_device_lacks_is_refused_before_anything_is_loaded(bench):
    with bench.agent():
        job = bench.run(bench.job(search={"runtimes": ["openvino"]}))
    assert job.state is JobState.FAILED
    assert "has no runtime openvino; it has onnxruntime" in job.reason
    assert bench.pools == []


def test_the_faster_runtime_wins_the_job(bench, monkeypatch):
    monkeypatch.setattr(tuning, "require_judges", lambda asked: None)
    search = {"trials": 14, "runtimes": ["onnxruntime", "openvino"]}
    with bench.agent(runtimes=("onnxruntime", "openvino")) as agent:
        agent.report_of = lambda c: latency(
            fake_ms(c) * (0.8 if c.runtime.runtime == "openvino" else 1.0)
        )
        job = bench.run(bench.job(search=search))
    assert job.state is JobState.FINISHED
    trials = bench.repository.list_trials(job.id)
    baselines = [t.candidate.runtime.runtime for t in trials if t.proposed_by == "baseline"]
    assert sorted(baselines) == ["onnxruntime"] * 2 + ["openvino"] * 2
    winner = bench.repository.get_trial(job.result["winner"])
    assert winner.candidate.runtime == OPENVINO
    assert "it runs in openvino, CPUExecutionProvider, 1 thread" in job.result["explanation"]
    judged = {c.arguments[1] for c in bench.pools[0].calls if c.method == "held_out"}
    assert "openvino" in judged


def test_baselines_and_confirmed_trials_are_profiled_and_no_others(bench):
    with bench.agent():
        job = bench.run(bench.job())
    kinds = {t.id: t.proposed_by for t in bench.repository.list_trials(job.id)}
    for record in bench.repository.list_measurements(job.id):
        is_confirmation = record.request.plan.kind == "confirmation"
        expected = is_confirmation or kinds.get(record.trial_id) == "baseline"
        assert record.request.profile is expected


def evaluation(**changes):
    return Evaluation(**{field.name: None for field in fields(Evaluation)} | changes)


def test_a_profile_without_a_graph_stays_as_the_device_sent_it():
    profile = Profile(kernels=(KernelTime(name="a", operator="Conv", time_ns=1.0),))
    report = latency(1.0).model_copy(update={"profile": profile})
    kept = evaluation(
        job=SimpleNamespace(inventory=inventory()),
        artifacts=SimpleNamespace(read=lambda sha256: b"{}"),
    )._by_group(report, trial(0, 1.0, 0.9, artifact_sha256="0" * 64, artifact_size_bytes=2))
    assert kept == report


def test_what_the_devices_profile_shows_wins_over_what_a_stand_in_showed():
    (group, *_) = inventory().groups
    entry = {"group": group.name, "planned": "w8a8", "effective": "w8a8", "seen_in": "a stand-in"}
    kernel = KernelTime(name="a", operator="FusedConv", time_ns=1.0, group=group.name)
    profile = Profile(kernels=(kernel,) * len(group.layers))
    built = trial(0, 1.0, 0.9, compression={"groups": [entry], "kernels": "arm-dot"})
    report = latency(1.0).model_copy(update={"profile": profile})
    asked = evaluation(job=SimpleNamespace(inventory=inventory()))
    kept = asked._executed(built, report)["compression"]
    (found,) = kept["groups"]
    assert (found["effective"], found["seen_in"]) == ("fp32", "the device's profile")
    assert kept["kernels"] == "arm-dot"
    assert asked._executed(built, latency(1.0)) == {}
