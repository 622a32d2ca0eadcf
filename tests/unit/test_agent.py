"""The agent against a small real HTTP service that can refuse, fail and take leases back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from device_agents.connection import ServiceConnection
from device_agents.errors import (
    DeviceAgentError,
    EnrolmentRefused,
    IncompatibleProtocol,
    ServiceUnreachable,
)
from device_agents.outbox import Outbox
from device_agents.protocol import (
    ArtifactReference,
    MeasurementResult,
    Outcome,
    RuntimeBuild,
)
from device_agents.runtimes.simulated import SimulatedModel
from tests.unit.agent_service import DEVICE, PATIENCE_S, TOKEN, RunningAgent, fake_service


@pytest.fixture
def service():
    with fake_service() as fake:
        yield fake


def test_an_agent_enrols_measures_and_hands_in(service, tmp_path):
    service.offer(SimulatedModel(latency_ns=4e5, noise=0.01))
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.results)
    [result] = service.results
    assert result.outcome is Outcome.OK
    assert result.report.ratio == pytest.approx(0.5, rel=0.02)
    assert (result.lease_id, result.fencing_token) == ("l1", 1)
    assert running.lines[0] == "enrolled as pi (agent a1)"
    _, _, milliseconds, unit, *_ = running.lines[1].split()
    assert (float(milliseconds), unit) == (pytest.approx(0.4, rel=0.02), "ms")
    assert "±" in running.lines[1]


def test_the_reference_stays_at_one_thread_beside_a_candidate_with_two(service, tmp_path):
    service.offer(SimulatedModel(latency_ns=8e5, noise=0.01), threads=2)
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
    [result] = service.results
    # A simulated device does nine tenths of the work in parallel.
    assert result.report.ratio == pytest.approx(0.55, rel=0.02)


def test_a_device_that_stays_slower_than_calibrated_is_not_waited_for_each_time(service, tmp_path):
    in_vain = 4  # the calibration is one of five then, and the second fastest counts
    for number in range(1, in_vain + 2):
        service.offer(
            SimulatedModel(latency_ns=4e5, noise=0.01),
            number=number,
            time_cap_s=1,
            reference_latency_ns=4e5,
        )
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: len(s.results) > in_vain)
    *waited, given_up = [result.report.n_blocks for result in service.results]
    assert min(waited) > 2 * given_up


def test_a_second_start_needs_no_token(service, tmp_path):
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.heartbeats)
    with RunningAgent(service.url, tmp_path, token=None) as running:
        service.wait_for(lambda s: s.calls["lease"] > 2)
    assert running.lines == ["back as pi (agent a1)"]
    assert service.calls["enrol"] == 1


def test_a_wrong_token_is_refused_with_the_way_out(service, tmp_path):
    with RunningAgent(service.url, tmp_path, token="wrong") as running:
        error = running.join()
    assert isinstance(error, EnrolmentRefused)
    assert "the token is used up" in str(error)
    assert str(error).count("autotune device enroll") == 1


def test_a_first_start_without_a_token_is_refused(service, tmp_path):
    with RunningAgent(service.url, tmp_path, token=None) as running:
        assert "--token" in str(running.join())


def test_a_key_that_is_not_known_any_more_is_traded_for_a_new_one(service, tmp_path):
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.heartbeats)
    service.keys.clear()
    service.tokens.add(TOKEN)
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.calls["enrol"] == 2 and s.calls["lease"] > 1)


def test_a_revoked_agent_ends(service, tmp_path):
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.heartbeats)
        service.keys.clear()
        assert isinstance(running.join(), EnrolmentRefused)


def test_a_portal_on_the_way_does_not_end_an_enrolled_agent(service, tmp_path):
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.heartbeats)
        service.answers["*"] = [(status, "<html>Log in</html>") for status in (401, 403, 426)] * 4
        service.wait_for(lambda s: not s.answers["*"])
        service.offer(SimulatedModel())
        service.wait_for(lambda s: s.results)
    assert running.error is None
    assert service.results[0].outcome is Outcome.OK


def test_an_artifact_that_a_proxy_says_is_not_there_is_asked_for_again(service, tmp_path):
    service.answers["artifacts"] = [(404, "<html>Not here</html>")]
    service.offer(SimulatedModel())
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
    assert service.results[0].outcome is Outcome.OK


def test_an_agent_of_another_release_is_told_to_upgrade(service, tmp_path):
    service.answers["enrol"] = [426]
    with RunningAgent(service.url, tmp_path) as running:
        assert isinstance(running.join(), IncompatibleProtocol)


def test_no_service_at_all_ends_the_first_start(tmp_path):
    with RunningAgent("http://127.0.0.1:9", tmp_path) as running:
        error = running.join()
    assert isinstance(error, ServiceUnreachable)
    assert "http://127.0.0.1:9 does not answer" in str(error)
    assert "check the address, and that `autotune serve` runs there" in str(error)


def test_an_enrolled_agent_outlives_a_service_that_fails(service, tmp_path):
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.heartbeats)
        service.answers["*"] = [500] * 30
        service.wait_for(lambda s: not s.answers["*"])
        service.offer(SimulatedModel())
        service.wait_for(lambda s: s.results)
    assert any("answered 500" in line for line in running.lines)
    assert "the service is back" in running.lines


def test_a_result_is_handed_in_until_it_is_acknowledged(service, tmp_path):
    service.answers["results"] = [500, 503]
    service.offer(SimulatedModel())
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
        service.wait_for(lambda s: s.calls["lease"] > 3)
    assert len(service.results) == 1
    assert Outbox(tmp_path / "outbox").pending() == []


def test_a_result_left_over_by_a_killed_agent_is_handed_in_first(service, tmp_path):
    left = MeasurementResult(
        lease_id="l0", fencing_token=1, measurement_id="m0", outcome=Outcome.TIMEOUT, reason="slow"
    )
    Outbox(tmp_path / "outbox").put(left)
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
    assert service.results == [left]


def test_a_late_result_is_dropped_and_said(service, tmp_path):
    service.answers["results"] = [409]
    service.offer(SimulatedModel())
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.calls["results"] == 1)
        service.wait_for(lambda s: s.calls["lease"] > 4)
    assert service.results == []
    assert any("late" in line for line in running.lines)
    assert Outbox(tmp_path / "outbox").pending() == []


@pytest.mark.parametrize("status", [200, 201, 204, 404, 409, 413, 422])
def test_what_something_on_the_way_answers_does_not_cost_the_result(service, tmp_path, status):
    service.answers["results"] = [(status, "<html>Log in to this network</html>")]
    service.offer(SimulatedModel())
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.calls["results"] == 2)
        service.wait_for(lambda s: s.calls["lease"] > 2)
    assert [result.measurement_id for result in service.results] == ["m1"]
    assert sum("the result of m1 is kept" in line for line in running.lines) == 1


def test_a_lease_taken_back_kills_the_measurement(service, tmp_path):
    service.offer(SimulatedModel(verb="hang"))
    service.drop_lease = True
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.calls["lease"] > 3)
    assert any(line.startswith("dropped") for line in running.lines)
    assert service.results == []


def test_heartbeats_name_the_lease_and_bring_the_conditions(service, tmp_path):
    service.offer(SimulatedModel(verb="hang"))
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: any(beat["lease_id"] for beat in s.heartbeats))
    beat = next(beat for beat in service.heartbeats if beat["lease_id"])
    assert (beat["lease_id"], beat["fencing_token"]) == ("l1", 1)
    assert beat["conditions"]["available_memory_bytes"] > 0


def test_an_artifact_that_is_gone_is_its_own_outcome(service, tmp_path):
    service.offer(ArtifactReference(sha256="0" * 64, size_bytes=3))
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
    assert service.results[0].outcome is Outcome.ARTIFACT_MISSING


def test_an_artifact_altered_on_its_way_is_never_measured(service, tmp_path):
    reference = service.add(SimulatedModel(latency_ns=123.0))
    service.artifacts[reference.sha256] = b"x" * reference.size_bytes
    service.offer(reference)
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
    assert service.results[0].outcome is Outcome.ARTIFACT_CORRUPT
    assert service.calls["artifacts"] == 5


def test_a_download_over_a_line_that_breaks_goes_on_where_it_stopped(service, tmp_path):
    service.offer(SimulatedModel())
    size = max(len(data) for data in service.artifacts.values())
    service.cut_after = size // 2 + 1
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
    assert service.results[0].outcome is Outcome.OK
    assert service.ranges == [None, f"bytes={service.cut_after}-"] * 2


def test_an_artifact_without_room_is_its_own_outcome(service, tmp_path):
    service.offer(SimulatedModel())
    with RunningAgent(service.url, tmp_path, cache_max_bytes=10):
        service.wait_for(lambda s: s.results)
    assert service.results[0].outcome is Outcome.DEVICE_DISK


def test_an_artifact_is_fetched_once(service, tmp_path):
    for number in (1, 2):
        service.offer(SimulatedModel(), number=number)
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: len(s.results) == 2)
    assert service.calls["artifacts"] == 2


def test_a_crash_is_reported_and_the_next_measurement_runs(service, tmp_path):
    service.offer(SimulatedModel(verb="segfault"), number=1)
    service.offer(SimulatedModel(), number=2)
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: len(s.results) == 2)
    assert [result.outcome for result in service.results] == [Outcome.RUNTIME_CRASH, Outcome.OK]


@pytest.mark.parametrize("url", ["here", "ftp://host", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(DeviceAgentError, match="looks like"):
        ServiceConnection(url)


def test_a_stranger_at_the_address_is_not_taken_for_the_service(service, tmp_path):
    service.answers["enrol"] = [200] * 10
    with RunningAgent(service.url, tmp_path) as running:
        assert "is not an edge-autotune service" in str(running.join())


def test_an_agent_in_another_environment_says_what_its_device_is_before_it_works(service, tmp_path):
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.heartbeats)
    with RunningAgent(service.url, tmp_path, environment="upgraded"):
        service.wait_for(lambda s: s.calls["lease"] > 2)
    assert [sent["hostname"] for sent in service.sent["description"]] == ["pi"]


def test_an_agent_in_the_same_environment_does_not_look_at_its_device_again(service, tmp_path):
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.calls["lease"] > 0)
    with RunningAgent(service.url, tmp_path, describe=lambda: pytest.fail("looked")):
        service.wait_for(lambda s: s.calls["lease"] > 2)
    assert service.calls["description"] == 0


def test_a_description_is_sent_until_it_is_heard(service, tmp_path):
    service.answers["description"] = [500, 503]
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.heartbeats)
    with RunningAgent(service.url, tmp_path, environment="upgraded"):
        service.wait_for(lambda s: s.calls["description"] == 3)


def test_a_service_of_an_older_release_is_left_without_a_description(service, tmp_path):
    service.answers["description"] = [404]
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.heartbeats)
    with RunningAgent(service.url, tmp_path, environment="upgraded"):
        service.wait_for(lambda s: s.calls["lease"] > 2)
    assert service.calls["description"] == 1


def test_a_runtime_that_was_updated_under_the_agent_is_told_before_the_result(service, tmp_path):
    older = RuntimeBuild(name="simulated", version="0", providers=("CPUExecutionProvider",))
    described = DEVICE.model_copy(update={"runtimes": (older,)})
    service.offer(SimulatedModel(noise=0.01))
    with RunningAgent(service.url, tmp_path, describe=lambda: described):
        service.wait_for(lambda s: s.results)
    assert service.calls["description"] == 1


def test_an_agent_that_looks_at_its_device_ends_at_once_and_has_not_enrolled(service, tmp_path):
    looking, done = threading.Event(), threading.Event()

    def look():
        looking.set()
        done.wait(PATIENCE_S)
        return DEVICE

    with RunningAgent(service.url, tmp_path, describe=look) as running:
        assert looking.wait(PATIENCE_S)
        running.agent.stop()
        running.thread.join(PATIENCE_S)
        assert not running.thread.is_alive()
        done.set()
    assert running.error is None
    assert service.calls["enrol"] == 0


def start_process(url, state_dir):
    command = [sys.executable, "-m", "device_agents", "run", "--service", url]
    return subprocess.Popen(
        [*command, "--token", TOKEN, "--state-dir", str(state_dir), "--name", "local"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def test_a_process_ends_cleanly_on_sigterm_while_it_measures(service, tmp_path):
    service.offer(SimulatedModel(verb="hang"))
    process = start_process(service.url, tmp_path)
    service.wait_for(lambda s: any(beat["lease_id"] for beat in s.heartbeats))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "enrolled as local" in said
    assert said.endswith("stopped\n")


def test_a_killed_process_starts_again_from_its_state_folder(service, tmp_path):
    service.offer(SimulatedModel(verb="hang"))
    process = start_process(service.url, tmp_path)
    service.wait_for(lambda s: any(beat["lease_id"] for beat in s.heartbeats))
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    service.offer(SimulatedModel(), number=2)
    with RunningAgent(service.url, tmp_path, token=None):
        service.wait_for(lambda s: s.results)
    assert [result.measurement_id for result in service.results] == ["m2"]
