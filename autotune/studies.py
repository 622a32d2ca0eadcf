"""A job as an Optuna study, for Optuna's own tools: in memory, or in an Optuna storage.

Owns what a trial is in Optuna's words. A study is a copy that nothing here reads back: the
search makes its own in `search/sampler.py`. optuna comes with the extra `analysis`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from autotune.api_types import Interval, Job, Trial, TrialOnTarget
from autotune.errors import MissingPackage, StudyError
from autotune.frames import choices_of
from autotune.limits import amounts

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_OBJECTIVES: dict[str, tuple[str, Callable[[Trial], float | None]]] = {
    "latency": ("latency_ns", lambda trial: _value(trial.latency_ns)),
    "accuracy": ("accuracy_drop", lambda trial: _value(trial.accuracy_drop)),
    "size": ("size_bytes", lambda trial: trial.artifact_size_bytes),
    "memory": ("peak_memory_bytes", lambda trial: trial.peak_memory_bytes),
    "energy": ("energy_joules", lambda trial: trial.energy_joules),
}
"""A job's objectives: the study's name of each and its figure; all are minimized."""

_WORST = "worst_latency_share"
"""The latency objective of a job on several devices: the largest share of a device's budget
(of its FP32 latency where there is none), which is what the search minimizes."""

_ATTRIBUTES = (
    "number",
    "state",
    "outcome",
    "reason",
    "proposed_by",
    "candidate_digest",
    "artifact_sha256",
    "artifact_size_bytes",
    "accuracy_samples",
    "mean_kl",
    "latency_p90_ns",
    "latency_samples",
    "is_steady",
    "is_feasible",
    "is_on_front",
)
_INTERVALS = (
    "accuracy",
    "accuracy_drop",
    "latency_ns",
    "fp32_ratio",
    "held_out_accuracy",
    "held_out_accuracy_drop",
    "confirmed_latency_ns",
    "confirmed_fp32_ratio",
)


def study_of(
    job: Job, trials: Sequence[Trial], *, storage: str | None = None, name: str | None = None
) -> Study:
    """A study with every trial of the job.

    Its directions are the job's objectives, each minimized, with their names. A parameter is
    the precision of a group (`precision:GROUP`), the share of channels it lost (`prune:GROUP`),
    `runtime` or one of its options. A trial that ranks is COMPLETE, one that failed or is not
    steady FAIL, one that is not finished RUNNING. Constraints are feasible at or below 0: the upper
    bound of the latency minus its budget, and the accuracy drop minus the largest allowed.
    The user attributes are the trial's figures, an interval as [value, low, high].

    Args:
        job: the job, with its budgets.
        trials: its trials, by number.
        storage: an Optuna storage such as `sqlite:///study.db`; in memory where None.
        name: of the study; the job's name and id where None.

    Raises:
        MissingPackage: optuna is not installed.
        StudyError: the storage holds a study of that name, or cannot be used.
    """
    optuna = _optuna()
    objectives = _objectives(job)
    choices = choices_of(trials)
    distributions = _distributions(optuna, choices)
    made = [
        _trial(optuna, job, trial, objectives, params, distributions)
        for trial, params in zip(trials, choices, strict=True)
    ]
    study = _create(
        optuna, directions=["minimize"] * len(objectives), storage=storage, name=name or title(job)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(objectives))
    for key in ("id", "name", "state", "latency_budget_ns", "fp32_latency_ns"):
        study.set_user_attr(key, getattr(job, key))
    study.add_trials(made)
    return study


def title(job: Job) -> str:
    """What a job's study is called."""
    return f"{job.name} {job.id}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingPackage(
            "optuna is not installed here; pip install 'edge-autotune[analysis]' brings it"
        ) from error
    return optuna


def _create(optuna: Any, *, directions: Sequence[str], storage: str | None, name: str) -> Study:
    verbosity = optuna.logging.get_verbosity()
    # An address may hold a password, which nobody is to read in a message.
    shown = re.sub(r"(?<=//)([^:/@]*):.*@", r"\1:***@", str(storage))
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        study: Study = optuna.create_study(directions=directions, storage=storage, study_name=name)
        return study
    except optuna.exceptions.DuplicatedStudyError as error:
        raise StudyError(
            f"{shown} holds a study {name!r} already, and it is left alone: give the new one "
            f"another name with --name, write to another storage, or delete the old one with "
            f"`optuna delete-study --study-name {name!r} --storage {shown}`"
        ) from error
    except Exception as error:
        # Optuna hands over whatever SQLAlchemy, Alembic and the database's driver raise.
        raise StudyError(
            f"{shown!r} cannot be used as an Optuna storage ({error}); name one such as "
            "sqlite:///study.db"
        ) from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def _objectives(job: Job) -> dict[str, Callable[[Trial], float | None]]:
    """The study's figures by name, in the order latency, accuracy, then what the job adds."""
    named = job.spec.get("search", {}).get("objectives") or ()
    found = {}
    for objective, (name, figure) in _OBJECTIVES.items():
        if objective in ("latency", "accuracy") or objective in named:
            found[name] = figure
    if len(job.targets) < 2:
        return found
    found.pop("latency_ns")
    return {_WORST: lambda trial: _worst_share(job, trial), **found}


def _worst_share(job: Job, trial: Trial) -> float | None:
    units = {t.device_id: t.latency_budget_ns or t.fp32_latency_ns for t in job.targets}
    shares = []
    for there in trial.targets:
        unit = units.get(there.device_id)
        if there.latency_ns is None or unit is None:
            return None
        shares.append(there.latency_ns.value / unit)
    return max(shares, default=None)


def _trial(
    optuna: Any,
    job: Job,
    trial: Trial,
    objectives: Mapping[str, Callable[[Trial], float | None]],
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
) -> FrozenTrial:
    values = [figure(trial) for figure in objectives.values()]
    ranks = trial.outcome == "ok" and trial.is_steady is not False and None not in values
    states = optuna.trial.TrialState
    state = states.COMPLETE if ranks else states.FAIL
    if trial.state != "finished":
        state = states.RUNNING
    made: FrozenTrial = optuna.trial.create_trial(
        state=state,
        values=values if state == states.COMPLETE else None,
        params=dict(params),
        distributions=dict(distributions),
        user_attrs=_attributes(trial),
        constraints=_constraints(job, trial) or None,
    )
    made.datetime_start = _local(trial.created_at) or made.datetime_start
    if state.is_finished():
        made.datetime_complete = _local(trial.finished_at) or made.datetime_complete
    return made


def _local(time: datetime | None) -> datetime | None:
    """Optuna's times are naive and local."""
    return None if time is None else time.astimezone().replace(tzinfo=None)


def _attributes(trial: Trial) -> dict[str, Any]:
    found: dict[str, Any] = {"trial": trial.id, "candidate": trial.candidate}
    found |= {name: getattr(trial, name) for name in _ATTRIBUTES}
    for name in _INTERVALS:
        figure: Interval | None = getattr(trial, name)
        if figure is not None:
            found[name] = [figure.value, figure.low, figure.high]
    return {name: value for name, value in found.items() if value is not None}


def _constraints(job: Job, trial: Trial) -> dict[str, float]:
    found: dict[str, float] = {}
    of_device: dict[str, Trial | TrialOnTarget] = {t.device_id: t for t in trial.targets}
    for target in job.targets:
        seen = of_device.get(target.device_id, trial)
        high_ns = _bound_ns(seen, job.spec.get("latency_at") or "p50")
        if target.latency_budget_ns is not None and high_ns is not None:
            name = "latency_budget"
            if len(job.targets) > 1:
                name += f":{target.device_name}"
            found[name] = high_ns - target.latency_budget_ns
    allowed = job.spec.get("max_accuracy_drop")
    if allowed is not None and trial.accuracy_drop is not None:
        found["max_accuracy_drop"] = trial.accuracy_drop.value - allowed
    figures = {
        "max_size": trial.artifact_size_bytes,
        "max_memory": trial.peak_memory_bytes,
        "max_energy": trial.energy_joules,
    }
    for key, limit in amounts(job.spec).items():
        figure = figures[key]
        if figure is not None:
            found[key] = figure - limit
    return found


def _bound_ns(seen: Trial | TrialOnTarget, at: str) -> float | None:
    """What the latency does not pass at that quantile; None where it is not known."""
    if at == "p50":
        return None if seen.latency_ns is None else seen.latency_ns.high
    return getattr(seen, f"latency_{at}_high_ns", None)


def _distributions(
    optuna: Any, choices: Sequence[Mapping[str, Any]]
) -> dict[str, BaseDistribution]:
    """One for each choice: precisions and runtimes by name, prune ratios and threads as numbers."""
    kinds = optuna.distributions
    found: dict[str, Any] = {}
    for name in choices[0] if choices else ():
        values = {chosen[name] for chosen in choices}
        if name.startswith("prune:"):
            found[name] = kinds.FloatDistribution(0.0, max(values))
        elif name == "threads":
            found[name] = kinds.IntDistribution(min(values), max(values))
        else:
            found[name] = kinds.CategoricalDistribution(sorted(values))
    return found


def _value(figure: Interval | None) -> float | None:
    return None if figure is None else figure.value
