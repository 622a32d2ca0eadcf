"""One job from its first phase to its answer.

    load ─▶ wait for the device ─▶ baselines ─▶ sensitivity ─▶ prune ─▶ search ─▶ confirm

Owns the order of the phases and when to stop. Each phase reads what the database already
holds and does only what is missing, so that a job goes on after a restart without losing or
repeating a finished trial. What happens to one candidate is `evaluation.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from autotune.compression.device_kernels import device_kernels
from autotune.errors import AutotuneError, DiskFull, JobNotReady
from autotune.search import planner
from autotune.search.canary import check_pools, references
from autotune.search.compression_worker import Inspection
from autotune.search.conclusion import (
    CANCELLED_BY_HAND,
    all_limits,
    baseline_trials,
    build_space,
    compared_with,
    conclude_views,
    news_of,
    noise_in_words,
    nothing_ranks,
)
from autotune.search.confirmation import (
    MOST_CONFIRMED,
    next_to_confirm,
    reopen_fp32,
    reopen_unconfirmed,
)
from autotune.search.earlier_jobs import take_over, teach
from autotune.search.evaluation import Evaluation
from autotune.search.explanation import news_of_model
from autotune.search.failures import as_defect, in_users_terms
from autotune.search.feasibility import limits_of, require_sensors
from autotune.search.front import REFERENCE_DROP, Answer, further_objectives, non_dominated
from autotune.search.host import Host
from autotune.search.interruption import DeviceAway, Stopped
from autotune.search.planner import Proposal
from autotune.search.priors import NOTHING
from autotune.search.proposals import BATCH
from autotune.search.pruned_bases import BASES_SHARE, Ladder, climb, earlier, make_bases
from autotune.search.races import races_of
from autotune.search.runtimes import contending, require_judges, require_offered
from autotune.search.sensitivity import SensitivityPhase, damage, limit_s, prune_damage
from autotune.search.stopping import Stopping
from autotune.search.targets import (
    View,
    as_searched,
    calibrated,
    chosen,
    require_different,
    views,
)
from autotune.search.workers import Call, CallFailed, WorkerPool
from autotune.spec import name_uploads, parse_job, resolve_uploads
from device_agents.protocol import ArtifactReference
from search_spaces import LayerInventory, SearchSpace
from storage.errors import StorageError
from storage.records import (
    DeviceRecord,
    JobRecord,
    JobState,
    TrialRecord,
    TrialState,
)
from storage.sensitivity import Sensitivity

if TYPE_CHECKING:
    from autotune.compression.data import DataSplits


_log = logging.getLogger(__name__)


class Tuning:
    """The phases of one job; `run` does those that are left."""

    def __init__(self, host: Host, job: JobRecord, devices: tuple[DeviceRecord, ...]) -> None:
        self._host = host
        self._repository = host.repository
        self._job = job
        self._devices = devices
        self._spec = parse_job(job.spec)
        self._started = job.started_at or datetime.now(UTC)
        self._stopped_because = ""
        self._tried: set[str] = set()
        self._earlier = NOTHING
        limit = self._spec.max_accuracy_drop
        self._stopping = Stopping(self._spec.search, self._started, max_accuracy_drop=limit)
        self._pool: WorkerPool | None = None

    def run(self) -> JobRecord:
        """Do what is left of the job; returns it final, or waiting for its device.

        Raises:
            Stopped: the service is going down; the job goes on after the next start.
        """
        targets = chosen(self._job, self._devices)
        self._move(JobState.RUNNING, phase="loading", started_at=self._started, **targets)
        # What an interrupted run left with the device would be measured while workers compute.
        self._repository.cancel_measurements(self._job.id)
        try:
            self._spec = resolve_uploads(self._spec, self._host.artifacts.verified_path)
            self._run_phases()
            return self._end(JobState.FINISHED)
        except Stopped:
            if not self._is_cancelled():
                raise
            self._stopped_because = CANCELLED_BY_HAND
            return self._end(JobState.CANCELLED)
        except DeviceAway as away:
            return self._move(JobState.WAITING_FOR_DEVICE, str(away))
        except (AutotuneError, StorageError) as error:
            known = in_users_terms(error)
            if isinstance(known, DiskFull):
                self._host.make_room()
            reason = name_uploads(str(error), parse_job(self._job.spec), self._spec)
            return self._end(JobState.FAILED, reason=reason, error=type(known).__name__)
        except Exception as error:  # noqa: BLE001 - what was measured is an answer all the same
            _log.exception("job %s failed", self._job.id)
            return self._end(JobState.FAILED, reason=as_defect(error), error=type(error).__name__)
        finally:
            if self._pool is not None:
                self._pool.close()

    def _run_phases(self) -> None:
        require_different(self._devices, self._spec.targets)
        # Before anything is loaded: it takes seconds, and these answers none.
        require_judges(require_offered(self._spec.search, self._devices))
        require_sensors(self._job.spec, self._devices)  # a job of any device has not been asked yet
        inspection = self._inspect(self._load())
        evaluation = self._baselines(inspection)
        if not self._is_over():
            self._earlier = take_over(
                self._repository, self._job, self._spec, self._devices, notice=self._notice
            )
            entries = self._sensitivity(inspection.inventory)
            bases = self._prune(inspection.inventory, entries)
            self._search(evaluation, inspection.inventory, bases, damage(entries))
        self._confirm(evaluation)
        while self._check_pools(evaluation):
            self._confirm(evaluation)

    # The phases, in order.

    def _load(self) -> DataSplits:
        from autotune.compression.data import split_data  # torch: only once there is a job

        self._enter("loading")
        return split_data(
            self._spec.data, seed=self._spec.seed, trust_job_code=self._host.trust_job_code
        )

    def _inspect(self, splits: DataSplits) -> Inspection:
        with self._host.window.computing():
            described = [device.description for device in self._devices]
            self._pool = self._host.make_pool(self._spec, splits, described)
            inspection: Inspection = self._call("inspect")
            self._workers.share_source()
        inventory = inspection.inventory
        kernels = [device_kernels(device.description) for device in self._devices]
        if self._job.inventory is None:
            limited = all_limits(self._spec, inventory, splits, kernels=kernels)
            for notice in (*inspection.notices, *limited):
                self._notice(notice)
        self._job = self._update(
            inventory=inventory,
            space=build_space(self._spec, inventory, kernels=kernels),
            source=inspection.source(self._store_reference(inspection.fp32)),
        )
        return inspection

    def _baselines(self, inspection: Inspection) -> Evaluation:
        self._enter("baselines")
        reference = self._store_reference(inspection.fp32)
        evaluation = self._evaluation(reference)
        self._check_pools(evaluation)
        evaluation = replace(evaluation, job=self._job)
        reopen_fp32(self._repository, baseline_trials(self._space, self._trials())[0])
        reopen_unconfirmed(self._repository, self._job)
        first, *others = planner.baselines(self._space)
        fp32 = self._evaluate(evaluation, [first])
        evaluation = self._calibrate(evaluation, fp32[0])
        self._evaluate(evaluation, others)
        # What a restart left open comes before anything new.
        evaluation.run([t for t in self._stored_trials() if t.state is not TrialState.FINISHED])
        return evaluation

    def _sensitivity(self, inventory: LayerInventory) -> tuple[Sensitivity, ...]:
        """The damage of each choice alone; what an earlier run stored is not measured again."""
        self._enter("sensitivity")
        phase = SensitivityPhase(
            space=self._space,
            inventory=inventory,
            known=self._job.sensitivity or self._earlier.sensitivity,
            store=self._keep_sensitivity,
            notice=self._notice,
            limit_s=limit_s(self._spec.search, self._trials()),
        )
        with self._host.window.computing():
            return phase.run(self._workers, should_stop=self._must_stop, with_pruning=self._prunes)

    def _keep_sensitivity(self, entries: tuple[Sensitivity, ...]) -> None:
        self._job = self._update(sensitivity=entries)

    def _prune(
        self, inventory: LayerInventory, entries: Sequence[Sensitivity]
    ) -> list[dict[str, float]]:
        """The pruned bases of this job that could be made, the most promising first."""
        if not self._prunes:
            return []
        self._enter("pruning")
        ladder = Ladder(space=self._space, inventory=inventory, damage=prune_damage(entries))
        found = climb(
            ladder,
            self._make_bases,
            limit=self._spec.max_accuracy_drop,
            at_most=self._spec.search.max_pruned_bases,
            worth=REFERENCE_DROP,
            may_go_on=lambda: self._stopping.time_spent < BASES_SHARE,
        )
        used = earlier([*self._trials(), *self._earlier.front], but=found)
        made = self._make_bases(used) if used else []
        return found + [base for base, lost in zip(used, made, strict=True) if lost is not None]

    def _make_bases(self, bases: Sequence[Mapping[str, float]]) -> list[float | None]:
        with self._host.window.computing():
            return make_bases(
                bases,
                run=lambda calls: self._workers.run(calls, should_stop=self._must_stop),
                notice=self._notice,
                on_made=lambda base: self._event("base_prepared", {"base": base}),
            )

    @property
    def _prunes(self) -> bool:
        return bool(self._space.prune_ratios) and self._spec.search.max_pruned_bases > 0

    def _search(
        self,
        evaluation: Evaluation,
        inventory: LayerInventory,
        bases: list[dict[str, float]],
        damage: Mapping[tuple[str, str], float],
    ) -> None:
        self._enter("search")
        proposals = self._host.make_proposals(
            space=contending(self._space, self._trials()),
            inventory=inventory,
            bases=bases,
            damage=damage,
            seed=self._spec.seed,
            limits=limits_of(self._job),
            max_accuracy_drop=self._spec.max_accuracy_drop,
            beside=further_objectives(self._job.spec),
            earlier=self._earlier,
            on_fitted=lambda fitted: self._event("model", news_of_model(fitted)),
        )
        trials = self._trials()
        budget = self._spec.search.trials
        due = proposals.warm_trials_left(trials, budget=budget)
        queue = proposals.warm_start(trials)[:due]
        while not self._is_over():
            self._check_pools(evaluation)
            trials = self._trials()
            size = max(BATCH, self._host.fleet.capacity(self._job, self._devices))
            batch = queue[:size] or proposals.refine(trials, budget=budget, size=size)
            queue = queue[size:]
            idle = self._stopping.is_idle(batch, trials)
            if idle or not batch:
                self._stopped_because = idle or "nothing new is left to propose"
                break
            self._evaluate(evaluation, batch[: self._stopping.trials_left(trials)])
            teach(self._repository, self._job, bases=bases, taught=self._earlier.taught)

    def _confirm(self, evaluation: Evaluation) -> None:
        """Confirm baselines, winner and front; what does not confirm gives way to the next."""
        self._enter("confirming")
        evaluation.complete_front()
        while left := self._untried(compared_with(self._job, self._stored_trials())):
            self._confirm_trial(evaluation, left[0])
        n_before = len(self._tried)
        while (due := self._next_to_confirm()) and len(self._tried) - n_before < MOST_CONFIRMED:
            self._confirm_trial(evaluation, due)
        if self._spec.rounding.adaround:
            self._learn_rounding(evaluation)

    def _untried(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        return [trial for trial in trials if trial.id not in self._tried]

    def _next_to_confirm(self) -> TrialRecord | None:
        winners = [found.winner for _, found in self._answers() if found is not None]
        return next_to_confirm(winners, self._front(self._trials()), tried=self._tried)

    def _learn_rounding(self, evaluation: Evaluation) -> None:
        """Round the winner's weights anew; `front.is_no_worse` says whether that replaces it."""
        found = self._answer()
        if found is None or found.winner.candidate.rounding is not None:
            return
        winner = found.winner
        precisions = winner.candidate.precisions.values()
        if not any(p.weight_bits == 8 and not p.is_weight_only for p in precisions):
            self._notice(f"trial {winner.number} has no 8-bit layers for AdaRound to round")
            return
        learned = replace(winner.candidate, rounding="adaround")
        proposal = Proposal(candidate=learned, proposed_by="adaround")
        (trial,) = self._evaluate(evaluation, [proposal])
        self._confirm_trial(evaluation, trial)
        found = self._answer()
        if found is None or found.winner.id != trial.id:
            reason = trial.reason or "it is worse on one of the two data sets, or slower"
            self._notice(f"AdaRound leaves trial {winner.number} the winner: {reason}")

    # What the phases share.

    def _evaluate(self, evaluation: Evaluation, proposals: Sequence[Proposal]) -> list[TrialRecord]:
        """Evaluate what is new and what a restart left open; every trial of the proposals."""
        evaluation.open_trials(proposals)
        digests = {p.candidate.digest for p in proposals}
        asked = [t for t in self._stored_trials() if t.candidate.digest in digests]
        evaluation.run([t for t in asked if t.state is not TrialState.FINISHED])
        return [self._repository.get_trial(t.id) for t in asked]

    def _confirm_trial(self, evaluation: Evaluation, trial: TrialRecord) -> None:
        current = self._repository.get_trial(trial.id)
        due = evaluation.unconfirmed_on(current)
        self._tried.add(trial.id)
        if not due:
            return
        confirmed = evaluation.confirm(current)
        missing = [d.name for d in due if confirmed.on(d.id).confirmed_latency is None]
        if missing:
            # It could not be measured again: it stays a trial but cannot be the answer there.
            where = f" on {', '.join(missing)}" if len(self._devices) > 1 else ""
            why = f": {confirmed.reason}" if confirmed.reason else ""
            self._notice(f"trial {trial.number} is not confirmed{where} and cannot win{why}")
        if len(missing) < len(due):
            self._event("trial_confirmed", {"trial": trial.id, "number": trial.number})

    def _store_reference(self, fp32: bytes) -> ArtifactReference:
        stored = self._host.artifacts.put(fp32)
        self._repository.record_artifact(stored.sha256, stored.size_bytes, "reference")
        return ArtifactReference(sha256=stored.sha256, size_bytes=stored.size_bytes)

    def _calibrate(self, evaluation: Evaluation, fp32: TrialRecord) -> Evaluation:
        """Pin the reference's own latency on each target; everything later is a ratio times it."""
        is_first = self._job.reference_latency_ns is None
        self._job = self._update(**calibrated(self._job, self._spec, fp32))
        if is_first and fp32.latency is not None:
            self._notice(noise_in_words(fp32.latency))
        return replace(evaluation, job=self._job)

    def _check_pools(self, evaluation: Evaluation) -> bool:
        """Compare the members of the job's pools where that is due; whether one was off.

        What that one did since it was last in line is measured again, on the others.
        """
        check = check_pools(evaluation, notice=self._notice)
        if check.latencies_ns:
            self._job = self._update(**references(self._job, check))
        if check.drained:
            self._tried.clear()
            evaluation.run([t for t in self._stored_trials() if t.state is not TrialState.FINISHED])
        return bool(check.drained)

    def _evaluation(self, reference: ArtifactReference) -> Evaluation:
        return Evaluation(
            job=self._job,
            devices=self._devices,
            reference=reference,
            reference_runtime=self._space.runtimes[0],
            settings=self._spec.measurement,
            seed=self._spec.seed,
            repository=self._repository,
            artifacts=self._host.artifacts,
            pool=self._workers,
            fleet=self._host.fleet,
            window=self._host.window,
            should_stop=self._must_stop,
            on_finished=lambda trial: self._event("trial_finished", news_of(trial)),
            races=races_of(self._spec, self._space),
        )

    def _call(self, method: str, *arguments: Any) -> Any:
        calls = [Call(method=method, arguments=arguments)]
        ((_, result),) = list(self._workers.run(calls, should_stop=self._must_stop))
        if isinstance(result, CallFailed):
            raise result.exception or AutotuneError(result.error)
        return result

    @property
    def _workers(self) -> WorkerPool:
        if self._pool is None:
            raise JobNotReady("the workers are not started yet")
        return self._pool

    @property
    def _space(self) -> SearchSpace:
        if self._job.space is None:
            raise JobNotReady("the search space is not built yet")
        return self._job.space

    def _stored_trials(self) -> list[TrialRecord]:
        return self._repository.list_trials(self._job.id)

    def _trials(self) -> list[TrialRecord]:
        """The trials as the search sees them: on several devices, as the worst one has them."""
        return as_searched(self._job, self._stored_trials())

    def _front(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        return non_dominated(trials, beside=further_objectives(self._job.spec))

    # When to stop.

    def _is_over(self) -> bool:
        if self._must_stop():
            raise Stopped
        spent = self._stopping.is_spent(self._trials())
        self._stopped_because = spent or ""
        return spent is not None

    def _must_stop(self) -> bool:
        return self._host.should_stop() or self._is_cancelled()

    def _is_cancelled(self) -> bool:
        return self._repository.get_job(self._job.id).cancel_requested

    # The answer.

    def _answer(self) -> Answer | None:
        return self._answers()[0][1]

    def _answers(self, *, confirmed_only: bool = False) -> list[tuple[View, Answer | None]]:
        """The answer to the job's question; on several devices then the answer on each."""
        found = []
        for view in views(self._job, self._stored_trials()):
            # What could not be measured again is no answer.
            sure = [t for t in view.trials if t.confirmed_latency or t.id not in self._tried]
            asked = sure or view.trials  # where nothing could be: better than no answer
            confirmed = [t for t in asked if t.confirmed_latency]
            seen = replace(view, trials=confirmed if confirmed_only and confirmed else asked)
            found.append((view, seen.answer(max_accuracy_drop=self._spec.max_accuracy_drop)))
        return found

    def _end(
        self, state: JobState, reason: str | None = None, error: str | None = None
    ) -> JobRecord:
        """Close the job with the best answer there is, whatever ended it."""
        self._repository.cancel_measurements(self._job.id)
        found = self._answers(confirmed_only=True)
        result = conclude_views(self._job, found, stopped_because=self._stopped_because)
        if result is not None and result.verdict == "impossible_budget":
            reason = reason or result.explanation
        elif result is None and state is JobState.FINISHED:
            state, reason = JobState.FAILED, nothing_ranks(self._trials())
        stored = None if result is None else result.model_dump()
        ended = {"phase": state.value, "result": stored, "finished_at": datetime.now(UTC)}
        return self._move(state, reason, error=error, **ended)

    # Telling the user.

    def _update(self, **changes: Any) -> JobRecord:
        return self._repository.update_job(self._job.id, **changes)

    def _move(
        self, state: JobState, reason: str | None = None, error: str | None = None, **changes: Any
    ) -> JobRecord:
        """Change the job's state, and say so."""
        self._job = self._update(state=state, reason=reason, **changes)
        self._event("state", {"state": state.value, "reason": reason, "error": error})
        return self._job

    def _enter(self, phase: str) -> None:
        if self._must_stop():
            raise Stopped
        self._job = self._update(phase=phase)
        self._event("phase", {"phase": phase})

    def _event(self, kind: str, payload: Mapping[str, Any]) -> None:
        self._repository.append_event(self._job.id, kind, payload)

    def _notice(self, message: str) -> None:
        self._event("notice", {"message": message})
