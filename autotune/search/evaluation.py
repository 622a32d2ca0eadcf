"""The spine: what happens to one candidate.

    proposal ─▶ trial ─▶ worker: compress, accuracy ─▶ artifact ─▶ device: latency ─▶ outcome

Every arrow is a row before the next one starts, so that a restart takes a trial up where it
was left. A candidate that fails is a trial with an outcome and a reason, never an exception.
Accuracy is raced against a limit, so that a hopeless candidate costs few samples; baselines
and whatever is on the front get all of them, and a confirmation all of the held-out ones.
Candidates are proposed by `planner.py` and `sampler.py`; `tuning.py` decides how many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autotune.compression.racing import Race
from autotune.errors import DiskFull
from autotune.search.fleet import Fleet, MeasurementOrder, QuietWindow
from autotune.search.front import REFERENCE_DROP, counts_size, non_dominated
from autotune.search.planner import Proposal
from autotune.search.workers import Built, Call, CallFailed, WorkerPool
from autotune.spec import MeasurementSpec
from device_agents.protocol import ArtifactReference, MeasurementPlan, Outcome
from search_spaces import RuntimeOptions
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactStoreFull, DuplicateTrial
from storage.records import (
    DeviceRecord,
    JobRecord,
    MeasurementRecord,
    TrialOutcome,
    TrialRecord,
    TrialState,
)
from storage.repository import Repository

_FAILED_AT = {
    "compression": TrialOutcome.COMPRESSION_FAILED,
    "accuracy": TrialOutcome.ACCURACY_FAILED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything that evaluating a candidate of one job needs.

    `job` carries the calibrated reference latency once the FP32 baseline is measured;
    `reference` is the FP32 model, pinned with its runtime options for the whole job. `race`
    is what candidates other than baselines race against; None evaluates all on all samples.
    """

    job: JobRecord
    device: DeviceRecord
    reference: ArtifactReference
    reference_runtime: RuntimeOptions
    settings: MeasurementSpec
    seed: int
    repository: Repository
    artifacts: ArtifactStore
    pool: WorkerPool
    fleet: Fleet
    window: QuietWindow
    should_stop: Callable[[], bool]
    on_finished: Callable[[TrialRecord], None]
    race: Race | None = None

    def open_trials(self, proposals: Sequence[Proposal]) -> list[TrialRecord]:
        """A trial for each proposal that is new to the job; known candidates are dropped."""
        trials = []
        for proposal in proposals:
            try:
                trials.append(
                    self.repository.add_trial(
                        self.job.id, proposal.candidate, proposed_by=proposal.proposed_by
                    )
                )
            except DuplicateTrial:
                continue
        return trials

    def run(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Evaluate the trials to their ends; returns them finished, in the given order.

        Raises:
            Stopped: the user or the service asked to stop; unfinished trials stay open.
            DeviceAway: the device went offline; unfinished trials stay open.
            DiskFull: the artifact store has no room; unfinished trials stay open.
        """
        for trial in self._compress(trials):
            if trial.state is not TrialState.FINISHED:
                self._measure(trial)
        self._complete_front()
        return [self.repository.get_trial(trial.id) for trial in trials]

    def confirm(self, trial: TrialRecord) -> TrialRecord:
        """Measure an `OK` trial again: a fresh process, a narrower interval, held-out data.

        Returns the trial with what could be confirmed; a measurement that did not succeed or
        was not steady leaves `confirmed_latency` None.
        """
        artifact = self._artifact_of(trial)
        if _has_raced(trial):
            (trial,) = self._complete([trial])
            if trial.outcome is not TrialOutcome.OK:
                return trial
        if trial.held_out_accuracy is None:
            with self.window.computing():
                calls = [Call(method="held_out", arguments=(self.artifacts.read(artifact.sha256),))]
                ((_, report),) = list(self.pool.run(calls, should_stop=self.should_stop))
            if not isinstance(report, CallFailed):
                trial = self.repository.update_trial(trial.id, held_out_accuracy=report)
        if trial.confirmed_latency is None:
            record = self._order(trial, artifact, kind="confirmation")
            if record.outcome is Outcome.OK and record.report and record.report.is_steady:
                trial = self.repository.update_trial(trial.id, confirmed_latency=record.report)
        return trial

    def _compress(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Build artifacts and their accuracy on the workers, all cores at once."""
        built = list(trials)
        todo = [i for i, trial in enumerate(trials) if trial.accuracy is None]
        calls = [
            Call(method="build", arguments=(trials[i].candidate, self._race_of(trials[i])))
            for i in todo
        ]
        with self.window.computing():
            for position, result in self.pool.run(calls, should_stop=self.should_stop):
                index = todo[position]
                built[index] = self._keep(trials[index], result)
        return built

    def _race_of(self, trial: TrialRecord) -> Race | None:
        """Everything is compared with the baselines, so they see every sample."""
        return None if trial.proposed_by == "baseline" else self.race

    def _complete_front(self) -> None:
        """Show front members that raced every sample, until nothing on the front has raced."""
        while raced := [
            trial
            for trial in non_dominated(
                self.repository.list_trials(self.job.id), by_size=counts_size(self.job.spec)
            )
            if _has_raced(trial)
        ]:
            self._complete(raced)

    def _complete(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Evaluate finished trials on all of the search data."""
        completed = list(trials)
        calls = [
            Call(
                method="search_accuracy",
                arguments=(self.artifacts.read(self._artifact_of(trial).sha256),),
            )
            for trial in trials
        ]
        with self.window.computing():
            for index, report in self.pool.run(calls, should_stop=self.should_stop):
                changes: dict[str, object] = {"accuracy": report}
                if isinstance(report, CallFailed):
                    changes = {"outcome": TrialOutcome.ACCURACY_FAILED, "reason": report.error}
                completed[index] = self.repository.update_trial(trials[index].id, **changes)
        return completed

    def _keep(self, trial: TrialRecord, result: Built | CallFailed) -> TrialRecord:
        if isinstance(result, CallFailed):
            if isinstance(result.exception, DiskFull):
                raise result.exception
            return self._finish(trial, TrialOutcome.COMPRESSION_FAILED, result.error)
        if result.artifact is None:
            return self._finish(trial, _FAILED_AT[result.failed_at or ""], result.failure)
        try:
            stored = self.artifacts.put(result.artifact)
        except ArtifactStoreFull as error:
            raise DiskFull(str(error)) from error
        self.repository.record_artifact(stored.sha256, stored.size_bytes, "candidate")
        return self.repository.update_trial(
            trial.id,
            state=TrialState.RUNNING,
            artifact_sha256=stored.sha256,
            artifact_size_bytes=stored.size_bytes,
            compression=result.compression,
            accuracy=result.accuracy,
        )

    def _measure(self, trial: TrialRecord) -> TrialRecord:
        record = self._order(trial, self._artifact_of(trial), kind="screening")
        if record.outcome is Outcome.OK:
            return self._finish(trial, TrialOutcome.OK, None, latency=record.report)
        outcome = record.outcome.value if record.outcome else "no outcome"
        return self._finish(
            trial,
            TrialOutcome.MEASUREMENT_FAILED,
            f"{outcome}: {record.reason or 'the agent gave no reason'}",
            latency=record.report,
        )

    def _order(
        self, trial: TrialRecord, artifact: ArtifactReference, *, kind: str
    ) -> MeasurementRecord:
        return self.fleet.measure(
            self.job,
            self.device,
            MeasurementOrder(
                trial_id=trial.id,
                artifact=artifact,
                reference=self.reference,
                runtime=trial.candidate.runtime,
                reference_runtime=self.reference_runtime,
                plan=measurement_plan(
                    self.settings,
                    confirmation=kind == "confirmation",
                    reference_latency_ns=self.job.reference_latency_ns,
                    seed=self.seed + trial.number,
                ),
            ),
            should_stop=self.should_stop,
        )

    def _finish(
        self, trial: TrialRecord, outcome: TrialOutcome, reason: str | None, **figures: object
    ) -> TrialRecord:
        finished = self.repository.update_trial(
            trial.id, state=TrialState.FINISHED, outcome=outcome, reason=reason, **figures
        )
        self.on_finished(finished)
        return finished

    @staticmethod
    def _artifact_of(trial: TrialRecord) -> ArtifactReference:
        if trial.artifact_sha256 is None or trial.artifact_size_bytes is None:
            raise ValueError(f"trial {trial.number} has no artifact yet")
        return ArtifactReference(sha256=trial.artifact_sha256, size_bytes=trial.artifact_size_bytes)


def race_of(*, max_accuracy_drop: float | None, seed: int) -> Race:
    """What the candidates of a job race against.

    With a drop that the job allows, a candidate is done once it certainly keeps or exceeds it:
    the fastest of those that keep it wins. Without one the most accurate wins, so that only
    the hopeless end early: those whose drop lies outside the front's reference box.
    """
    return Race(
        limit=REFERENCE_DROP if max_accuracy_drop is None else max_accuracy_drop,
        ends_within=max_accuracy_drop is not None,
        seed=seed,
    )


def _has_raced(trial: TrialRecord) -> bool:
    """Its accuracy was not evaluated on all samples."""
    return trial.accuracy is not None and trial.accuracy.stopped_early is not None


def measurement_plan(
    settings: MeasurementSpec,
    *,
    confirmation: bool,
    reference_latency_ns: float | None,
    seed: int,
) -> MeasurementPlan:
    """The job's settings as the plan of one measurement."""
    return MeasurementPlan(
        kind="confirmation" if confirmation else "screening",
        target_half_width=settings.confirmation_half_width
        if confirmation
        else settings.target_half_width,
        time_cap_s=settings.confirmation_time_cap_s if confirmation else settings.time_cap_s,
        timeout_s=settings.timeout_s,
        reference_latency_ns=reference_latency_ns,
        seed=seed,
    )
