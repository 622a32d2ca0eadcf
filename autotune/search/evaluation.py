"""The spine: what happens to one candidate.

    proposal ─▶ trial ─▶ worker: compress, accuracy ─▶ artifact ─▶ device: latency ─▶ outcome

Every arrow is a row before the next one starts, so that a restart takes a trial up where it
was left. A candidate that fails is a trial with an outcome and a reason, never an exception.
Accuracy is raced, so that a candidate costs as few samples as tell its drop; FP32 and uniform INT8
get all of them (`races.py`), before confirming whatever is on the front too, and a confirmation
all held-out ones.
A job on several devices has an artifact with its accuracy per kernel class, and a latency per
device; `targets.py` says how they are seen as one.
Candidates are proposed by `planner.py` and `sampler.py`; `tuning.py` decides how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.compression.kernels import kernels_of
from autotune.compression.layer_times import by_group
from autotune.compression.profiled_precisions import seen_by_device
from autotune.compression.racing import Race
from autotune.errors import DiskFull
from autotune.search.best_baseline import BASELINE
from autotune.search.compression_worker import Built
from autotune.search.confirmation import contradicted
from autotune.search.feasibility import limits_of
from autotune.search.fleet import Fleet, MeasurementOrder, QuietWindow
from autotune.search.front import further_objectives, non_dominated
from autotune.search.planner import Proposal
from autotune.search.races import Races
from autotune.search.targets import target_on, views
from autotune.search.workers import Call, CallFailed, WorkerPool
from autotune.spec import MeasurementSpec
from device_agents.protocol import (
    ArtifactReference,
    LatencyReport,
    MeasurementPlan,
    Outcome,
    Quantile,
)
from search_spaces import RuntimeOptions
from storage.artifacts import ArtifactFile, ArtifactStore
from storage.errors import ArtifactStoreFull, DuplicateTrial
from storage.records import (
    DeviceRecord,
    JobRecord,
    MeasurementRecord,
    TargetFigures,
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

    `job` carries the calibrated reference latency of each target once the FP32 baseline is
    measured; `devices` are these targets, the primary one first. `reference` is the FP32 model,
    pinned with its runtime options for the whole job. `races` say what candidates race against;
    None evaluates all on all samples.
    """

    job: JobRecord
    devices: tuple[DeviceRecord, ...]
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
    races: Races | None = None

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
            DeviceAway: a device went offline; unfinished trials stay open.
            DiskFull: the artifact store has no room; unfinished trials stay open.
        """
        self._measure(self._compress(trials))
        return [self.repository.get_trial(trial.id) for trial in trials]

    def confirm(self, trial: TrialRecord) -> TrialRecord:
        """Measure an `OK` trial again: a fresh process, a narrower interval, held-out data.

        On every target where it is `OK`. Returns the trial with what could be confirmed; where
        the measurement did not succeed or was not steady, or held-out data contradict the
        accuracy that the search saw, the trial ends as `UNCONFIRMED` and leaves the front. A
        baseline stays: everything is compared with it.
        """
        if _has_raced(trial):
            self._complete([trial])
            trial = self.repository.get_trial(trial.id)
        self._hold_out(trial)
        trial = self.repository.get_trial(trial.id)
        devices = self.unconfirmed_on(trial)
        orders = [(device, self._order(trial, device, kind="confirmation")) for device in devices]
        for index, record in self.fleet.measure_all(self.job, orders, should_stop=self.should_stop):
            if record.outcome is Outcome.OK and record.report and record.report.is_steady:
                there = trial.on(devices[index].id)
                report = self._by_group(record.report, there)
                executed = self._executed(there, report)
                self._note(trial, devices[index], confirmed_latency=report, **executed)
            elif trial.proposed_by != BASELINE:
                reason = f"it could not be measured again: {_ended(record)['reason'] or 'unsteady'}"
                self._note(trial, devices[index], outcome=TrialOutcome.UNCONFIRMED, reason=reason)
        return self.repository.get_trial(trial.id)

    def unconfirmed_on(self, trial: TrialRecord) -> list[DeviceRecord]:
        """The devices on which the trial is `OK` and not confirmed."""
        return [
            device
            for device in self.devices
            if trial.on(device.id).outcome is TrialOutcome.OK
            and trial.on(device.id).confirmed_latency is None
        ]

    def _compress(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Build artifacts and their accuracy on the workers, all cores at once.

        One artifact for each kernel class among the devices: its accuracy holds there alone.
        """
        todo = [
            (trial, kernels)
            for trial in trials
            for kernels, (device, *_) in self._by_kernels.items()
            if trial.on(device.id).accuracy is None and trial.on(device.id).outcome is None
        ]
        if todo:
            self._learn_again()
        calls = [
            Call(
                method="build", arguments=(trial.candidate, self._race_of(trial, kernels), kernels)
            )
            for trial, kernels in todo
        ]
        with self.window.computing():
            for position, result in self.pool.run(calls, should_stop=self.should_stop):
                trial, kernels = todo[position]
                self._keep(trial, self._by_kernels[kernels], result)
                if self.races is not None and trial.candidate == self.races.uniform:
                    self.races.learn(kernels, result.shown if isinstance(result, Built) else None)
        return [self.repository.get_trial(trial.id) for trial in trials]

    def _measure(self, trials: Sequence[TrialRecord]) -> None:
        """The latency of each trial on each device; a trial ends with its last measurement."""
        todo = [
            (trial, device)
            for trial in trials
            for device in self.devices
            if trial.on(device.id).outcome is None
        ]
        left = Counter(trial.id for trial, _ in todo)
        for trial in trials:
            if not left[trial.id] and trial.state is not TrialState.FINISHED:
                self._finish(trial)
        orders = [(device, self._order(trial, device, kind="screening")) for trial, device in todo]
        for index, record in self.fleet.measure_all(self.job, orders, should_stop=self.should_stop):
            trial, device = todo[index]
            left[trial.id] -= 1
            ended = _ended(record)
            if record.report is not None:
                ended["latency"] = report = self._by_group(record.report, trial.on(device.id))
                ended |= self._executed(trial.on(device.id), report)
            if left[trial.id]:
                self._note(trial, device, **ended)
            else:
                self._finish(trial, device, **ended)

    def _race_of(self, trial: TrialRecord, kernels: str) -> Race | None:
        return None if self.races is None else self.races.of(trial.candidate, kernels)

    def _learn_again(self) -> None:
        """What an interrupted run of the job had learned for its races."""
        if self.races is None:
            return
        known = self.races.has_learned
        lacking = [devices for name, devices in self._by_kernels.items() if not known(name)]
        if not lacking:
            return
        todo = [
            (trial, devices)
            for trial in self.repository.list_trials(self.job.id)
            for devices in lacking
            if trial.candidate == self.races.uniform
            and trial.on(devices[0].id).accuracy is not None
        ]
        for (_, devices), shown in self._on_artifacts("shown", todo):
            kernels = kernels_of(devices[0].description).name
            self.races.learn(kernels, None if isinstance(shown, CallFailed) else shown)

    def complete_front(self) -> None:
        """Show front members that raced every sample, until nothing on a front has raced.

        Raises what `run` raises, but for `DeviceAway`.
        """
        while True:
            trials = self.repository.list_trials(self.job.id)
            members = {
                trial.id
                for view in views(self.job, trials)
                for trial in non_dominated(view.trials, beside=further_objectives(self.job.spec))
            }
            raced = [trial for trial in trials if trial.id in members and _has_raced(trial)]
            if not raced:
                return
            self._complete(raced)

    def _complete(self, trials: Sequence[TrialRecord]) -> None:
        """Evaluate artifacts of finished trials that raced on all of the search data."""
        todo = [
            (trial, devices)
            for trial in trials
            for devices in self._by_kernels.values()
            if _stopped_early(trial.on(devices[0].id))
        ]
        for (trial, devices), report in self._on_artifacts("search_accuracy", todo):
            changes: dict[str, Any] = {"accuracy": report}
            if isinstance(report, CallFailed):
                changes = {"outcome": TrialOutcome.ACCURACY_FAILED, "reason": report.error}
            self._note(trial, *devices, **changes)

    def _hold_out(self, trial: TrialRecord) -> None:
        """The accuracy of a trial's artifacts on data that the search never saw."""
        todo = [
            (trial, devices)
            for devices in self._by_kernels.values()
            if any(trial.on(device.id).outcome is TrialOutcome.OK for device in devices)
            and trial.on(devices[0].id).held_out_accuracy is None
        ]
        for (_, devices), report in self._on_artifacts("held_out", todo):
            if not isinstance(report, CallFailed):
                self._note(trial, *devices, held_out_accuracy=report)
            elif trial.proposed_by != BASELINE:
                reason = f"it could not be judged on held-out data: {report.error}"
                self._note(trial, *devices, outcome=TrialOutcome.UNCONFIRMED, reason=reason)
        judged = self.repository.get_trial(trial.id)
        for device in self.unconfirmed_on(judged):
            why = contradicted(judged.on(device.id))
            if why is not None and trial.proposed_by != BASELINE:
                self._note(trial, device, outcome=TrialOutcome.UNCONFIRMED, reason=why)

    def _on_artifacts(self, method: str, todo: Sequence[_Judged]) -> Iterator[tuple[_Judged, Any]]:
        """What the workers make of each trial's artifact for those devices, or a `CallFailed`."""
        calls = [
            Call(
                method=method,
                arguments=(
                    ArtifactFile(
                        store=self.artifacts, sha256=_artifact_of(trial.on(devices[0].id)).sha256
                    ),
                    trial.candidate.runtime.runtime,
                ),
            )
            for trial, devices in todo
        ]
        if not calls:
            return
        with self.window.computing():
            for index, found in self.pool.run(calls, should_stop=self.should_stop):
                yield todo[index], found

    def _keep(
        self, trial: TrialRecord, devices: Sequence[DeviceRecord], result: Built | CallFailed
    ) -> None:
        """What a worker made of a trial, for the devices whose kernels it is for."""
        if isinstance(result, CallFailed):
            if isinstance(result.exception, DiskFull):
                raise result.exception
            outcome, reason = TrialOutcome.COMPRESSION_FAILED, result.error
            self._note(trial, *devices, outcome=outcome, reason=reason)
            return
        if result.artifact is None:
            outcome = _FAILED_AT[result.failed_at or ""]
            self._note(trial, *devices, outcome=outcome, reason=result.failure)
            return
        try:
            stored = self.artifacts.put(result.artifact)
        except ArtifactStoreFull as error:
            raise DiskFull(str(error)) from error
        self.repository.record_artifact(stored.sha256, stored.size_bytes, "candidate")
        self._note(
            trial,
            *devices,
            artifact_sha256=stored.sha256,
            artifact_size_bytes=stored.size_bytes,
            compression=result.compression,
            accuracy=result.accuracy,
        )

    def _order(self, trial: TrialRecord, device: DeviceRecord, *, kind: str) -> MeasurementOrder:
        target = target_on(self.job, device.id)
        return MeasurementOrder(
            trial_id=trial.id,
            artifact=_artifact_of(trial.on(device.id)),
            reference=self.reference,
            runtime=trial.candidate.runtime,
            reference_runtime=self.reference_runtime,
            plan=measurement_plan(
                self.settings,
                confirmation=kind == "confirmation",
                reference_latency_ns=target.reference_latency_ns,
                quantile=limits_of(self.job).at,
                seed=self.seed + trial.number,
            ),
            # The search weighs groups by the baselines' profiles, people look at the winner's.
            profile=kind == "confirmation" or trial.proposed_by == "baseline",
        )

    def _by_group(self, report: LatencyReport, trial: TrialRecord) -> LatencyReport:
        """The report with the layer groups of its profile's kernels; itself without a profile."""
        if self.job.inventory is None:
            return report
        digest = _artifact_of(trial).sha256
        return by_group(report, lambda: self.artifacts.read(digest), self.job.inventory.groups)

    def _executed(self, trial: TrialRecord, report: LatencyReport) -> dict[str, Any]:
        """The trial's `compression` with what the device's profile tells of it; else nothing."""
        if report.profile is None or self.job.inventory is None or trial.compression is None:
            return {}
        entries, groups = trial.compression.get("groups", ()), self.job.inventory.groups
        found = seen_by_device(entries, report.profile, groups)
        return {"compression": {**trial.compression, "groups": found}}

    def _note(self, trial: TrialRecord, *devices: DeviceRecord, **figures: Any) -> None:
        """Keep figures of a trial that hold on those devices; one that has some is under way."""
        for device in devices:
            if device.id != self.devices[0].id:
                self.repository.update_trial(trial.id, on=device.id, **figures)
            elif trial.state is TrialState.PROPOSED:
                self.repository.update_trial(trial.id, state=TrialState.RUNNING, **figures)
            else:
                self.repository.update_trial(trial.id, **figures)

    def _finish(
        self, trial: TrialRecord, device: DeviceRecord | None = None, **figures: Any
    ) -> None:
        """End a trial; with the figures of the device that it was measured on last."""
        if device is not None and device.id != self.devices[0].id:
            self._note(trial, device, **figures)
            figures = {}
        finished = self.repository.update_trial(trial.id, state=TrialState.FINISHED, **figures)
        self.on_finished(finished)

    @property
    def _by_kernels(self) -> dict[str, list[DeviceRecord]]:
        """The devices by the kernel class that artifacts are written for, the primary's first."""
        found: dict[str, list[DeviceRecord]] = {}
        for device in self.devices:
            found.setdefault(kernels_of(device.description).name, []).append(device)
        return found


_Judged = tuple[TrialRecord, list[DeviceRecord]]


def _artifact_of(trial: TrialRecord) -> ArtifactReference:
    if trial.artifact_sha256 is None or trial.artifact_size_bytes is None:
        raise ValueError(f"trial {trial.number} has no artifact yet")
    return ArtifactReference(sha256=trial.artifact_sha256, size_bytes=trial.artifact_size_bytes)


def _ended(record: MeasurementRecord) -> dict[str, Any]:
    """How a measurement ends its trial on that device."""
    if record.outcome is Outcome.OK:
        return {"outcome": TrialOutcome.OK, "reason": None, "latency": record.report}
    outcome = record.outcome.value if record.outcome else "no outcome"
    return {
        "outcome": TrialOutcome.MEASUREMENT_FAILED,
        "reason": f"{outcome}: {record.reason or 'the agent gave no reason'}",
        "latency": record.report,
    }


def _has_raced(trial: TrialRecord) -> bool:
    """An accuracy of it was not evaluated on all samples."""
    return _stopped_early(trial) or any(map(_stopped_early, trial.further))


def _stopped_early(seen: TrialRecord | TargetFigures) -> bool:
    return seen.accuracy is not None and seen.accuracy.stopped_early is not None


def measurement_plan(
    settings: MeasurementSpec,
    *,
    confirmation: bool,
    reference_latency_ns: float | None,
    seed: int,
    quantile: Quantile = "p50",
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
        is_calibration=reference_latency_ns is None,
        quantile=quantile,
        seed=seed,
    )
