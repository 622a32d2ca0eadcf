"""A bundle's model measured again: what is asked of the device, and what the trial keeps."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from autotune.search.fleet import QuietWindow
from autotune.search.verification import keep_confirmation, verify
from device_agents.protocol import KernelTime, Outcome, Profile
from search_spaces import Candidate
from storage.records import JobState, TrialOutcome, TrialState
from tests.unit.fabricated_job import linear_model
from tests.unit.fakes import FakeAgent
from tests.unit.records import accuracy, latency
from tests.unit.spaces import inventory, space


@pytest.fixture
def model():
    """A classifier whose one node is that of the first group."""
    graph = onnx.load_model_from_string(linear_model())
    graph.graph.node[0].name = inventory().groups[0].nodes[0]
    return graph.SerializeToString()


@pytest.fixture
def job(bench, model, tmp_path):
    """A finished job with one trial, which was measured once."""
    x = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, y=np.arange(60) % 3)
    made = bench.job(data={"evaluation": f"npz:{tmp_path / 'rows.npz'}"})
    stored = bench.artifacts.put(model)
    artifact = {"artifact_sha256": stored.sha256, "artifact_size_bytes": stored.size_bytes}
    trial = bench.repository.add_trial(made.id, Candidate(), proposed_by="flip")
    bench.repository.update_trial(
        trial.id,
        state=TrialState.FINISHED,
        outcome=TrialOutcome.OK,
        accuracy=accuracy(0.9),
        latency=latency(3.0),
        **artifact,
    )
    known = {"inventory": inventory(), "space": space(), "reference_latency_ns": 4e6}
    return bench.repository.update_job(made.id, state=JobState.FINISHED, source=artifact, **known)


def test_a_trial_that_is_confirmed_on_demand_has_the_times_of_its_groups(bench, job, model):
    group = inventory().groups[0]
    kernel = KernelTime(name=group.nodes[0], operator="MatMul", time_ns=2e6)
    report = latency(3.0).model_copy(update={"profile": Profile(kernels=(kernel,))})
    agent = FakeAgent(bench.repository, lambda _: json.dumps(Candidate().to_json()).encode())
    agent.report_of = lambda _: report
    with agent:
        found = verify(
            bench.repository.update_job(job.id, device_id=agent.device.id),
            model,
            repository=bench.repository,
            artifacts=bench.artifacts,
            fleet=bench.fleet,
            window=QuietWindow(),
            trust_job_code=False,
            should_stop=lambda: False,
        )
    (asked,) = bench.repository.list_measurements(job.id)
    assert asked.request.profile
    (trial,) = bench.repository.list_trials(job.id)
    for kept in (trial.confirmed_latency, found.measurement.report):
        assert [(k.group, k.time_ns) for k in kept.profile.kernels] == [(group.name, 2e6)]


def test_a_trial_that_held_out_data_contradict_is_not_confirmed_on_demand_either(bench, job):
    (trial,) = bench.repository.list_trials(job.id)
    measured = SimpleNamespace(outcome=Outcome.OK, report=latency(3.0))
    held_out = accuracy(0.8, split="held_out")
    keep_confirmation(bench.repository, job, trial, measured, held_out)
    kept = bench.repository.get_trial(trial.id)
    assert (kept.outcome, kept.confirmed_latency) == (TrialOutcome.UNCONFIRMED, None)
    assert kept.held_out_accuracy == held_out
    assert str(kept.reason).startswith("on held-out data it loses 15.00 points")
