"""What the agent takes on a device while it waits: `python -m tests.benchmarks.agent_footprint`.

A real agent process beside a real service, at the default heartbeat. Keys:

- `rss_mb`: resident memory in MB (10^6 bytes) of the agent's process while it waits for work,
  after it did a measurement; at most 60;
- `idle_cpu_percent`: processor time of that process, in percent of one core, while it holds a
  long poll and beats; at most 1;
- `first_heartbeat_s`: from the start of an enrolled agent's process to its first heartbeat at
  the service, median; below 2 on x86. The very first start probes the device before that.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from device_agents.protocol import (
    ArtifactReference,
    MeasurementPlan,
    MeasurementRequest,
    RuntimeRequest,
)
from device_agents.runtimes.simulated import SimulatedModel
from storage.records import MeasurementState
from tests.benchmarks.harness import Benchmark, Figure, start
from tests.running_service import RunningService, job_document, running_service

STARTS, QUICK_STARTS = 9, 2
IDLE_S, QUICK_IDLE_S = 120.0, 6.0
PATIENCE_S = 120.0
SIMULATED = RuntimeRequest(runtime="simulated")


def main() -> int:
    benchmark = start("agent_footprint", "Memory, processor time and start of a waiting agent.")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-footprint-")))
        service = stack.enter_context(running_service(folder / "service"))
        beats, state_dir = Beats(service), folder / "agent"
        with agent(service.url, state_dir, service.client.enrolment_token().token):
            beats.next_s()
        benchmark.say("enrolled")
        starts = QUICK_STARTS if benchmark.quick else STARTS
        began = [time_start(service, state_dir, beats) for _ in range(starts)]
        benchmark.raw["first_heartbeat_s"] = began
        benchmark.add("first_heartbeat_s", Figure(value=statistics.median(began), n=starts))
        with agent(service.url, state_dir) as process:
            beats.next_s()
            measure_once(service)
            watch_idle(process, benchmark)
    benchmark.report()
    return 0


class Beats:
    """The moments at which heartbeats arrive at the service's database."""

    def __init__(self, service: RunningService) -> None:
        self._arrived = threading.Event()
        self._at_s = 0.0
        note = service.repository.note_heartbeats

        def noted(*arguments, **options):  # type: ignore[no-untyped-def]
            self._at_s = time.monotonic()
            self._arrived.set()
            return note(*arguments, **options)

        service.repository.note_heartbeats = noted  # type: ignore[method-assign]

    def next_s(self) -> float:
        """The monotonic time of the first heartbeat from now on."""
        self._arrived.clear()
        if not self._arrived.wait(PATIENCE_S):
            raise RuntimeError(f"no heartbeat within {PATIENCE_S:g} s")
        return self._at_s


@contextlib.contextmanager
def agent(url: str, state_dir: Path, token: str | None = None) -> Iterator[psutil.Process]:
    """The process of an agent, until the block ends."""
    command = [sys.executable, "-m", "device_agents", "run", "--service", url]
    command += ["--state-dir", str(state_dir), "--name", "device"]
    command += ["--token", token] if token else []
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def time_start(service: RunningService, state_dir: Path, beats: Beats) -> float:
    """Seconds from the start of the process to its first heartbeat."""
    before_s = time.monotonic()
    with agent(service.url, state_dir):
        return beats.next_s() - before_s


def measure_once(service: RunningService) -> None:
    """Let the agent measure a simulated model, so that all it ever imports is imported."""
    repository, store = service.repository, service.context.artifacts
    model = store.put(SimulatedModel(latency_ns=4e5, noise=0.01).to_bytes())
    artifact = ArtifactReference(sha256=model.sha256, size_bytes=model.size_bytes)
    [device] = repository.list_devices()
    record = repository.enqueue_measurement(
        job_id=repository.create_job(spec=job_document(), name="footprint").id,
        trial_id=None,
        device_id=device.id,
        request=MeasurementRequest(
            measurement_id="m-footprint",
            artifact=artifact,
            reference=artifact,
            runtime=SIMULATED,
            reference_runtime=SIMULATED,
            plan=MeasurementPlan(),
        ),
    )
    deadline_s = time.monotonic() + PATIENCE_S
    while repository.get_measurement(record.id).state is not MeasurementState.DONE:
        if time.monotonic() > deadline_s:
            raise RuntimeError("the agent did not measure")
        time.sleep(0.1)


def watch_idle(process: psutil.Process, benchmark: Benchmark) -> None:
    """Processor time and memory of an agent that has nothing to do."""
    idle_s = QUICK_IDLE_S if benchmark.quick else IDLE_S
    time.sleep(3)
    before_s, began_s = on_cpu_s(process), time.monotonic()
    time.sleep(idle_s)
    used_s, spent_s = on_cpu_s(process) - before_s, time.monotonic() - began_s
    benchmark.raw["idle_s"] = spent_s
    benchmark.add("idle_cpu_percent", Figure(value=100 * used_s / spent_s, n=1))
    benchmark.add("rss_mb", Figure(value=process.memory_info().rss / 1e6, n=1))


def on_cpu_s(process: psutil.Process) -> float:
    """Processor time of all threads so far; the usual counters know hundredths of a second."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


if __name__ == "__main__":
    raise SystemExit(main())
