"""The portability matrix: what wins on one device of a job, measured on the others.

Pure functions of a finished job's records. A cell is about the candidate, in the artifact that
its device's kernels want: what would ship there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotune.errors import JobNotReady
from autotune.search.feasibility import Limits, limits_of
from autotune.search.front import is_feasible, latency_of
from device_agents.protocol import LatencyReport
from storage.records import JobRecord, TrialOutcome, TrialRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio of two latencies with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A winner on one device; `over_own_winner` is None where either latency is missing."""

    device_id: str
    trial: TrialRecord
    over_own_winner: Ratio | None
    is_feasible: bool | None

    @property
    def reason(self) -> str | None:
        """Why there is no latency; None where there is one."""
        if self.trial.outcome is TrialOutcome.OK and latency_of(self.trial) is not None:
            return None
        return self.trial.reason or "it was not measured there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The winner of `device_id` and what it is on every device, in the order of the targets."""

    device_id: str
    winner: TrialRecord
    cells: tuple[Cell, ...]


def portability(job: JobRecord, trials: Sequence[TrialRecord]) -> list[Row]:
    """A row per device that has a winner, in the order of the job's targets.

    Raises:
        JobNotReady: the job is on one device, or has no answer yet.
    """
    if not job.further_targets:
        raise JobNotReady(
            f"job {job.id} measures on one device; name several (`device: [a, b]`) to learn what "
            "the winner of one costs on another"
        )
    by_id = {trial.id: trial for trial in trials}
    found = (job.result or {}).get("targets", ())
    winners = {t["device_id"]: by_id[t["winner"]] for t in found if t["winner"] in by_id}
    if not winners:
        raise JobNotReady(f"job {job.id} has no winners yet; it is {job.state.value}")
    return [
        Row(
            device_id=target.device_id,
            winner=winner,
            cells=tuple(
                _cell(
                    winner,
                    winners.get(there.device_id),
                    there.device_id,
                    replace(limits_of(job), latency_ns=there.latency_budget_ns),
                )
                for there in job.targets
            ),
        )
        for target in job.targets
        if (winner := winners.get(target.device_id)) is not None
    ]


def _cell(winner: TrialRecord, own: TrialRecord | None, device_id: str, limits: Limits) -> Cell:
    there = winner.on(device_id)
    latency = latency_of(there)
    against = None if own is None else latency_of(own.on(device_id))
    is_same = own is not None and own.id == winner.id
    return Cell(
        device_id=device_id,
        trial=there,
        over_own_winner=None
        if latency is None or against is None
        else ratio(latency, against, is_same=is_same),
        is_feasible=None if latency is None else is_feasible(there, limits),
    )


def ratio(of: LatencyReport, over: LatencyReport, *, is_same: bool = False) -> Ratio:
    """One latency over another on the same device; exactly 1 for one and the same trial.

    Both are ratios to one pinned reference, measured apart, so that their errors are taken as
    independent: the interval comes from theirs on the logarithmic scale (MOVER; Zou and Donner
    2008, Statistics in Medicine 27:1693, for a difference, here of logarithms).
    """
    if is_same:
        return Ratio(value=1.0, low=1.0, high=1.0)
    value = of.p50_ns / over.p50_ns
    down = math.hypot(math.log(of.p50_ns / of.p50_low_ns), math.log(over.p50_high_ns / over.p50_ns))
    up = math.hypot(math.log(of.p50_high_ns / of.p50_ns), math.log(over.p50_ns / over.p50_low_ns))
    return Ratio(value=value, low=value * math.exp(-down), high=value * math.exp(up))
