"""When a search ends: its trials are done, its time is spent, or little more is to be gained.

Owns the rules and how they are told; a job also ends by hand. `tuning.py` asks before every
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

from autotune.search.front import (
    REFERENCE_DROP,
    REFERENCE_RATIO,
    hypervolume,
    latency_of,
    reference_drop,
)
from autotune.search.planner import Proposal
from autotune.spec import SearchSpec
from storage.records import TrialRecord, TrialState


@dataclass(frozen=True, slots=True)
class Stopping:
    """The budget of one job, counted from `started`.

    What a batch gains is hypervolume up to `front.reference_drop` of `max_accuracy_drop`.
    """

    search: SearchSpec
    started: datetime
    max_accuracy_drop: float | None = None

    def trials_left(self, trials: Sequence[TrialRecord]) -> int:
        """How many of the job's trials are not finished yet."""
        finished = sum(trial.state is TrialState.FINISHED for trial in trials)
        return max(self.search.trials - finished, 0)

    @property
    def time_spent(self) -> float:
        """Of the time budget, as a fraction; 0 where there is none."""
        limit = self.search.time_s
        return (datetime.now(UTC) - self.started).total_seconds() / limit if limit else 0.0

    def is_spent(self, trials: Sequence[TrialRecord]) -> str | None:
        """Why the budget is spent; None while it is not."""
        if self.trials_left(trials) == 0:
            return f"all {self.search.trials} trials are done"
        if self.time_spent >= 1:
            return f"the {self.search.time_s:g} s of the time budget are spent"
        return None

    def is_idle(self, batch: Sequence[Proposal], trials: Sequence[TrialRecord]) -> str | None:
        """Why measuring the batch is not worth the device's time; None where it may be.

        The models' expected gain of hypervolume, as a share of what the trials have, per minute
        that the device measures, is held against `least_gain_per_minute`. A batch without a
        prediction is always worth it: nothing says that it is not.
        """
        least = self.search.least_gain_per_minute
        largest = reference_drop(self.max_accuracy_drop)
        gain = gain_per_minute(batch, trials, largest_drop=largest)
        if least is None or gain is None or gain >= least:
            return None
        return (
            f"the next {len(batch)} trials promise {gain:.2%} more hypervolume per minute of the "
            f"device, less than the {least:.2%} asked for"
        )


def gain_per_minute(
    batch: Sequence[Proposal],
    trials: Sequence[TrialRecord],
    *,
    largest_drop: float = REFERENCE_DROP,
) -> float | None:
    """The hypervolume that the batch is expected to add per minute of measuring, as a share.

    Of the hypervolume that the trials have, both up to `largest_drop`. A trial takes the median
    of what earlier ones took on the device. None where the models predict nothing, or nothing
    has been gained so far.
    """
    gains = [proposal.gain for proposal in batch if proposal.gain is not None]
    reports = [latency_of(trial) for trial in trials]
    seconds = [report.wall_s for report in reports if report is not None]
    reached = hypervolume(trials, largest_drop=largest_drop)
    if not gains or not seconds or reached <= 0:
        return None
    share = sum(gains) / (REFERENCE_RATIO * largest_drop) / reached
    return share / (len(gains) * median(seconds) / 60)
