"""The agent against a small real HTTP service that can refuse, fail and take leases back."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from device_agents.agent import Agent, AgentSettings, Backoff
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
    DeviceDescription,
    Lease,
    MeasurementPlan,
    MeasurementRequest,
    MeasurementResult,
    Outcome,
    RuntimeRequest,
)
from device_agents.runtimes.simulated import SimulatedModel

TOKEN = "one-use"
KEY = "agent-key"
PATIENCE_S = 20.0

DEVICE = DeviceDescription(
    hostname="pi",
    host_id="0" * 32,
    architecture="aarch64",
    cpu_model="Raspberry Pi 5",
    cpu_flags=("asimddp",),
    logical_cpus=4,
    memory_bytes=2**33,
    operating_system="Debian",
    kernel="6.12",
    python="3.11.7",
    agent_version="0.1.0",
    runtimes=(),
    fingerprint="f" * 64,
)


class FakeService:
    """The agent's routes, with knobs.

    `answers` maps a route to the statuses of its next calls; afterwards it works again.
    """

    def __init__(self):
        self.keys = {KEY}
        self.tokens = {TOKEN}
        self.artifacts = {}
        self.leases = []
        self.results = []
        self.heartbeats = []
        self.answers = {}
        self.calls = Counter()
        self.drop_lease = False
        self.cut_after = None
        self.ranges = []
        self.changed = threading.Condition()

    def add(self, model):
        data = model if isinstance(model, bytes) else model.to_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        self.artifacts[sha256] = data
        return ArtifactReference(sha256=sha256, size_bytes=len(data))

    def offer(self, candidate, *, number=1, threads=1, **plan):
        request = MeasurementRequest(
            measurement_id=f"m{number}",
            artifact=candidate if isinstance(candidate, ArtifactReference) else self.add(candidate),
            reference=self.add(SimulatedModel(latency_ns=8e5, noise=0.01)),
            runtime=RuntimeRequest(runtime="simulated", threads=threads),
            reference_runtime=RuntimeRequest(runtime="simulated"),
            plan=MeasurementPlan(**plan),
        )
        lease = Lease(lease_id=f"l{number}", fencing_token=number, ttl_s=30, request=request)
        with self.changed:
            self.leases.append(lease)

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), PATIENCE_S)

    def answer(self, route, body, key):
        """The status, and what to send: a JSON document or the bytes of an artifact."""
        name, _, rest = route.partition("/")
        name = "segments" if rest.endswith("/segments") else name
        with self.changed:
            self.calls[name] += 1
            self.changed.notify_all()
            planned = self.answers.get(name) or self.answers.get("*")
            if planned:
                return planned.pop(0), {"detail": "as planned"}
            if name == "enrol":
                return self.enrol(json.loads(body))
            if key not in self.keys:
                return 401, {"detail": "no such key"}
            if name == "segments":
                return 404, {}  # a service that cannot tell
            if name == "artifacts":
                return (200, self.artifacts[rest]) if rest in self.artifacts else (404, {})
            return {"heartbeat": self.beat, "lease": self.lease, "results": self.accept}[name](body)

    def enrol(self, request):
        if request["token"] not in self.tokens:
            return 401, {"detail": "the token is used up"}
        self.tokens.discard(request["token"])
        self.keys.add(KEY)
        identity = {"agent_id": "a1", "device_id": "d1", "device_name": request["name"] or "pi"}
        return 201, identity | {"agent_key": KEY, "heartbeat_s": 0.05}

    def beat(self, body):
        beat = json.loads(body)
        self.heartbeats.append(beat)
        drop = self.drop_lease and beat["lease_id"] is not None
        return 200, {"heartbeat_s": 0.05, "drop_lease": drop}

    def lease(self, _):
        if not self.leases:
            return 204, None
        return 200, self.leases.pop(0).model_dump(mode="json")

    def accept(self, body):
        self.results.append(MeasurementResult.model_validate_json(body))
        return 200, {"accepted": True}


def handler_for(service):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if service.cut_after is None or self.path.endswith("/segments"):
                self.reply(b"")
            else:
                self.send_part()

        def send_part(self):
            """As much of an artifact as the line lets through, from where it is asked for."""
            asked = self.headers.get("Range")
            service.ranges.append(asked)
            data = service.artifacts[self.path.rpartition("/")[2]]
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + service.cut_after])
            self.close_connection = True

        def do_POST(self):
            self.reply(self.rfile.read(int(self.headers["Content-Length"])))

        def reply(self, body):
            route = self.path.removeprefix("/v1/agent/")
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, document = service.answer(route, body, key)
            plain = document if isinstance(document, bytes) else json.dumps(document).encode()
            data = b"" if document is None else plain
            try:
                self.send_response(status)
                if status != 204:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # the agent went away, as an agent may

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture
def service():
    fake = FakeService()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(fake))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


class RunningAgent:
    """An agent in a thread of this process; what it said is in `lines`."""

    def __init__(self, url, state_dir, **settings):
        self.lines = []
        self.error = None
        settings = {"token": TOKEN, "name": "pi", "long_poll_s": 0.1} | settings
        self.agent = Agent(
            AgentSettings(service_url=url, state_dir=state_dir, **settings),
            say=self.lines.append,
            describe=lambda: DEVICE,
            backoff=lambda: Backoff(first_s=0.01, longest_s=0.05),
        )
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.agent.run()
        except DeviceAgentError as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.agent.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()

    def join(self):
        self.thread.join(PATIENCE_S)
        return self.error


def test_an_agent_enrols_measures_and_hands_in(service, tmp_path):
    service.offer(SimulatedModel(latency_ns=4e5, noise=0.01))
    with RunningAgent(service.url, tmp_path) as running:
        service.wait_for(lambda s: s.results)
    [result] = service.results
    assert result.outcome is Outcome.OK
    assert result.report.ratio == pytest.approx(0.5, rel=0.02)
    assert (result.lease_id, result.fencing_token) == ("l1", 1)
    assert running.lines[0] == "enrolled as pi (agent a1)"
    assert "0.4" in running.lines[1]
    assert "ms ±" in running.lines[1]


def test_the_reference_stays_at_one_thread_beside_a_candidate_with_two(service, tmp_path):
    service.offer(SimulatedModel(latency_ns=8e5, noise=0.01), threads=2)
    with RunningAgent(service.url, tmp_path):
        service.wait_for(lambda s: s.results)
    [result] = service.results
    # A simulated device does nine tenths of the work in parallel.
    assert result.report.ratio == pytest.approx(0.55, rel=0.02)


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


def test_an_agent_of_another_release_is_told_to_upgrade(service, tmp_path):
    service.answers["enrol"] = [426]
    with RunningAgent(service.url, tmp_path) as running:
        assert isinstance(running.join(), IncompatibleProtocol)


def test_no_service_at_all_ends_the_first_start(tmp_path):
    with RunningAgent("http://127.0.0.1:9", tmp_path) as running:
        error = running.join()
    assert isinstance(error, ServiceUnreachable)
    assert "http://127.0.0.1:9 does not answer" in str(error)


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
    assert service.calls["artifacts"] == 3


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


def test_back_off_doubles_up_to_its_bound_and_starts_again():
    backoff = Backoff(first_s=1, longest_s=5, uniform=lambda _, high: high)
    assert [backoff.next_s() for _ in range(4)] == [1, 2, 4, 5]
    backoff.reset()
    assert backoff.next_s() == 1


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
