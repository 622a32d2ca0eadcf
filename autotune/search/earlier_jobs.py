"""What a job takes over from earlier ones, and what it leaves to later ones.

Owns which results of another job say something about this one: a latency where the model, the
device and the runtime's version are the same, an accuracy where the data and the recovery are the
same, too. Of a job on another device accuracies and sensitivities hold where the kernel class is
the same, because files are written for it, and sensitivities of pruning anywhere. They are priors:
`landscape.py` fits its models to them beside the job's own trials, and `proposals.py` has the
earlier front measured first. No trial, front or result of this job holds a figure that was not
measured for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from autotune.compression.kernels import kernels_of
from autotune.errors import InvalidJob
from autotune.search.front import latency_of, non_dominated, ranks
from autotune.search.landscape import Encoding, Knowledge
from autotune.search.lessons import lesson
from autotune.search.priors import NOTHING, Earlier
from autotune.search.targets import as_searched
from autotune.spec import JobSpec, parse_job
from search_spaces.errors import InvalidCandidate
from storage.latency_model import LatencyModel
from storage.records import DeviceRecord, JobRecord, TrialRecord
from storage.repository import Repository

AUTO, NONE = "auto", "none"
"""Values of `search.warm_start` that name no job."""

_NOTHING_ELSEWHERE = (
    "it measured on another device, and no accuracy or sensitivity of it holds here: they would "
    "have to be of the same data and recovery"
)


def take_over(
    repository: Repository,
    job: JobRecord,
    spec: JobSpec,
    devices: Sequence[DeviceRecord],
    *,
    notice: Callable[[str], None],
) -> Earlier:
    """What earlier jobs know that this one may begin with, once its baselines are measured.

    Of jobs that nobody named only what was there when the job was created counts, so that a
    restart changes nothing. `notice` is told what is taken over, before anything but the
    baselines was tried.

    Raises:
        NotFound: the job that `search.warm_start` names does not exist.
    """
    own = as_searched(job, repository.list_trials(job.id))
    if any(trial.proposed_by != "baseline" for trial in own):
        notice = _say_nothing
    named = spec.search.warm_start
    if named == NONE:
        return NOTHING
    taught = _taught(repository, job, devices)
    if taught is not None:
        notice(
            f"earlier jobs on {devices[0].name} taught the cost of {len(taught.operators)} kinds "
            f"of layers in {taught.n_trials} trials; the search begins with it"
        )
    others = _others(repository, job, devices) if named == AUTO else [repository.get_job(named)]
    for other in others:
        before = job.created_at if named == AUTO else None
        found, why_not = _results_of(repository, other, job, spec, own, devices, before=before)
        if found is not None:
            notice(_sentence(repository, other, found))
            return replace(found, taught=taught)
        if named != AUTO:
            notice(f"no result of job {other.id} is taken over: {why_not}")
    return Earlier(taught=taught)


def _say_nothing(_: str) -> None:
    pass


def teach(
    repository: Repository,
    job: JobRecord,
    *,
    bases: Sequence[Mapping[str, float]],
    taught: LatencyModel | None,
) -> None:
    """Keep with each device of the job what its trials say about it.

    `bases` are the job's pruned ones; `taught` is what was known of its only device before it.
    """
    if job.space is None or job.inventory is None:
        return
    encoding = Encoding(space=job.space, bases=({}, *bases))
    knowledge = Knowledge(inventory=job.inventory, damage={}, taught=taught)
    trials = repository.list_trials(job.id)
    for target in job.targets:
        there = [trial.on(target.device_id) for trial in trials]
        learnt = lesson(encoding, knowledge, there, taught)
        if learnt is not None:
            repository.knowledge.keep_latency_models(target.device_id, job.id, [learnt])


def _taught(
    repository: Repository, job: JobRecord, devices: Sequence[DeviceRecord]
) -> LatencyModel | None:
    """Of the job's device in its first runtime; nothing for the worst of several devices."""
    if job.space is None or len(devices) != 1:
        return None
    runtime = job.space.runtimes[0]
    versions = _versions(devices[0])
    known = repository.knowledge.latency_models(devices[0].id, before_job=job.id)
    for model in known:
        if model.runtime == runtime and model.runtime_version == versions.get(runtime.runtime):
            return model
    return None


def _others(
    repository: Repository, job: JobRecord, devices: Sequence[DeviceRecord]
) -> list[JobRecord]:
    """Jobs of the same model, newest first; those on other devices come last."""
    same_model = (
        other
        for other in reversed(repository.list_jobs())
        if other.created_at < job.created_at and _same_model(other, job)
    )
    return sorted(same_model, key=lambda other: not _same_devices(other, devices))


def _same_model(one: JobRecord, other: JobRecord) -> bool:
    digests = [j.inventory.model_digest if j.inventory else None for j in (one, other)]
    return digests[0] is not None and digests[0] == digests[1]


def _same_devices(other: JobRecord, devices: Sequence[DeviceRecord]) -> bool:
    return {target.device_id for target in other.targets} == {device.id for device in devices}


def _results_of(
    repository: Repository,
    other: JobRecord,
    job: JobRecord,
    spec: JobSpec,
    own: Sequence[TrialRecord],
    devices: Sequence[DeviceRecord],
    *,
    before: datetime | None,
) -> tuple[Earlier | None, str]:
    """What of another job's holds here, or why nothing does."""
    if other.id == job.id:
        return None, "it is this one"
    if not _same_model(other, job):
        return None, "it is of another model"
    seen = as_searched(other, repository.list_trials(other.id))
    finished = [
        trial
        for trial in seen
        if before is None or (trial.finished_at is not None and trial.finished_at <= before)
    ]
    usable = [trial for trial in finished if _holds(trial, job, devices)]
    is_here = _same_devices(other, devices)
    searched = usable if is_here else finished
    if not any(trial.proposed_by != "baseline" for trial in searched):
        return None, "none of its candidates is in this job's space and runtime version"
    try:
        theirs = parse_job(other.spec)
    except InvalidJob:
        return None, "its job file is of another release"
    found = NOTHING
    if _same_data(theirs, spec, seen, own):
        there = [repository.get_device(target.device_id) for target in other.targets]
        found = _judged(other, usable, _kernels(there), _kernels(devices), theirs, spec)
    if not is_here:
        return (found, "") if found != NOTHING else (None, _NOTHING_ELSEWHERE)
    tried = {trial.candidate.digest for trial in own}
    front = tuple(t for t in non_dominated(usable) if t.candidate.digest not in tried)
    return replace(found, latencies=tuple(usable), front=front), ""


def _judged(
    other: JobRecord,
    usable: Sequence[TrialRecord],
    their_kernels: Sequence[str],
    kernels: Sequence[str],
    theirs: JobSpec,
    spec: JobSpec,
) -> Earlier:
    """The accuracies and sensitivities of another job on the same data that hold here, too."""
    same_recovery = _same_recovery(theirs, spec)
    drops = [t for t in usable if same_recovery or _is_unpruned(t)]
    entries = other.sensitivity if same_recovery else ()
    if kernels[0] != their_kernels[0]:  # precisions were tried in the first device's files
        entries = tuple(e for e in entries if e.precision is None)
    same_files = set(kernels) == set(their_kernels)
    return Earlier(drops=tuple(drops) if same_files else (), sensitivity=entries)


def _kernels(devices: Sequence[DeviceRecord]) -> list[str]:
    return [kernels_of(device.description).name for device in devices]


def _holds(trial: TrialRecord, job: JobRecord, devices: Sequence[DeviceRecord]) -> bool:
    """It ranks, in this space and in today's version of the runtime."""
    latency = latency_of(trial)
    if job.space is None or latency is None or not ranks(trial) or trial.candidate.rounding:
        return False
    name = trial.candidate.runtime.runtime
    if any(_versions(device).get(name) != latency.runtime_version for device in devices):
        return False
    try:
        job.space.require(trial.candidate)
    except InvalidCandidate:
        return False
    return True


def _versions(device: DeviceRecord) -> dict[str, str]:
    return {build.name: build.version for build in device.description.runtimes}


def _same_data(
    theirs: JobSpec, spec: JobSpec, seen: Sequence[TrialRecord], own: Sequence[TrialRecord]
) -> bool:
    """The same data by name, split alike; FP32 itself gives the same answers to it.

    The last guards against a file that changed under its name.
    """
    if (theirs.data, theirs.seed) != (spec.data, spec.seed):
        return False
    fp32 = [next((t for t in trials if _is_fp32(t)), None) for trials in (seen, own)]
    figures = [t and t.accuracy and (t.accuracy.value, t.accuracy.n_samples) for t in fp32]
    return bool(figures[0]) and figures[0] == figures[1]


def _same_recovery(theirs: JobSpec, spec: JobSpec) -> bool:
    """A pruned base of one is that of the other, and so are the sensitivities of pruning."""
    return (theirs.recovery, theirs.search.prune_importance) == (
        spec.recovery,
        spec.search.prune_importance,
    )


def _is_fp32(trial: TrialRecord) -> bool:
    return not trial.candidate.precisions and _is_unpruned(trial)


def _is_unpruned(trial: TrialRecord) -> bool:
    return not trial.candidate.prune_ratios


def _sentence(repository: Repository, other: JobRecord, found: Earlier) -> str:
    where = ", ".join(repository.get_device(target.device_id).name for target in other.targets)
    kept = [f"the latencies of {len(found.latencies)} trials"] if found.latencies else []
    if found.drops:
        kept.append(f"the accuracies of {len(found.drops)}" + ("" if kept else " trials"))
    kept += ["the sensitivities"] if found.sensitivity else []
    front = f" and its front of {len(found.front)} is measured first" if found.latencies else ""
    return (
        f"job {other.id} searched this model on {where}: {_listed(kept)} are taken over as priors"
        f"{front}; none counts as measured by this job (search.warm_start: none leaves them out)"
    )


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
