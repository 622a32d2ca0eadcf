"""How long a job's devices stood idle although all they needed was there.

Owns the account of a device's time between a job's first measurement and its last, from stored
records alone. Each moment is one of four:

- **measuring**: what the reports say they took (`LatencyReport.wall_s`: from loading the runtime
  to the figures), with the start and the end of the process that measures, which is a fresh one
  each time (`process_s`);
- **dispatch**: a measurement waits for the device, or its result for being stored: lease,
  download, upload. Of the time from when a measurement was queued, or the one before it ended,
  until its own result was stored it is what the process did not live; of an agent that does not
  say how long that was, what `wall_s` leaves; a lease that ran out is in it;
- **waiting for the workers**: an artifact is being built, trained or judged. From when the first
  trial of a batch was opened until the first of its measurements is queued; in the phases that
  are the workers' alone (`WORKERS_PHASES`); from the beginning of `confirming` until its first
  measurement is queued, for the front is shown all samples then; and before each further
  confirmation the seconds that its accuracy on held-out data took;
- **planning**: whatever else lies between two measurements: the models are fitted, candidates
  proposed, rows written.

`ratio` is dispatch and planning over what the reports took (`wall_s`). It errs on the side of too
much between confirmations, where a worker that is asked for an accuracy has more to do than to
compute it, and too little while artifacts are built: what is slow there is not told from work.
Left out are measurements without a report, whose time nobody knows, and gaps in which the job
does not run: it waits for a device, or is over, and its bundle is measured once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from storage.records import EventRecord, JobState, MeasurementRecord, TrialRecord

WORKERS_PHASES = ("loading", "sensitivity", "pruning")

Span = tuple[datetime, datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTime:
    """Seconds over all devices of a job; `n` counts the measurements that have a report.

    `measuring_s` are those of the reports alone.
    """

    measuring_s: float
    dispatch_s: float
    planning_s: float
    n: int

    @property
    def ratio(self) -> float | None:
        """Dispatch and planning over measuring; None where nothing was measured."""
        if self.measuring_s <= 0:
            return None
        return (self.dispatch_s + self.planning_s) / self.measuring_s


def control_time(
    trials: Sequence[TrialRecord],
    measurements: Sequence[MeasurementRecord],
    events: Sequence[EventRecord],
) -> ControlTime:
    """The account of one job, with its trials, measurements and events in any order."""
    measuring_s = dispatch_s = planning_s = 0.0
    n = 0
    for device_id in {record.device_id for record in measurements}:
        ended: datetime | None = None
        for record, stored in _stored([m for m in measurements if m.device_id == device_id]):
            if ended is not None and record.created_at > ended:
                gap = (ended, record.created_at)
                planning_s += _seconds(gap) - _covered(gap, _waits(gap, record, trials, events))
            served = (max(record.created_at, ended or record.created_at), stored)
            if record.report is not None:
                n += 1
                measuring_s += record.report.wall_s
                lived_s = record.report.process_s or record.report.wall_s
                dispatch_s += max(_seconds(served) - lived_s, 0.0)
            ended = stored
    return ControlTime(measuring_s=measuring_s, dispatch_s=dispatch_s, planning_s=planning_s, n=n)


def _stored(
    measurements: Sequence[MeasurementRecord],
) -> list[tuple[MeasurementRecord, datetime]]:
    """Those that have ended, in the order in which they did."""
    ended = [(m, m.finished_at) for m in measurements if m.finished_at is not None]
    return sorted(ended, key=lambda pair: pair[1])


def _waits(
    gap: Span,
    following: MeasurementRecord,
    trials: Sequence[TrialRecord],
    events: Sequence[EventRecord],
) -> Iterator[Span]:
    """When the workers were at something, or the job did not run, between two measurements."""
    begun, queued = gap
    phases, states = _entered("phase", events), _entered("state", events)
    opened = [trial.created_at for trial in trials]
    opened += [at for phase, at in phases if phase == "confirming"]
    if waits := [at for at in opened if begun <= at < queued]:
        yield min(waits), queued
    for (phase, entered), (_, left) in pairwise([*phases, ("", queued)]):
        if phase in WORKERS_PHASES:
            yield entered, left
    for (state, entered), (_, left) in pairwise([*states, ("", queued)]):
        if state != JobState.RUNNING:
            yield entered, left
    for trial in trials:
        if trial.id == following.trial_id and following.request.plan.kind == "confirmation":
            judged = trial.on(following.device_id).held_out_accuracy
            yield queued - timedelta(seconds=judged.wall_s if judged else 0.0), queued


def _entered(kind: str, events: Sequence[EventRecord]) -> list[tuple[str, datetime]]:
    """The job's phases, or states, and when it entered each, in order of time."""
    found = [(str(e.payload[kind]), e.created_at) for e in events if e.kind == kind]
    return sorted(found, key=lambda pair: pair[1])


def _covered(gap: Span, spans: Iterator[Span]) -> float:
    """Seconds of the gap that lie in any of the spans."""
    total_s, reached = 0.0, gap[0]
    for begun, ended in sorted(spans):
        inside = (max(begun, reached), min(ended, gap[1]))
        if inside[0] < inside[1]:
            total_s += _seconds(inside)
            reached = inside[1]
    return total_s


def _seconds(span: Span) -> float:
    return (span[1] - span[0]).total_seconds()
