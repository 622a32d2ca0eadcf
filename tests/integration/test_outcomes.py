"""Every way a measurement can end, provoked for real: a service, an agent's process, a runtime
that obeys, and what stands in the database afterwards. QUARANTINED is `test_fleet.py`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from device_agents.protocol import (
    ArtifactReference,
    MeasurementPlan,
    MeasurementRequest,
    Outcome,
    RuntimeRequest,
)
from device_agents.runtimes.simulated import SimulatedModel
from storage.records import DeviceRecord, MeasurementRecord, MeasurementState
from tests.running_service import RunningService, job_document, running_service
from tests.unit import hostile
from tests.unit.test_hostile_runtime import Supervised

PATIENCE_S = 120.0
CACHE_BYTES = 1_000_000


class Bench:
    """One device with an agent on a service; measures what it is given."""

    def __init__(self, service: RunningService, device: DeviceRecord) -> None:
        self.service, self.device = service, device
        self.job = service.repository.create_job(spec=job_document(), name="outcomes")
        self._news = threading.Condition()
        service.context.broadcast.listen(self._wake)

    def put(self, content: bytes) -> ArtifactReference:
        """The content in the service's store."""
        stored = self.service.context.artifacts.put(content)
        return ArtifactReference(sha256=stored.sha256, size_bytes=stored.size_bytes)

    def queue(self, artifact: ArtifactReference, runtime: str = "hostile", **plan: float) -> str:
        """Queue a measurement; its name."""
        simulated = SimulatedModel(latency_ns=8e5, noise=0.01).to_bytes()
        request = MeasurementRequest(
            measurement_id=f"m-{artifact.sha256[:12]}",
            artifact=artifact,
            reference=self.put(hostile.artifact("ok") if runtime == "hostile" else simulated),
            runtime=RuntimeRequest(runtime=runtime),
            reference_runtime=RuntimeRequest(runtime=runtime),
            plan=MeasurementPlan.model_validate({"time_cap_s": 1.0, "timeout_s": 60.0} | plan),
        )
        self.service.repository.enqueue_measurement(
            job_id=self.job.id, trial_id=None, device_id=self.device.id, request=request
        )
        return request.measurement_id

    def wait(self, name: str, state: MeasurementState) -> MeasurementRecord:
        """The measurement once it is in that state."""
        get = self.service.repository.get_measurement
        with self._news:
            assert self._news.wait_for(lambda: get(name).state is state, PATIENCE_S)
        return get(name)

    def _wake(self, _: str) -> None:
        with self._news:
            self._news.notify_all()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("outcomes")
    settings = {"heartbeat_s": 0.2, "lease_ttl_s": 10.0, "measurement_attempts": 2}
    with running_service(folder / "service", **settings) as service:
        token = service.client.enrolment_token().token
        packages = hostile.package(folder / "packages")
        state = folder / "state"
        with Supervised(service.url, state, packages, token=token, cache_gb=CACHE_BYTES / 1e9):
            enrolled = threading.Event()
            while not service.repository.list_devices():
                assert not enrolled.wait(0.1)
            yield Bench(service, service.repository.list_devices()[0])


def obeying(verb: str, **plan: float) -> Callable[[Bench], str]:
    return lambda bench: bench.queue(bench.put(hostile.artifact(verb, 1)), **plan)


def steady(bench: Bench) -> str:
    model = SimulatedModel(latency_ns=4e5, noise=0.01)
    return bench.queue(bench.put(model.to_bytes()), "simulated")


def drifting(bench: Bench) -> str:
    model = SimulatedModel(noise=0.01, drift_per_s=0.5)
    plan = {"target_half_width": 0.0005, "time_cap_s": 5.0}
    return bench.queue(bench.put(model.to_bytes()), "simulated", **plan)


def without_kernel(bench: Bench) -> str:
    return bench.queue(bench.put(SimulatedModel(verb="unsupported").to_bytes()), "simulated")


def altered(bench: Bench) -> str:
    """The service's own disk spoils the file; what arrives is not what was promised."""
    promised = bench.put(hostile.artifact("ok", 7))
    path = bench.service.context.artifacts.path(promised.sha256)
    path.chmod(0o600)
    path.write_bytes(hostile.artifact("ok", 8))
    return bench.queue(promised)


def deleted(bench: Bench) -> str:
    return bench.queue(ArtifactReference(sha256="0" * 64, size_bytes=3))


def too_large(bench: Bench) -> str:
    return bench.queue(bench.put(bytes(CACHE_BYTES + 1)))


@pytest.mark.parametrize(
    ("provoke", "outcome", "said"),
    [
        (steady, Outcome.OK, None),
        (drifting, Outcome.UNSTABLE, "wide at the time cap"),
        (obeying("segfault"), Outcome.RUNTIME_CRASH, "SIGSEGV"),
        (obeying("abort"), Outcome.RUNTIME_CRASH, "SIGABRT"),
        (obeying("oom"), Outcome.OOM, "memory"),
        (obeying("hang", timeout_s=1.0), Outcome.TIMEOUT, "no result within 1 s"),
        (without_kernel, Outcome.UNSUPPORTED, "no kernel"),
        (altered, Outcome.ARTIFACT_CORRUPT, "promised"),
        (deleted, Outcome.ARTIFACT_MISSING, "does not have artifact 00000000"),
        (too_large, Outcome.DEVICE_DISK, "bounded to"),
        (obeying("kill_agent"), Outcome.LOST, "attempt 2 of 2"),
    ],
    ids=lambda value: str(value) if isinstance(value, Outcome) else "",
)
def test_each_outcome_stands_in_the_database_with_its_reason(
    bench: Bench, provoke: Callable[[Bench], str], outcome: Outcome, said: str | None
) -> None:
    record = bench.wait(provoke(bench), MeasurementState.DONE)
    assert record.outcome is outcome, record.reason
    assert (record.report is not None) == (outcome in (Outcome.OK, Outcome.UNSTABLE))
    assert said is None or said in str(record.reason)


def test_a_cancelled_measurement_is_stopped_and_the_next_one_runs(bench: Bench) -> None:
    name = bench.queue(bench.put(hostile.artifact("hang", 2)), timeout_s=600.0)
    bench.wait(name, MeasurementState.LEASED)
    bench.service.repository.cancel_measurements(bench.job.id)
    assert bench.service.repository.get_measurement(name).outcome is Outcome.CANCELLED
    after = bench.queue(bench.put(hostile.artifact("ok", 2)), time_cap_s=0.2)
    assert bench.wait(after, MeasurementState.DONE).report is not None
