"""A small real HTTP service that can refuse, fail and take leases back; and an agent of it."""

import contextlib
import hashlib
import json
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from device_agents.agent import Agent, AgentSettings
from device_agents.backoff import Backoff
from device_agents.errors import DeviceAgentError
from device_agents.protocol import (
    REQUEST_HEADER,
    ArtifactReference,
    DeviceDescription,
    Lease,
    MeasurementPlan,
    MeasurementRequest,
    MeasurementResult,
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


def as_planned(answer):
    """The answer of a status, or a status with what is sent in place of the service's."""
    return answer if isinstance(answer, tuple) else (answer, {"detail": "as planned"})


class FakeService:
    """The agent's routes, with knobs.

    `answers` maps a route to the statuses of its next calls; afterwards it works again. A pair
    of a status and a text is the answer of a portal or a proxy on the way.
    `name_of` gives the name that the answer to a request of some name bears.
    `pauses` are the seconds between the last sign that the agent was at one lease and the next.
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
        self.sent = defaultdict(list)
        self.drop_lease = False
        self.hold_s = 0.0
        self.name_of = lambda name: name
        self.cut_after = None
        self.ranges = []
        self.pauses = []
        self.busy_until_s = None
        self.changed = threading.Condition()

    def add(self, model):
        data = model if isinstance(model, bytes) else model.to_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        self.artifacts[sha256] = data
        return ArtifactReference(sha256=sha256, size_bytes=len(data))

    def offer(self, candidate, *, number=1, threads=1, runtime="simulated", reference=None, **plan):
        request = MeasurementRequest(
            measurement_id=f"m{number}",
            artifact=candidate if isinstance(candidate, ArtifactReference) else self.add(candidate),
            reference=self.add(reference or SimulatedModel(latency_ns=8e5, noise=0.01)),
            runtime=RuntimeRequest(runtime=runtime, threads=threads),
            reference_runtime=RuntimeRequest(runtime=runtime),
            plan=MeasurementPlan(**plan),
        )
        lease = Lease(lease_id=f"l{number}", fencing_token=number, ttl_s=30, request=request)
        with self.changed:
            self.leases.append(lease)

    def wait_for(self, condition, timeout_s=PATIENCE_S):
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), timeout_s)

    def answer(self, route, body, key):
        """The status, and what to send: a JSON document or the bytes of an artifact."""
        name, _, rest = route.partition("/")
        name = "segments" if rest.endswith("/segments") else name
        with self.changed:
            self.calls[name] += 1
            self.sent[name].append(json.loads(body) if body else None)
            self.changed.notify_all()
            planned = self.answers.get(name) or self.answers.get("*")
            if planned:
                return as_planned(planned.pop(0))
            if name == "enrol":
                return self.enrol(json.loads(body))
            if key not in self.keys:
                return 401, {"detail": "no such key"}
            if name == "segments":
                return 404, {}  # a service that cannot tell
            if name == "artifacts":
                return (200, self.artifacts[rest]) if rest in self.artifacts else (404, {})
            if name == "description":
                return 200, {"changed": False}
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
        if beat["lease_id"] is not None:
            self.busy_until_s = time.monotonic()
        return 200, {"heartbeat_s": 0.05, "drop_lease": drop}

    def lease(self, _):
        if not self.leases:
            return 204, None
        if self.busy_until_s is not None:
            self.pauses.append(time.monotonic() - self.busy_until_s)
        return 200, self.leases.pop(0).model_dump(mode="json")

    def accept(self, body):
        self.results.append(MeasurementResult.model_validate_json(body))
        self.busy_until_s = time.monotonic()
        return 200, {"accepted": True}


def encoded(document):
    if isinstance(document, bytes):
        return document
    return document.encode() if isinstance(document, str) else json.dumps(document).encode()


def media_type(status, document):
    """What a service's answer is; text stands for one of something else on the way."""
    if isinstance(document, str):
        return "text/html; charset=utf-8"
    return "application/json" if status < 400 else "application/problem+json"


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
            length = int(self.headers["Content-Length"])
            body = self.rfile.read(length)
            if len(body) < length:
                self.close_connection = True  # the agent was killed in the middle of it
            else:
                self.reply(body)

        def reply(self, body):
            route = self.path.removeprefix("/v1/agent/")
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            threading.Event().wait(service.hold_s)
            status, document = service.answer(route, body, key)
            data = b"" if status == 204 else encoded(document)
            try:
                self.send_response(status)
                self.send_header(REQUEST_HEADER, service.name_of(self.headers[REQUEST_HEADER]))
                if status != 204:
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("Content-Type", media_type(status, document))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # the agent went away, as an agent may

        def log_message(self, *_):
            pass

    return Handler


class ForgivingServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Agents are killed here: a connection that breaks is nothing to talk about."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def fake_service():
    """The service behind a real HTTP server, until the block ends."""
    fake = FakeService()
    server = ForgivingServer(("127.0.0.1", 0), handler_for(fake))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


class RunningAgent:
    """An agent in a thread of this process; what it said is in `lines`."""

    def __init__(self, url, state_dir, *, describe=lambda: DEVICE, environment="e", **settings):
        self.lines = []
        self.error = None
        settings = {"token": TOKEN, "name": "pi", "long_poll_s": 0.1} | settings
        self.agent = Agent(
            AgentSettings(service_url=url, state_dir=state_dir, **settings),
            say=self.lines.append,
            describe=describe,
            environment=lambda: environment,
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
