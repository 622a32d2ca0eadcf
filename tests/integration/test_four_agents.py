"""Four agents behind bad lines: every measurement is accepted exactly once and none is lost.

The clock of service and agents runs 40 times faster, and so does the line: a partition of 30 s
takes 0.75 s here, one of ten minutes 15 s. Each agent is a process of its own; with root each
also lives in a network namespace whose one way out is the proxy.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from device_agents.protocol import (
    ArtifactReference,
    MeasurementPlan,
    MeasurementRequest,
    Outcome,
    RuntimeRequest,
)
from storage.records import JobRecord, MeasurementRecord, MeasurementState
from tests.fault_proxy import FaultProxy, Faults
from tests.running_service import RunningService, job_document, running_service

SPEED = 40.0
HEARTBEAT_S, LEASE_TTL_S = 3.0 / SPEED, 15.0 / SPEED
SHORT_PARTITION_S, LONG_PARTITION_S = 30.0 / SPEED, 600.0 / SPEED
LINE_BYTES_PER_S = 64_000 / 8 * SPEED
EACH = 3
PATIENCE_S = 200.0
ROOT = Path(__file__).parents[2]
SIMULATED = RuntimeRequest(runtime="simulated")

LINES = (
    Faults(delay_s=0.5 / SPEED, reset=0.05, cut=0.05, repeated=0.05, doubled=0.05),
    Faults(half_open=0.03, swallowed=0.05, reset=0.03, doubled=0.05),
    Faults(bytes_per_s=LINE_BYTES_PER_S, cut=0.02),
    Faults(delay_s=1.0 / SPEED, swallowed=0.03, repeated=0.1, cut=0.03),
)


@dataclass
class Fleet:
    """A service, its agents and the lines between them."""

    service: RunningService
    proxies: list[FaultProxy]
    job: JobRecord
    accepted: Counter[tuple[str, int]] = field(default_factory=Counter)

    def queue(self, device_id: str, number: int) -> str:
        """A measurement of an artifact of its own, 60 kB long: 7 s on a line of 64 kbit/s."""
        store = self.service.context.artifacts
        # Not `{` at the start, which would be simulated JSON.
        model = store.put(b"\0" + random.Random(f"{device_id} {number}").randbytes(60_000))
        reference = store.put(b"\0" + random.Random(0).randbytes(40_000))
        request = MeasurementRequest(
            measurement_id=f"m-{device_id}-{number}",
            artifact=ArtifactReference(sha256=model.sha256, size_bytes=model.size_bytes),
            reference=ArtifactReference(sha256=reference.sha256, size_bytes=reference.size_bytes),
            runtime=SIMULATED,
            reference_runtime=SIMULATED,
            plan=MeasurementPlan(target_half_width=0.05),
        )
        self.service.repository.enqueue_measurement(
            job_id=self.job.id, trial_id=None, device_id=device_id, request=request
        )
        return request.measurement_id

    def wait_for(self, names: list[str]) -> list[MeasurementRecord]:
        """The measurements once all of them are done."""
        news, deadline = threading.Event(), threading.Timer(PATIENCE_S, lambda: None)
        self.service.context.broadcast.listen(lambda _: news.set())
        deadline.daemon = True
        deadline.start()
        get = self.service.repository.get_measurement
        while any(get(name).state is not MeasurementState.DONE for name in names):
            assert deadline.is_alive(), [
                (name, get(name).state, get(name).attempts) for name in names
            ]
            news.wait(0.5)
            news.clear()
        return [get(name) for name in names]


@contextlib.contextmanager
def agent(url: str, folder: Path, name: str, token: str, prefix: list[str]) -> Iterator[None]:
    """The process of one agent, until the block ends."""
    command = [sys.executable, "-m", "tests.accelerated_agent", url, str(folder), name, token]
    with (folder.parent / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*prefix, *command, str(SPEED)], cwd=ROOT, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        yield
        assert process.poll() is None, (folder.parent / f"{name}.log").read_text()
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def namespace(number: int) -> Iterator[tuple[str, list[str]]]:
    """A network namespace: the host's address on the cable to it, and how to run in it."""
    name, cable, address = f"autotune{number}", f"autotune{number}", f"10.213.{number}"
    inside = ["ip", "netns", "exec", name]
    commands = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name],
        ["ip", "address", "add", f"{address}.1/24", "dev", cable],
        ["ip", "link", "set", cable, "up"],
        [*inside, "ip", "address", "add", f"{address}.2/24", "dev", "eth0"],
        [*inside, "ip", "link", "set", "eth0", "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
    ]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        yield f"{address}.1", inside
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextlib.contextmanager
def no_namespace(_: int) -> Iterator[tuple[str, list[str]]]:
    """The loopback interface, shared by all."""
    yield "127.0.0.1", []


def can_make_namespaces() -> bool:
    """Root may, where the kernel and its container let it; tried out."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with namespace(99):
            return True
    except subprocess.CalledProcessError:
        return False


@contextlib.contextmanager
def fleet(folder: Path, *, apart: bool) -> Iterator[Fleet]:
    """Four agents that are enrolled, on lines that are perfect so far."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        settings = {"heartbeat_s": HEARTBEAT_S, "lease_ttl_s": LEASE_TTL_S}
        service = enter(running_service(folder, measurement_attempts=1000, **settings))
        address = ("127.0.0.1", int(service.url.rpartition(":")[2]))
        job = service.repository.create_job(spec=job_document(), name="fleet")
        made = Fleet(service, [], job)
        note_acceptance(made)
        for number in range(len(LINES)):
            host, prefix = enter(namespace(number) if apart else no_namespace(number))
            proxy = enter(FaultProxy(address, seed=number).listening(host))
            made.proxies.append(proxy)
            token = service.client.enrolment_token().token
            url = f"http://{host}:{proxy.port}"
            enter(agent(url, folder / f"pi{number}", f"pi{number}", token, prefix))
        enrolled = threading.Event()
        while len(service.repository.list_devices()) < len(LINES):
            assert not enrolled.wait(0.1)
        yield made


def note_acceptance(made: Fleet) -> None:
    """Count, for each measurement and token, the results that changed it to done."""
    repository = made.service.repository
    accept, one_at_a_time = repository.accept_result, threading.Lock()

    def counted(result, **options):  # type: ignore[no-untyped-def]
        with one_at_a_time:
            before = repository.get_measurement(result.measurement_id).state
            record = accept(result, **options)
            if before is not MeasurementState.DONE:
                made.accepted[record.id, record.fencing_token] += 1
            return record

    repository.accept_result = counted  # type: ignore[method-assign]


@pytest.fixture(params=["loopback", "namespaces"])
def apart(request: pytest.FixtureRequest) -> bool:
    if request.param == "namespaces" and not can_make_namespaces():
        pytest.skip("making network namespaces needs root and the `ip` command")
    return bool(request.param == "namespaces")


@pytest.mark.slow
def test_behind_bad_lines_every_measurement_is_accepted_once_and_none_is_lost(
    tmp_path: Path, apart: bool
) -> None:
    with fleet(tmp_path, apart=apart) as made:
        devices = made.service.repository.list_devices()
        for proxy, faults in zip(made.proxies, LINES, strict=True):
            proxy.faults = faults
        names = [made.queue(d.id, n) for n in range(EACH) for d in devices]
        made.proxies[0].part()
        threading.Timer(SHORT_PARTITION_S, made.proxies[0].heal).start()
        made.proxies[1].part()
        threading.Timer(LONG_PARTITION_S, made.proxies[1].heal).start()
        records = made.wait_for(names)
        # They came back by themselves, and still work.
        records += made.wait_for([made.queue(d.id, EACH) for d in devices])
        assert_exactly_once(made, records)
        met = Counter[str]()
        for proxy in made.proxies:
            met.update(proxy.met)
        faults = {"reset", "cut", "half_open", "swallowed", "repeated", "doubled", "partition"}
        assert faults <= met.keys()  # all of it really happened


def assert_exactly_once(made: Fleet, records: list[MeasurementRecord]) -> None:
    for record in records:
        assert record.outcome in (Outcome.OK, Outcome.UNSTABLE), (record.outcome, record.reason)
        assert record.report is not None
        late = made.service.repository.list_late_results(record.id)
        # Fencing: whatever came late carried an older token than the one that was accepted.
        assert all(x.result.fencing_token < record.fencing_token for x in late)
    assert made.accepted == Counter({(r.id, r.fencing_token): 1 for r in records})
