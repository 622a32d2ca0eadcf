"""Many devices on one service: `python -m tests.benchmarks.fleet`. Keys:

- `scaling_8`: measurements per second with 8 devices over 8 times those with one; at least 0.9.
  Each device has the same number to do, and its rate is theirs over the time until its last one
  is accepted: which device happens to end last says nothing of the service. Real agents with a
  process per measurement; the simulated runtime in it sleeps for what a device would compute,
  so that 8 devices fit on one machine. `scaling_2`, `scaling_4` likewise;
- `lease_p99_s`: 99th percentile of the time from a measurement's commit in the database until
  an idle agent, one of 1,000 that hold a long poll, has the lease in its hands; below 1;
- `lost`: measurements that are not done with a result in the end, or whose result is another
  than the one that was acknowledged; 0. `duplicated`: measurements of which results of two
  leases were acknowledged; 0. Both are counted in the database that the service leaves behind.

Service, real agents and the process with the 1,000 simulated ones share the machine. The latter
beat when the service tells them to, like real ones, take 5 s for a measurement and hand in a
report of usual size; work arrives at random, 30 a second, for devices that are idle. 4 % of the
measurements meet a misbehaving agent (`simulated_agents.py`). Work begins 20 s after the agents
have come: while a thousand come at once, within 3 s, a lease took up to 2.9 s (p99 2.4 s over
such a minute).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from device_agents.agent import Agent, AgentSettings
from device_agents.device import describe_device
from device_agents.measurement import Measurement
from device_agents.protocol import MeasurementPlan, RuntimeRequest
from device_agents.runtimes.simulated import SimulatedModel
from storage.database import open_database
from storage.records import MeasurementRecord, MeasurementState
from storage.repository import Repository
from tests.benchmarks.harness import ROOT, Benchmark, Figure, start
from tests.benchmarks.simulated_agents import (
    LONG_POLL_S,
    Ledger,
    Line,
    SimulatedAgent,
    living,
    until,
)

DEVICES, QUICK_DEVICES = (1, 2, 4, 8), (1, 8)
EACH, QUICK_EACH = 6, 1
SLEEP_S, QUICK_SLEEP_S = 0.1, 0.06
CROWD, QUICK_CROWD = 1000, 200
RATE_PER_S = 30.0
FEED_S, QUICK_FEED_S = 60.0, 5.0
MEASURE_S, QUICK_MEASURE_S = 5.0, 1.0
LEASE_TTL_S, QUICK_LEASE_TTL_S = 15.0, 6.0
LOOK_S = 0.5
PLAN = {"target_half_width": 0.02, "time_cap_s": 10.0, "timeout_s": 60.0}
RUNTIME = {"runtime": "simulated"}


def main() -> int:
    benchmark = start("fleet", "Throughput and lease latency of a fleet of simulated devices.")
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        scale(benchmark, Path(folder))
        crowd(benchmark, Path(folder))
    benchmark.report()
    return 0


@dataclass(slots=True)
class Service:
    """A running `fleet_service`."""

    process: subprocess.Popen[str]
    url: str
    database: str

    def command(self, name: str, argument: Any) -> Any:
        """What it answers; one command at a time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({name: argument}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def cpu_s(self) -> float:
        """CPU time that it took so far, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def service(folder: Path, *, lease_ttl_s: float = LEASE_TTL_S) -> Iterator[Service]:
    """The service in a process of its own, until the block ends; its database stays."""
    ready = folder / "ready.json"
    command = [sys.executable, "-m", "tests.benchmarks.fleet_service"]
    command += [str(folder), str(ready), str(lease_ttl_s)]
    with (
        (folder.parent / f"{folder.name}.log").open("w") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit("the service did not start")
                time.sleep(0.05)
            url = json.loads(ready.read_text(encoding="utf-8"))["url"]
            yield Service(process, url, f"sqlite:///{folder / 'autotune.db'}")
        finally:
            process.terminate()
            process.wait(60)


def measurement_request(
    artifact: dict[str, Any], reference: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What is asked of a simulated device."""
    return {
        "artifact": artifact,
        "reference": reference or artifact,
        "runtime": RUNTIME,
        "reference_runtime": RUNTIME,
        "plan": PLAN,
    }


def done(database: str) -> list[MeasurementRecord]:
    """All measurements that the service left behind."""
    opened = open_database(database)
    try:
        repository = Repository(opened)
        return [x for job in repository.list_jobs() for x in repository.list_measurements(job.id)]
    finally:
        opened.close()


# -- throughput ----------------------------------------------------------------------------


def scale(benchmark: Benchmark, folder: Path) -> None:
    """Adds `scaling_N`."""
    each = QUICK_EACH if benchmark.quick else EACH
    rates: dict[int, float] = {}
    for n_devices in QUICK_DEVICES if benchmark.quick else DEVICES:
        spent_s = busy_s(folder / f"scale-{n_devices}", n_devices, each, benchmark.quick)
        rates[n_devices] = sum(each / seconds for seconds in spent_s)
        benchmark.say(f"{n_devices} devices: {rates[n_devices]:.3f} measurements per second")
    benchmark.raw["throughput_per_s"] = {str(n): rate for n, rate in rates.items()}
    for n_devices in sorted(rates, reverse=True)[:-1]:
        scaling = rates[n_devices] / (n_devices * rates[1])
        benchmark.add(f"scaling_{n_devices}", Figure(value=scaling, n=n_devices * each))


def busy_s(folder: Path, n_devices: int, each: int, is_quick: bool) -> list[float]:
    """Per device the seconds from the first measurement queued to its last result accepted."""
    folder.mkdir()
    with service(folder) as running:
        model = SimulatedModel(
            verb="sleep", latency_ns=5e6, sleep_s=QUICK_SLEEP_S if is_quick else SLEEP_S, noise=0.01
        )
        fast = SimulatedModel(latency_ns=5e6, noise=0.01)
        artifact, reference = (
            running.command("artifact", x.to_bytes().decode()) for x in (model, fast)
        )
        with real_agents(running, folder, n_devices) as device_ids:
            request = measurement_request(artifact, reference)
            running.command("queue", [(x, request) for _ in range(each) for x in device_ids])
            # Seldom: each look costs the service a read of all results, and the records tell
            # when the last one came.
            while running.command("open", None):
                time.sleep(LOOK_S)
    records = done(running.database)
    failed = [x.reason for x in records if x.report is None]
    if failed:
        raise SystemExit(f"{len(failed)} measurements failed: {failed[0]}")
    began = min(x.created_at for x in records)
    ended = [(x.finished_at, x.device_id) for x in records if x.finished_at is not None]
    last = {device_id: at for at, device_id in sorted(ended)}
    return [(at - began).total_seconds() for at in last.values()]


@contextlib.contextmanager
def real_agents(running: Service, folder: Path, n: int) -> Iterator[list[str]]:
    """Enrolled agents that lease; yields their devices' ids."""
    description = describe_device(probe=lambda: ())
    agents = [
        Agent(
            AgentSettings(
                service_url=running.url,
                state_dir=folder / f"agent-{number}",
                token=running.command("token", None),
                name=f"device-{number}",
            ),
            say=lambda _: None,
            describe=lambda: description,
        )
        for number in range(n)
    ]
    threads = [threading.Thread(target=agent.run) for agent in agents]
    for thread in threads:
        thread.start()
    try:
        while len(device_ids := running.command("devices", None)) < n:
            time.sleep(0.05)
        yield device_ids
    finally:
        for agent in agents:
            agent.stop()
        for thread in threads:
            thread.join()


# -- a thousand agents ---------------------------------------------------------------------


def crowd(benchmark: Benchmark, folder: Path) -> None:
    """Adds `lease_p99_s`, `lost` and `duplicated`."""
    n = QUICK_CROWD if benchmark.quick else CROWD
    data_dir = folder / "crowd"
    data_dir.mkdir()
    report = usual_report(folder)
    measure_s = QUICK_MEASURE_S if benchmark.quick else MEASURE_S
    lease_ttl_s = QUICK_LEASE_TTL_S if benchmark.quick else LEASE_TTL_S
    with service(data_dir, lease_ttl_s=lease_ttl_s) as running:
        benchmark.say(f"{n} agents enrol")
        enrolled = running.command("enrol", n)
        ledger = Ledger()
        agents = simulated_agents(running.url, enrolled, ledger, report, lease_ttl_s, measure_s)
        raw: dict[str, Any] = {"agents": n}
        available = asyncio.run(feed(benchmark, running, agents, raw))
    records = done(running.database)
    waits = sorted(ledger.taken_s[x] - s for x, s in available.items() if x in ledger.taken_s)
    lost, duplicated = audit(records, list(available), ledger)
    benchmark.add("lease_p99_s", Figure(value=float(np.quantile(waits, 0.99)), n=len(waits)))
    benchmark.add("lost", Figure(value=len(lost), n=len(available)))
    benchmark.add("duplicated", Figure(value=len(duplicated), n=len(available)))
    benchmark.raw["crowd"] = raw | {
        "lease_s": waits,
        "heartbeats": len(ledger.heartbeat_s),
        "heartbeat_p99_s": float(np.quantile(ledger.heartbeat_s, 0.99)),
        "fates": ledger.misbehaved,
        "refused_results": ledger.refused,
        "lost": lost,
        "duplicated": duplicated,
        "unexpected_answers": ledger.failures[:20],
    }
    benchmark.say(
        f"leases: median {np.median(waits):.3f} s; heartbeats: p99 "
        f"{benchmark.raw['crowd']['heartbeat_p99_s']:.3f} s; service: {raw['service_cores']:.2f} "
        f"cores; {len(ledger.failures)} unexpected answers"
    )


def usual_report(folder: Path) -> dict[str, Any]:
    """A report as a device sends it, raw samples included; of a simulated model."""
    path = folder / "usual.json"
    path.write_bytes(SimulatedModel(noise=0.02).to_bytes())
    runtime, plan = RuntimeRequest.model_validate(RUNTIME), MeasurementPlan.model_validate(PLAN)
    ended = Measurement(candidate=path, reference=path, runtime=runtime, plan=plan).run()
    if ended.report is None:
        raise SystemExit(f"the simulated measurement ended as {ended.outcome}: {ended.reason}")
    return ended.report.model_dump(mode="json")


def simulated_agents(
    url: str,
    enrolled: Sequence[dict[str, str]],
    ledger: Ledger,
    report: dict[str, Any],
    lease_ttl_s: float,
    measure_s: float,
) -> list[SimulatedAgent]:
    """One for each of the enrolled."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    return [
        SimulatedAgent(
            work=Line(host, port, identity["key"]),
            beat=Line(host, port, identity["key"]),
            device_id=identity["device_id"],
            ledger=ledger,
            report=report,
            measure_s=measure_s,
            lease_ttl_s=lease_ttl_s,
            chance=random.Random(f"agent-{number}"),
        )
        for number, identity in enumerate(enrolled)
    ]


async def feed(
    benchmark: Benchmark, running: Service, agents: list[SimulatedAgent], raw: dict[str, Any]
) -> dict[str, float]:
    """Queue work for idle agents, wait until it is done; when each was available."""
    chance = random.Random(0)
    digest = {"sha256": "a" * 64, "size_bytes": 10}
    available: dict[str, float] = {}
    open_of: dict[str, str] = {}
    finished = agents[0].ledger.accepted
    feed_s = QUICK_FEED_S if benchmark.quick else FEED_S
    async with living(agents):
        # They all come within 3 s, as after a restart of the service, and their first polls end
        # together; one poll later they are spread as they are for the rest of their lives.
        await asyncio.sleep(0 if benchmark.quick else LONG_POLL_S)
        benchmark.say(f"all agents wait; work arrives for {feed_s:.0f} s")
        cpu_s, began = running.cpu_s(), time.monotonic()
        arrival_s = 0.0
        while (arrival_s := arrival_s + chance.expovariate(RATE_PER_S)) < feed_s:
            await asyncio.sleep(began + arrival_s - time.monotonic())
            polling = [agent.device_id for agent in agents if agent.is_polling]
            device_id = chance.choice(
                [x for x in polling if x not in open_of or open_of[x] in finished]
            )
            wanted = [(device_id, measurement_request(digest))]
            [queued] = await asyncio.to_thread(running.command, "queue", wanted)
            available[queued["measurement_id"]] = queued["available_s"]
            open_of[device_id] = queued["measurement_id"]
        raw["service_cores"] = (running.cpu_s() - cpu_s) / (time.monotonic() - began)
        raw["arrivals_per_s"] = len(available) / (time.monotonic() - began)
        await until(lambda: available.keys() <= finished.keys(), timeout_s=4 * LEASE_TTL_S)
    return available


def audit(
    records: Sequence[MeasurementRecord], available: Sequence[str], ledger: Ledger
) -> tuple[list[str], list[str]]:
    """The measurements that were lost, and those of which two results were acknowledged.

    Lost is one that was queued and has no result in the database, or another one than the
    agent was told is accepted.
    """
    kept = {
        x.id: x.fencing_token
        for x in records
        if x.state is MeasurementState.DONE and x.report is not None
    }
    acknowledged = ledger.accepted
    lost = [x for x in available if kept.get(x) not in acknowledged.get(x, ())]
    return lost, [x for x, tokens in acknowledged.items() if len(tokens) > 1]


if __name__ == "__main__":
    sys.exit(main())
