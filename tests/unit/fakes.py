"""Fakes for the search: workers that answer at once and an agent that lives in a thread.

The fake model: latency and accuracy fall with every quantized group and with pruning, so
that trade-offs exist and every expected answer can be worked out by hand.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from autotune.compression.racing import Race, Shown
from autotune.search.compression_worker import Built, Inspection
from autotune.search.interruption import Stopped
from autotune.search.workers import Call, CallFailed
from device_agents.protocol import (
    DeviceDescription,
    LatencyReport,
    MeasurementResult,
    Outcome,
    RuntimeBuild,
)
from search_spaces import Candidate, Precision
from storage.artifacts import ArtifactFile
from storage.errors import StaleLease
from storage.records import AccuracyReport, DeviceRecord
from storage.repository import Repository
from storage.sensitivity import Sensitivity
from tests.unit.records import accuracy, latency
from tests.unit.spaces import inventory

FP32_MS = 4.0


def fake_ms(candidate: Candidate) -> float:
    """Each INT8 group saves 0.5 ms, each weight-only one nothing; pruning saves its ratio."""
    saved = 0.5 * sum(p.activation_bits == 8 for p in candidate.precisions.values())
    mean_ratio = sum(candidate.prune_ratios.values()) / 2
    return (FP32_MS - saved) * (1 - mean_ratio)


def fake_accuracy(candidate: Candidate) -> float:
    """Each quantized group costs 0.2 points (the stem 2), each pruned one 1 point."""
    cost = sum(0.02 if g == "stem" else 0.002 for g in candidate.precisions)
    return 0.95 - cost - 0.01 * len(candidate.prune_ratios)


def shown_of(candidate: Candidate) -> Shown:
    """A few samples: more groups in low precision leave less of their margins."""
    lost = np.full(20, 0.1 * len(candidate.precisions))
    return Shown(margins=np.linspace(0.1, 7.0, 20) - lost, divergences=lost)


class FakePool:
    """Answers like a `WorkerPool`, in order, in this thread."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.fail_build_of: Callable[[Candidate], str | None] = lambda candidate: None
        self.report_of: Callable[[Candidate, Race | None], AccuracyReport] = (
            lambda candidate, race: accuracy(fake_accuracy(candidate))
        )
        self.is_closed = False

    def run(
        self, calls: Sequence[Call], *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Any]]:
        for index, call in enumerate(calls):
            if should_stop():
                raise Stopped
            self.calls.append(call)
            yield index, getattr(self, f"_{call.method}")(*call.arguments)

    def share_source(self) -> None:
        assert self.calls[-1].method == "inspect"

    def close(self) -> None:
        self.is_closed = True

    def _inspect(self) -> Inspection:
        return Inspection(
            inventory=inventory(),
            source_digest="0" * 64,
            fp32=Candidate().canonical_json().encode(),
            input_name="x",
            input_shape=(1, 8, 8),
            output_name="y",
            num_classes=10,
        )

    def _prepare_base(self, ratios: dict[str, float]) -> dict[str, Any]:
        kept = accuracy(fake_accuracy(Candidate(prune_ratios=ratios)))
        return {"prune_ratios": dict(ratios), "recovery_s": 1.0, "accuracy": kept.to_json()}

    def _noise(self, group: str, precisions: Sequence[Precision]) -> list[Sensitivity]:
        return [
            Sensitivity(group=group, precision=p.name, sqnr_db=20.0 if group == "stem" else 40.0)
            for p in precisions
        ]

    def _divergence(self, group: str, precision: Precision) -> list[Sensitivity]:
        kl = 0.5 if group == "stem" else 0.01
        return [Sensitivity(group=group, precision=precision.name, mean_kl=kl, n_samples=40)]

    def _removal(self, choices: Sequence[tuple[str, float]]) -> list[Sensitivity]:
        return [Sensitivity(group=g, prune_ratio=r, removed_share=r / 2) for g, r in choices]

    def _pruning(self, group: str, ratio: float) -> list[Sensitivity]:
        kl = ratio * (1.0 if group == "stem" else 0.1)
        return [
            Sensitivity(
                group=group, prune_ratio=ratio, removed_share=ratio / 2, mean_kl=kl, n_samples=40
            )
        ]

    def _build(
        self, candidate: Candidate, race: Race | None = None, kernels: str | None = None
    ) -> Built | CallFailed:
        failure = self.fail_build_of(candidate)
        if failure is not None:
            return Built(failed_at="compression", failure=failure)
        data = candidate.canonical_json().encode()
        return Built(
            artifact=data,
            sha256=hashlib.sha256(data).hexdigest(),
            compression={"base": {"recovery_s": 0.0}, "groups": []},
            accuracy=self.report_of(candidate, race),
            shown=None if race is not None else shown_of(candidate),
        )

    def _shown(self, artifact: ArtifactFile, runtime: str) -> Shown:
        return shown_of(Candidate.from_json(json.loads(artifact.read())))

    def _search_accuracy(self, artifact: ArtifactFile, runtime: str) -> Any:
        return accuracy(fake_accuracy(Candidate.from_json(json.loads(artifact.read()))))

    def _held_out(self, artifact: ArtifactFile, runtime: str) -> Any:
        candidate = Candidate.from_json(json.loads(artifact.read()))
        return accuracy(fake_accuracy(candidate), split="held_out", n_samples=600)


def description(
    host_id: str = "edge", runtimes: Sequence[str] = ("onnxruntime",)
) -> DeviceDescription:
    """A device with these runtimes."""
    return DeviceDescription(
        hostname="edge",
        host_id=host_id,
        architecture="x86_64",
        cpu_model="test",
        cpu_flags=(),
        logical_cpus=2,
        memory_bytes=2**30,
        operating_system="Linux",
        kernel="6",
        python="3.11",
        agent_version="0.1.0",
        runtimes=tuple(
            RuntimeBuild(name=name, version="1.31.1", providers=("CPUExecutionProvider",))
            for name in runtimes
        ),
        fingerprint="f" * 64,
    )


class FakeAgent:
    """Leases and answers measurements in a thread, as fast as it can.

    `outcome_of` decides how a measurement of an artifact ends; `limit` is how many it does
    before it falls silent.
    """

    def __init__(
        self,
        repository: Repository,
        artifact: Callable[[str], bytes],
        *,
        name: str = "local",
        host_id: str = "edge",
        runtimes: Sequence[str] = ("onnxruntime",),
        pool: str | None = None,
    ) -> None:
        repository.add_enrolment_token(f"token-{name}", pool=pool, expires_in_s=60)
        device, agent = repository.enrol(
            f"token-{name}",
            name=name,
            description=description(host_id, runtimes),
            agent_key_hash=f"key-{name}",
        )
        self.device: DeviceRecord = device
        self.measured: list[str] = []
        self.plans: list[Any] = []
        self.now: Any = None
        self.outcome_of: Callable[[Candidate], tuple[Outcome, str | None]] = lambda candidate: (
            Outcome.OK,
            None,
        )
        self.report_of: Callable[[Candidate], LatencyReport] = lambda c: latency(fake_ms(c))
        self.limit: int | None = None
        self._agent_id = agent.id
        self._repository = repository
        self._artifact = artifact
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def wake(self) -> None:
        self._wake.set()

    def __enter__(self) -> FakeAgent:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            if self.limit is not None and len(self.measured) >= self.limit:
                self._wake.wait(0.05)
                continue
            self._repository.note_heartbeats([self.device.id], [], ttl_s=30)
            record = self._repository.lease_measurement(
                device_id=self.device.id, agent_id=self._agent_id, ttl_s=30
            )
            if record is None:
                self._wake.wait(0.05)
                continue
            self._answer(record)

    def _answer(self, record: Any) -> None:
        import json

        document = json.loads(self._artifact(record.request.artifact.sha256))
        candidate = Candidate.from_json(document)
        self.now = record.request.plan
        outcome, reason = self.outcome_of(candidate)
        report = self.report_of(candidate) if outcome is Outcome.OK else None
        self.measured.append(record.trial_id)
        self.plans.append(record.request.plan)
        try:
            self._repository.accept_result(
                MeasurementResult(
                    lease_id=record.lease_id,
                    fencing_token=record.fencing_token,
                    measurement_id=record.id,
                    outcome=outcome,
                    reason=reason,
                    report=report,
                ),
                agent_id=self._agent_id,
            )
        except StaleLease:
            return
