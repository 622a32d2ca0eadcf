"""What an agent keeps up while the network, the disk or the clock of its device does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.settings import Settings
from device_agents import files
from device_agents.connection import Acknowledgement, ServiceConnection, Timeouts
from device_agents.errors import ServiceUnreachable
from device_agents.heartbeat import FIRST_INTERVAL_S, heartbeat_of
from device_agents.outbox import Outbox
from device_agents.protocol import MeasurementResult, Outcome
from device_agents.runtimes.simulated import SimulatedModel
from tests.unit.agent_service import KEY, PATIENCE_S, TOKEN, RunningAgent, fake_service


@pytest.fixture
def service():
    with fake_service() as fake:
        yield fake


def leases_named(service):
    """The leases in the heartbeats since the first result arrived."""
    return [beat["lease_id"] for beat in service.heartbeats[service.seen :]]


def test_the_lease_is_renewed_until_its_result_is_acknowledged(service, tmp_path):
    service.offer(SimulatedModel())
    service.answers["results"] = [503] * 1000
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.calls["results"])
        service.seen = len(service.heartbeats)
        service.wait_for(lambda s: len(leases_named(s)) >= 4)
        assert set(leases_named(service)) == {"l1"}
        service.answers["results"].clear()
        service.wait_for(lambda s: s.results and s.heartbeats[-1]["lease_id"] is None)


def test_an_agent_started_anew_renews_the_lease_of_the_result_it_finds(service, tmp_path):
    left = MeasurementResult(lease_id="l0", fencing_token=7, measurement_id="m", outcome="timeout")
    Outbox(tmp_path / "outbox").put(left)
    service.answers["results"] = [503] * 1000
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: any(beat["fencing_token"] == 7 for beat in s.heartbeats))


def test_a_request_for_work_keeps_its_name_until_it_is_answered(service, tmp_path):
    service.answers["lease"] = [500, 502, 503]
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.calls["lease"] >= 6)
    names = [asked["request_id"] for asked in service.sent["lease"][:6]]
    assert len(set(names[:4])) == 1
    assert len(set(names)) == 3


def test_after_a_lost_connection_the_next_heartbeat_says_all_there_is(service, tmp_path):
    service.offer(SimulatedModel(verb="hang"))
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: any(beat["lease_id"] for beat in s.heartbeats))
        service.answers["heartbeat"] = [500] * 3
        service.wait_for(lambda s: not s.answers["heartbeat"])
        seen = len(service.heartbeats)
        service.wait_for(lambda s: len(s.heartbeats) > seen)
    beat = service.heartbeats[seen]
    assert (beat["lease_id"], beat["fencing_token"]) == ("l1", 1)
    assert beat["conditions"]["available_memory_bytes"] > 0
    assert "the service is back" in running.lines


def test_an_agent_that_is_told_to_upgrade_says_the_command_and_ends_with_its_own_code(
    service, tmp_path
):
    service.answers["enrol"] = [426]
    command = [sys.executable, "-m", "device_agents", "run", "--service", service.url]
    ended = subprocess.run(
        [*command, "--token", TOKEN, "--state-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 17
    assert "another release of the agent: as planned" in ended.stderr


def test_a_result_is_on_the_disk_before_it_is_sent_and_goes_once_it_is_acknowledged(
    service, tmp_path, monkeypatch
):
    happened = []
    fsync, outbox = os.fsync, tmp_path / "outbox"

    def noted(descriptor):
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        results = len(list(outbox.glob("*.json"))) if outbox.is_dir() else 0
        happened.append((path.name, results, service.calls["results"]))

    monkeypatch.setattr(files.os, "fsync", noted)
    service.offer(SimulatedModel())
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results and s.calls["lease"] > 3)
    # The folder is synced when the name is there, and nothing has been sent by then.
    assert ("outbox", 1, 0) in happened
    stored = next(n for n, (name, _, _) in enumerate(happened) if ".json" in name)
    assert stored < happened.index(("outbox", 1, 0))
    assert list(outbox.glob("*.json")) == []


WRONG_CLOCK = """
import itertools, random, time
chance = random.Random(5)
wrong = lambda: chance.uniform(0, 4e9)
time.time = wrong
time.time_ns = lambda: int(wrong() * 1e9)
real_gmtime, real_localtime = time.gmtime, time.localtime
time.gmtime = lambda seconds=None: real_gmtime(wrong() if seconds is None else seconds)
time.localtime = lambda seconds=None: real_localtime(wrong() if seconds is None else seconds)
"""


def test_a_wall_clock_that_jumps_by_decades_changes_nothing(service, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WRONG_CLOCK)
    for number in (1, 2, 3):
        service.offer(SimulatedModel(latency_ns=4e5, noise=0.01), number=number)
    command = [sys.executable, "-m", "device_agents", "run", "--service", service.url]
    process = subprocess.Popen(
        [*command, "--token", TOKEN, "--state-dir", str(tmp_path / "state")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
    )
    service.wait_for(lambda s: len(s.results) == 3, 3 * PATIENCE_S)
    process.terminate()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert [r.outcome for r in service.results] == [Outcome.OK] * 3
    for result in service.results:
        assert result.report.ratio == pytest.approx(0.5, rel=0.02)
        assert 0 < result.report.wall_s < 3 * PATIENCE_S


WRITER = """
import sys
from pathlib import Path
from device_agents.outbox import Outbox
from device_agents.protocol import MeasurementResult
outbox = Outbox(Path(sys.argv[1]))
for n in range(2):
    result = MeasurementResult(lease_id="l", fencing_token=n, measurement_id=f"m{n}", outcome="oom")
    outbox.put(result)
    print("stored", n, flush=True)
    outbox.acknowledge(result)
    print("gone", n, flush=True)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to kill at a sync")
def test_killed_at_any_sync_the_outbox_holds_what_was_stored_and_nothing_half_written(tmp_path):
    for sync in range(1, 100):
        folder = tmp_path / str(sync)
        inject = f"inject=fsync:signal=KILL:when={sync}"
        command = ["strace", "-f", "-o", os.devnull, "-e", "trace=fsync", "-e", inject]
        ended = subprocess.run(
            [*command, sys.executable, "-c", WRITER, str(folder)], capture_output=True, text=True
        )
        said = ended.stdout.splitlines()
        stored = {int(x.split()[1]) for x in said if x.startswith("stored")}
        gone = {int(x.split()[1]) for x in said if x.startswith("gone")}
        pending = {result.fencing_token for result in Outbox(folder).pending()}
        # The one that is under way when the kill comes may be there or not, whole in any case.
        under_way = {len(stored) - (len(gone) < len(stored))}
        assert stored - gone - under_way <= pending <= (stored - gone) | under_way
        assert [path.suffix for path in folder.iterdir() if path.suffix != ".json"] == []
        if ended.returncode == 0:
            assert sync > 4
            return
    pytest.fail("the writer never came to its end")


def test_a_large_result_gets_the_time_that_a_slow_line_needs(service):
    service.hold_s = 0.5
    small, large = (
        MeasurementResult(
            lease_id="l", fencing_token=1, measurement_id="m", outcome="oom", reason="x" * size
        )
        for size in (10, 40_000)
    )
    with ServiceConnection(service.url, timeouts=Timeouts(read_s=0.1), agent_key=KEY) as connection:
        assert connection.upload(large) is Acknowledgement.ACCEPTED
        with pytest.raises(ServiceUnreachable):
            connection.upload(small)


def test_a_late_copy_of_an_earlier_answer_is_not_taken_for_the_one_that_is_due(service):
    model = service.add(b"a model")
    result = MeasurementResult(lease_id="l", fencing_token=1, measurement_id="m", outcome="oom")
    with ServiceConnection(service.url, agent_key=KEY) as connection:
        service.name_of = lambda _: "an earlier request"
        for ask in (
            lambda: connection.upload(result),
            lambda: connection.heartbeat(heartbeat_of(None)),
            lambda: connection.download(model.sha256).__enter__(),
        ):
            with pytest.raises(ServiceUnreachable, match="the answer to another request"):
                ask()
        service.name_of = lambda name: name
        assert connection.upload(result) is Acknowledgement.ACCEPTED


@pytest.mark.parametrize("ask", [lambda x: x.heartbeat(heartbeat_of(None)), lambda x: x.new_key()])
def test_what_holds_up_the_heartbeat_gives_a_dead_line_up_before_a_lease_is_over(service, ask):
    service.hold_s = 0.5
    timeouts = Timeouts(heartbeat_s=0.1)
    with (
        ServiceConnection(service.url, timeouts=timeouts, agent_key=KEY) as connection,
        pytest.raises(ServiceUnreachable, match="timed out"),
    ):
        ask(connection)
    assert Timeouts().heartbeat_s + FIRST_INTERVAL_S < Settings().lease_ttl_s
