"""The repository's contract for what jobs taught about devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from search_spaces import RuntimeOptions
from storage.errors import StorageError
from storage.latency_model import LatencyModel, OperatorCost

from .conftest import World

CONV = OperatorCost(
    operator="conv", precision="w8a8", factor=0.3, deviation=0.05, ns_per_mac=0.1, ns_per_byte=0.2
)
MODEL = LatencyModel(
    runtime=RuntimeOptions(threads=2, spinning=False),
    runtime_version="1.31.1",
    operators=(CONV,),
    boundary_ns_per_byte=0.07,
    boundary_deviation=0.01,
    n_trials=24,
)


def test_a_latency_model_comes_back_as_it_was_kept(world: World) -> None:
    knowledge, device = world.repository.knowledge, world.agent("pi4")[0]
    assert knowledge.latency_models(device.id) == ()
    knowledge.keep_latency_models(device.id, world.job().id, [MODEL])
    assert knowledge.latency_models(device.id) == (MODEL,)
    assert knowledge.latency_models(world.agent("pi5")[0].id) == ()


def test_what_a_job_learns_replaces_what_it_had_learnt(world: World) -> None:
    knowledge, device, job = world.repository.knowledge, world.agent("pi4")[0], world.job()
    more = replace(MODEL, n_trials=28)
    knowledge.keep_latency_models(device.id, job.id, [MODEL])
    knowledge.keep_latency_models(device.id, job.id, [more])
    assert knowledge.latency_models(device.id) == (more,)


def test_a_job_builds_on_the_jobs_created_before_it_whenever_they_learnt(world: World) -> None:
    knowledge, device = world.repository.knowledge, world.agent("pi4")[0]
    first, second, third = (world.job() for _ in range(3))
    for job, n_trials in ((second, 40), (first, 60)):
        knowledge.keep_latency_models(device.id, job.id, [replace(MODEL, n_trials=n_trials)])
    assert knowledge.latency_models(device.id, before_job=first.id) == ()
    (of_first,) = knowledge.latency_models(device.id, before_job=second.id)
    (of_second,) = knowledge.latency_models(device.id, before_job=third.id)
    assert (of_first.n_trials, of_second.n_trials) == (60, 40)


def test_a_model_of_an_unknown_device_is_refused(world: World) -> None:
    with pytest.raises(StorageError):
        world.repository.knowledge.keep_latency_models("d-none", world.job().id, [MODEL])


def test_a_model_of_a_newer_release_is_not_misread() -> None:
    with pytest.raises(ValueError, match="version 99 is newer"):
        LatencyModel.from_json({**MODEL.to_json(), "version": 99})
