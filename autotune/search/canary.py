"""Canaries: whether the members of a pool are as fast as each other.

Owns the comparison of identical devices on one model, the job's pinned FP32 reference, and what
follows from it: the pool's calibrated reference latency, and a drain for the member that is
off. What a drained member did since it was last in line is opened again by the repository; the
job measures it on the others. Ordinary measurements are `fleet.py`'s.

A latency of a pool is a ratio to the reference on the member that measured it, times the
pool's reference latency. It is comparable while each member's own is that of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import median, median_low
from typing import Any

from autotune.errors import DeviceUnavailable
from autotune.search.evaluation import Evaluation
from autotune.search.fleet import UNTIMED_RUNTIMES, is_shared, runtime_request
from autotune.search.interruption import DeviceAway, Stopped
from autotune.search.renewal import require_unchanged
from autotune.search.targets import target_on
from device_agents.protocol import LatencyReport, MeasurementPlan, MeasurementRequest, Outcome
from device_agents.undisturbed import Pairs, are_pairs
from storage.identifiers import MEASUREMENT, new_id
from storage.records import (
    CanaryRecord,
    DeviceRecord,
    DrainCause,
    JobRecord,
    MeasurementRecord,
    MeasurementState,
)

MAX_OFF = 0.03
"""A member is off where the whole interval of its ratio to the pool lies further from 1."""

READINGS = 6
"""Processes that read a member's latency. The range of six holds their median with 96.9 %
confidence, 1 - 2 / 2 ** 6, whatever their distribution (David and Nagaraja 2003, section 7.1).
Two sessions of one file differ by 1.5 % (interquartile), so one process would not do."""

SPARE_READINGS = 3
"""Further tries for readings that the moment spoiled."""

VALID_S = 1800.0
"""How long a comparison counts before a job makes another. A choice: it bounds what has to be
measured again when a member turns out to be off."""

_TIME_CAP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A member against its pool: its median over the pool's, with a 96.9 % interval."""

    latency_ns: float
    ratio: float
    ratio_low: float
    ratio_high: float
    n: int

    @property
    def is_off(self) -> bool:
        """The interval lies outside of 1 ± `MAX_OFF`."""
        return self.ratio_low > 1 + MAX_OFF or self.ratio_high < 1 - MAX_OFF


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCheck:
    """What a check found: the reference's latency in ns by target, and who was drained."""

    latencies_ns: Mapping[str, float]
    drained: tuple[str, ...]


def pool_latency_ns(readings: Mapping[str, Sequence[float]]) -> float:
    """The reference's latency in a pool: the median over its members of their medians.

    Of an even number the faster of the middle two, because what is wrong with a device nearly
    always makes it slower; of two members the slower one is then the one that is off.
    """
    return median_low(median(own) for own in readings.values())


def compare(readings: Mapping[str, Sequence[float]]) -> dict[str, Comparison]:
    """Each member's readings in ns against the pool's latency, which is taken as known.

    >>> found = compare({"a": [100, 101, 99], "b": [100, 100, 102], "c": [110, 112, 111]})
    >>> {name: (round(c.ratio, 2), c.is_off) for name, c in found.items()}
    {'a': (1.0, False), 'b': (1.0, False), 'c': (1.11, True)}
    """
    pool_ns = pool_latency_ns(readings)
    return {
        name: Comparison(
            latency_ns=median(own),
            ratio=median(own) / pool_ns,
            ratio_low=min(own) / pool_ns,
            ratio_high=max(own) / pool_ns,
            n=len(own),
        )
        for name, own in readings.items()
    }


def check_pools(evaluation: Evaluation, *, notice: Callable[[str], None]) -> PoolCheck:
    """Compare the members of each pool that the job measures on, where that is due.

    It is due where a member that is online was not compared lately, or the job does not know
    the pool's reference latency yet.

    Raises:
        Stopped: the user or the service asked to stop.
        DeviceAway: every member went offline, or a device is not what it was.
        DeviceUnavailable: no member can measure the model, so that the job cannot begin.
    """
    require_unchanged(evaluation.repository, evaluation.devices)
    latencies: dict[str, float] = {}
    drained: list[str] = []
    for device in evaluation.devices:
        members = _comparable(evaluation, device)
        if is_shared(evaluation.job, device) and _is_due(evaluation.job, device, members):
            readings, failures = _Canaries(evaluation).read(members)
            if readings:
                latencies[device.id] = pool_latency_ns(readings)
                drained += _judge(evaluation, members, readings, failures, notice=notice)
            elif failures and target_on(evaluation.job, device.id).reference_latency_ns is None:
                raise DeviceUnavailable(
                    f"no member of pool {device.pool} could measure the FP32 model, so there is "
                    f"nothing to compare with: {next(iter(failures.values()))}"
                )
            elif not failures:
                raise DeviceAway(
                    f"no device of pool {device.pool} is online; the job goes on when one is back"
                )
    return PoolCheck(latencies_ns=latencies, drained=tuple(drained))


def references(job: JobRecord, check: PoolCheck) -> dict[str, Any]:
    """The pools' reference latencies as changes of the job; what it knows already stays."""
    own, *further = (
        replace(
            t, reference_latency_ns=t.reference_latency_ns or check.latencies_ns.get(t.device_id)
        )
        for t in job.targets
    )
    return {
        "reference_latency_ns": own.reference_latency_ns,
        "further_targets": tuple(further),
    }


def _comparable(evaluation: Evaluation, device: DeviceRecord) -> list[DeviceRecord]:
    members = evaluation.fleet.members(evaluation.job, device)
    return [
        member
        for member in members
        if evaluation.fleet.is_online(member) and member.drained_by is not DrainCause.IDENTITY
    ]


def _is_due(job: JobRecord, device: DeviceRecord, members: Sequence[DeviceRecord]) -> bool:
    now = datetime.now(UTC)
    return target_on(job, device.id).reference_latency_ns is None or any(
        member.canary_at is None or (now - member.canary_at).total_seconds() > VALID_S
        for member in members
    )


def _judge(
    evaluation: Evaluation,
    members: Sequence[DeviceRecord],
    readings: Mapping[str, Sequence[float]],
    failures: Mapping[str, str],
    *,
    notice: Callable[[str], None],
) -> list[str]:
    """Record how each member did; the names of those that were drained by it just now."""
    fleet = evaluation.repository.fleet
    comparisons = compare(readings)
    drained = []
    for member in members:
        found, because = comparisons.get(member.id), failures.get(member.id)
        if found is not None:
            canary = CanaryRecord(
                artifact_sha256=evaluation.reference.sha256,
                latency_ns=found.latency_ns,
                ratio=found.ratio,
                ratio_low=found.ratio_low,
                ratio_high=found.ratio_high,
                n=found.n,
            )
            fleet.record_canary(member.id, canary, passed=not found.is_off)
            because = _describe(found, member.pool) if found.is_off else None
        if because is not None and member.drained_by is None:
            fleet.drain(
                member.id,
                cause=DrainCause.CANARY,
                because=because,
                distrust_since=member.canary_passed_at or member.enrolled_at,
            )
            drained.append(member.name)
            notice(f"device {member.name} is drained: {because}; its work goes to the others")
        elif because is None and found is not None and member.drained_by is not None:
            notice(f"device {member.name} is in line with its pool again and gets work")
    return drained


def _describe(found: Comparison, pool: str | None) -> str:
    off, side = abs(found.ratio - 1), "slower" if found.ratio > 1 else "faster"
    low, high = sorted(abs(bound - 1) for bound in (found.ratio_low, found.ratio_high))
    return (
        f"{off * 100:.1f} % {side} than pool {pool} on the canary ({low * 100:.1f} to "
        f"{high * 100:.1f} %, n = {found.n}), which is more than {MAX_OFF * 100:.0f} %"
    )


class _Canaries:
    """The readings of one check: rounds of one measurement on each member."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._repository = evaluation.repository
        self._fleet = evaluation.fleet

    def read(
        self, members: Sequence[DeviceRecord]
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """The readings in ns of each member that gave all, and why another one gave too few.

        A member that went offline is in neither.
        """
        readings: dict[str, list[float]] = {member.id: [] for member in members}
        failures: dict[str, str] = {}
        here = any(self._fleet.shares_host(member) for member in members)
        try:
            with self._evaluation.window.quiet(shares_host=here):
                for number in range(READINGS + SPARE_READINGS):
                    lacking = [m for m in members if len(readings[m.id]) < READINGS]
                    for record in self._round(lacking, number):
                        if record.outcome is Outcome.OK and record.report is not None:
                            readings[record.device_id].append(reading_ns(record.report))
                        else:
                            failures[record.device_id] = f"{record.outcome}: {record.reason}"
        finally:
            self._repository.cancel_measurements(self._evaluation.job.id)
        complete = {name: own for name, own in readings.items() if len(own) == READINGS}
        short = {
            name: f"it could not measure the canary: {why}"
            for name, why in failures.items()
            if name not in complete and self._is_online(name)
        }
        return complete, short

    def _round(self, members: Sequence[DeviceRecord], number: int) -> list[MeasurementRecord]:
        """One measurement on each, all at once where they do not disturb each other."""
        runtime = self._evaluation.reference_runtime.runtime
        here = [member for member in members if self._fleet.shares_host(member)]
        if len(here) > 1 and runtime not in UNTIMED_RUNTIMES:
            return [record for member in members for record in self._await([member], number)]
        return self._await(members, number)

    def _await(self, members: Sequence[DeviceRecord], number: int) -> list[MeasurementRecord]:
        waiting = [
            self._enqueue(member, number) for member in members if self._is_online(member.id)
        ]
        ended: list[MeasurementRecord] = []
        while waiting:
            if self._evaluation.should_stop():
                raise Stopped
            seen = self._fleet.changes
            records = [self._repository.get_measurement(record.id) for record in waiting]
            ended += [r for r in records if r.state is MeasurementState.DONE]
            waiting = [
                record
                for record in records
                if record.state is not MeasurementState.DONE and self._is_online(record.device_id)
            ]
            if waiting and len(waiting) == len(records):
                self._fleet.wait_for_change(seen)
        return ended

    def _enqueue(self, member: DeviceRecord, number: int) -> MeasurementRecord:
        evaluation = self._evaluation
        options = runtime_request(evaluation.reference_runtime)
        return self._repository.enqueue_measurement(
            job_id=evaluation.job.id,
            trial_id=None,
            device_id=member.id,
            request=MeasurementRequest(
                measurement_id=new_id(MEASUREMENT),
                artifact=evaluation.reference,
                reference=evaluation.reference,
                runtime=options,
                reference_runtime=options,
                plan=MeasurementPlan(
                    target_half_width=evaluation.settings.target_half_width,
                    time_cap_s=min(evaluation.settings.time_cap_s, _TIME_CAP_S),
                    timeout_s=evaluation.settings.timeout_s,
                    seed=evaluation.seed + number,
                ),
            ),
            is_canary=True,
        )

    def _is_online(self, device_id: str) -> bool:
        return self._fleet.is_online(self._repository.get_device(device_id))


def reading_ns(report: LatencyReport) -> float:
    """What the canary took undisturbed, by its samples: agents of another release may say less."""
    if not are_pairs(report.blocks):
        return report.reference_p50_ns
    return Pairs.of(report.blocks).undisturbed_ns("reference")
