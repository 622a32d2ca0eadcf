"""Why a trial is what it is: the model fitted to a job's trials, read group by group.

Owns which of the model's figures are shown, how sure each is, and the sentences. The model is
`landscape.py`'s, fitted anew from stored records, so that a finished job is explained like one
that runs. Why uniform INT8 is slow on a device is `uniform_int8.py`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autotune.api_explanation import (
    Choice,
    Edge,
    Estimate,
    Explanation,
    GroupExplanation,
    PartExplanation,
)
from autotune.api_types import Interval, ModelError
from autotune.errors import JobNotReady
from autotune.export.figures import prune_text
from autotune.search.conclusion import baseline_trials
from autotune.search.drop_model import Model
from autotune.search.fleet import runtime_request
from autotune.search.front import latency_of, profile_of
from autotune.search.landscape import DROP_CEILING, Encoding, Fitted, Knowledge, fit
from autotune.search.uniform_int8 import why_int8
from device_agents.protocol import DeviceDescription
from search_spaces import Candidate, LayerInventory, SearchSpace
from storage.records import JobRecord, TrialRecord
from storage.sensitivity import Sensitivity

_Z95 = 1.96
_GUESS = 0.5
"""Below this measured share a figure is called a guess: more than half of its variance is what
was thought before any trial. A choice."""

_TOLD_BOUNDARY = 0.2
"""A boundary is worth a word where it changes what a group saves by a fifth or more. A choice."""

_FEWEST_LEFT_OUT = 2


def fitted_model(job: JobRecord, trials: Sequence[TrialRecord]) -> Fitted | None:
    """The models of a job on one device; None before its FP32 model ranks there."""
    if job.space is None or job.inventory is None:
        return None
    bases: dict[str, Mapping[str, float]] = {Candidate().base_digest: {}}
    for trial in trials:
        bases.setdefault(trial.candidate.base_digest, trial.candidate.prune_ratios)
    damage = {
        (entry.group, entry.precision): entry.mean_kl
        for entry in job.sensitivity
        if entry.precision is not None and entry.mean_kl is not None
    }
    return fit(
        Encoding(space=job.space, bases=tuple(bases.values())),
        Knowledge(inventory=job.inventory, damage=damage),
        trials,
    )


def model_error(fitted: Fitted) -> ModelError | None:
    """How well each trial is predicted from the others; None where too few can be left out."""
    kept = fitted.points.any(axis=1)
    if kept.sum() < _FEWEST_LEFT_OUT:
        return None
    reports = [latency_of(trial) for trial in fitted.trials]
    ratios = np.array([report.ratio for report in reports if report is not None])[kept]
    # Behind the job's own trials come those of earlier jobs, if any.
    n = len(fitted.points)
    errors, deviations = (part[:n][kept] for part in fitted.landscape.first.left_out())
    accuracy = fitted.landscape.second
    told = accuracy.told()
    expected = told - accuracy.left_out()[0]
    drops = np.minimum(told, DROP_CEILING) - np.minimum(expected, DROP_CEILING)
    return ModelError(
        n=int(kept.sum()),
        latency=float(np.mean(np.abs(errors) / ratios)),
        latency_covered=float(np.mean(np.abs(errors) <= _Z95 * deviations)),
        drop=float(np.mean(np.abs(drops[:n][kept]))),
    )


def news_of_model(fitted: Fitted) -> dict[str, Any]:
    """What the event of a fitted model says: its error; empty where that is not known."""
    error = model_error(fitted)
    return {} if error is None else error.model_dump()


def explain(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    trial: TrialRecord,
    device: DeviceDescription | None,
) -> Explanation:
    """The trial explained; job, trials and trial are as they are on one device.

    Raises:
        JobNotReady: the FP32 model has not been measured there, or the trial is not of the
            job's search space.
    """
    fitted = fitted_model(job, trials)
    if fitted is None or job.inventory is None or job.space is None:
        raise JobNotReady(
            f"job {job.id} has no FP32 trial with accuracy and a steady latency on its device "
            f"yet, so there is nothing to explain against; it is {job.state.value}"
        )
    point = fitted.encoding.point(replace(trial.candidate, rounding=None))
    if point is None:
        raise JobNotReady(f"trial {trial.number} is not a candidate of the job's search space")
    fp32_ns = job.reference_latency_ns or _fp32_ns(fitted)
    reading = _Reading(fitted=fitted, point=point, fp32_ns=fp32_ns)
    baselines = baseline_trials(job.space, trials)
    groups = _groups(reading, job.sensitivity, trial, baselines)
    latency, accuracy = latency_of(trial), trial.held_out_accuracy or trial.accuracy
    return Explanation(
        job_id=job.id,
        device_id=job.device_id or "",
        trial=trial.id,
        number=trial.number,
        fp32_latency_ns=fp32_ns,
        n_fitted=len(fitted.trials),
        basis=_basis(reading, job.sensitivity),
        model_error=model_error(fitted),
        latency_ns=reading.whole(fitted.landscape.first, scale=fp32_ns),
        measured_latency_ns=latency
        and Interval(value=latency.p50_ns, low=latency.p50_low_ns, high=latency.p50_high_ns),
        drop=reading.whole(fitted.landscape.second, scale=1.0),
        measured_drop=accuracy
        and Interval(value=accuracy.drop, low=accuracy.drop_low, high=accuracy.drop_high),
        groups=groups,
        parts=_parts(reading, trial, job.space),
        int8=why_int8(job, trials, device, _uniform(reading, job.inventory, job.space)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The fitted models, read around one point."""

    fitted: Fitted
    point: np.ndarray
    fp32_ns: float

    @property
    def groups(self) -> tuple[str, ...]:
        return self.fitted.encoding.groups

    def with_option(self, column: int, option: int) -> np.ndarray:
        """The point with one option changed."""
        other = self.point.copy()
        other[column] = option
        return other

    def changes(self, model: Model, column: int, options: Sequence[int]) -> np.ndarray:
        """Rows `(n, width)`: what each option makes of the point, less option 0 of the column."""
        points = np.array([self.with_option(column, option) for option in (0, *options)])
        rows = model.features.rows(points)
        found: np.ndarray = rows[1:] - rows[:1]
        return found

    def at_boundaries(self, model: Model, rows: np.ndarray) -> np.ndarray:
        """What pairs of neighbouring groups make up of rows `(n, width)`."""
        pairs = enumerate(model.features.links)
        n = len(self.groups)
        return model.features.of_links(rows, [i for i, x in pairs if max(x.first, x.second) < n])

    def edge(self, column: int) -> np.ndarray:
        """The rows `(1, width)` of the boundary behind a group, as the point has it."""
        features = self.fitted.landscape.first.features
        ends = enumerate((link.first, link.second) for link in features.links)
        behind = [index for index, pair in ends if pair == (column, column + 1)]
        return features.of_links(features.rows(self.point[None]), behind)

    def whole(self, model: Model, *, scale: float) -> Estimate:
        """The figure of the point itself."""
        (part,) = estimates(model, model.features.rows(self.point[None]), scale=scale)
        shift = model.base * scale
        bounds = {name: getattr(part, name) + shift for name in ("value", "low", "high")}
        return part.model_copy(update=bounds)


def estimates(model: Model, rows: np.ndarray, *, scale: float) -> list[Estimate]:
    """Parts of a figure, `rows` `(n, width)`, each times `scale` with its 95 % interval."""
    mean, deviation = model.weigh(rows)
    before = model.unmeasured(rows)
    found = []
    for value, after, prior in zip(mean * scale, deviation * abs(scale), before, strict=True):
        prior_ns = prior * abs(scale)
        # Nothing in it is uncertain: FP32 against itself.
        half = _Z95 * after if prior_ns > 0 else 0.0
        share = 1.0 - (after / prior_ns) ** 2 if prior_ns > 0 else 1.0
        found.append(
            Estimate(
                value=value + 0.0,
                low=value - half + 0.0,
                high=value + half + 0.0,
                measured_share=min(max(share, 0.0), 1.0),
            )
        )
    return found


def _groups(
    reading: _Reading,
    sensitivity: Sequence[Sensitivity],
    trial: TrialRecord,
    baselines: tuple[TrialRecord | None, TrialRecord | None],
) -> list[GroupExplanation]:
    known = {entry.key: entry for entry in sensitivity}
    built = {entry["group"]: entry for entry in (trial.compression or {}).get("groups", ())}
    kernel_ns, fp32_ns, int8_ns = map(_kernel_ns, (trial, *baselines))
    explained = []
    for column, name in enumerate(reading.groups):
        choices = _choices(reading, column, known)
        entry = built.get(name, {})
        facts = GroupExplanation(
            group=name,
            planned=choices[reading.point[column]].precision,
            effective=entry.get("effective"),
            effective_reason=entry.get("reason"),
            **_latency_parts(reading, column),
            lost=choices[reading.point[column]].lost,
            edges=_edges(reading, column),
            kernel_ns=kernel_ns.get(name),
            fp32_kernel_ns=fp32_ns.get(name),
            int8_kernel_ns=int8_ns.get(name),
            choices=choices,
            why="",
        )
        explained.append(facts.model_copy(update={"why": _why(facts)}))
    return explained


def _kernel_ns(trial: TrialRecord | None) -> Mapping[str, float]:
    """What the trial's profile measured in each group; empty without one."""
    profile = None if trial is None else profile_of(trial)
    return {} if profile is None else profile.group_ns()


def _latency_parts(reading: _Reading, column: int) -> dict[str, Estimate]:
    """What a group's choice saves in all, by itself, and what its boundaries take of that."""
    model = reading.fitted.landscape.first
    rows = reading.changes(model, column, [reading.point[column]])
    between = reading.at_boundaries(model, rows)
    saved, own = estimates(model, np.vstack([rows, rows - between]), scale=-reading.fp32_ns)
    (boundary,) = estimates(model, between, scale=reading.fp32_ns)
    return {"saved_ns": saved, "by_itself_ns": own, "boundary_ns": boundary}


def _choices(
    reading: _Reading, column: int, known: Mapping[tuple[str, str | float], Sensitivity]
) -> list[Choice]:
    name = reading.groups[column]
    offered = reading.fitted.encoding.space.precisions[name]
    first, second = reading.fitted.landscape.first, reading.fitted.landscape.second
    options = range(len(offered))
    saved = estimates(first, reading.changes(first, column, options), scale=-reading.fp32_ns)
    lost = estimates(second, reading.changes(second, column, options), scale=1.0)
    seen = Counter(reading.fitted.points[:, column].tolist())
    found = []
    for option, precision in enumerate(offered):
        entry = known.get((name, precision.name))
        found.append(
            Choice(
                precision=precision.name,
                is_chosen=option == reading.point[column],
                saved_ns=saved[option],
                lost=lost[option],
                kl_nats=None if entry is None else entry.mean_kl,
                is_kl_estimate=entry is not None and entry.is_estimate,
                n_trials=seen[option],
            )
        )
    return found


def _edges(reading: _Reading, column: int) -> list[Edge]:
    """The group's boundaries where one side is FP32 and the other is not."""
    found = []
    for first, neighbour in ((column - 1, column - 1), (column, column + 1)):
        inside = 0 <= neighbour < len(reading.groups)
        if inside and (reading.point[neighbour] > 0) != (reading.point[column] > 0):
            model = reading.fitted.landscape.first
            (cost,) = estimates(model, reading.edge(first), scale=reading.fp32_ns)
            found.append(Edge(neighbour=reading.groups[neighbour], cost_ns=cost))
    return found


def _parts(reading: _Reading, trial: TrialRecord, space: SearchSpace) -> list[PartExplanation]:
    """Pruning against the whole model, and the runtime against the first one offered."""
    found = []
    first, second = reading.fitted.landscape.first, reading.fitted.landscape.second
    runtime = runtime_request(trial.candidate.runtime).text()
    named = {
        "pruning": prune_text(trial) if trial.candidate.prune_ratios else "",
        "runtime": runtime if len(space.runtimes) > 1 else "",
    }
    for column, (part, text) in enumerate(named.items(), start=len(reading.groups)):
        if not text:
            continue
        option = [reading.point[column]]
        (saved,) = estimates(first, reading.changes(first, column, option), scale=-reading.fp32_ns)
        (lost,) = estimates(second, reading.changes(second, column, option), scale=1.0)
        found.append(
            PartExplanation.model_validate(
                {"part": part, "chosen": text, "saved_ns": saved, "lost": lost}
            )
        )
    return found


def _uniform(
    reading: _Reading, inventory: LayerInventory, space: SearchSpace
) -> list[tuple[str, Estimate]]:
    """What the model thinks that INT8 saves in each group, inside the uniform INT8 model."""
    point = reading.fitted.encoding.point(space.uniform_int8())
    if point is None:
        return []
    uniform = replace(reading, point=point)
    names = {group.name for group in inventory.groups}
    return [
        (name, _latency_parts(uniform, column)["by_itself_ns"])
        for column, name in enumerate(uniform.groups)
        if name in names and point[column] > 0
    ]


def _fp32_ns(fitted: Fitted) -> float:
    origin = next(t for p, t in zip(fitted.points, fitted.trials, strict=True) if not p.any())
    report = latency_of(origin)
    return 0.0 if report is None else report.reference_latency_ns


def _basis(reading: _Reading, sensitivity: Sequence[Sensitivity]) -> str:
    """What the model knows, and from where, as a sentence."""
    fitted, model = reading.fitted, reading.fitted.landscape.first
    knowledge = fitted.knowledge
    rows = np.vstack(
        [
            reading.changes(model, column, range(1, factor.n_options))
            for column, factor in enumerate(model.features.factors[: len(reading.groups)])
        ]
        or [np.zeros((0, model.features.width))]
    )
    before = float((model.unmeasured(rows) ** 2).sum())
    after = float((model.weigh(rows)[1] ** 2).sum())
    learned = 1.0 - after / before if before > 0 else 1.0
    if knowledge.fp32_ns and knowledge.int8_ns:
        prior = "kernel profiles of the FP32 and the uniform INT8 model"
    elif knowledge.fp32_ns:
        prior = "a kernel profile of the FP32 model, and what INT8 usually saves"
    else:
        prior = "the work counted in each group (no kernel profile), and what INT8 usually saves"
    measured = sum(entry.is_measured for entry in sensitivity)
    damage = (
        f"{measured} measured and {len(sensitivity) - measured} estimated sensitivities"
        if sensitivity
        else "nothing: no sensitivity is stored"
    )
    n = len(fitted.trials)
    return (
        f"fitted to {n} trial{'s' if n != 1 else ''}, which took away {max(learned, 0.0):.0%} of "
        f"the variance that the groups' latencies had before; before them latency rests on "
        f"{prior}, accuracy on {damage}"
    )


def _why(group: GroupExplanation) -> str:
    """The choice in a sentence."""
    chosen = next(choice for choice in group.choices if choice.is_chosen)
    others = [choice for choice in group.choices if not choice.is_chosen]
    if not others:
        return "nothing else is offered for it"
    if chosen is group.choices[0]:
        text = _alternative(max(others, key=lambda choice: choice.saved_ns.value))
        shares = [choice.saved_ns.measured_share for choice in others]
    else:
        text = f"{_effect(chosen)}{_at_boundaries(group)}"
        better = [
            other
            for other in others
            if other.saved_ns.value > chosen.saved_ns.value and other.lost.value < chosen.lost.value
        ]
        if better:
            best = max(better, key=lambda choice: choice.saved_ns.value)
            text += f"; {best.precision} is predicted better in both"
        shares = [chosen.saved_ns.measured_share]
    if max(shares) < _GUESS:
        text += "; a guess, for few trials tell"
    if group.effective not in (None, group.planned):
        text += f"; it runs as {group.effective}: {group.effective_reason or 'no reason known'}"
    elif group.effective is None and group.effective_reason is not None:
        text += f"; what it runs as is unknown ({group.effective_reason})"
    return text


def _alternative(choice: Choice) -> str:
    """What leaving FP32 for that choice would do."""
    saved = choice.saved_ns
    if saved.high < 0:
        return f"{choice.precision} would be slower by {_ms(saved, sign=-1)}"
    if saved.low <= 0:
        return (
            f"{choice.precision} is not known to be faster (it saves {_ms(saved)}), and would "
            f"lose {_points(choice.lost)}"
        )
    return f"{choice.precision} would save {_ms(saved)} and lose {_points(choice.lost)}"


def _effect(choice: Choice) -> str:
    saved = choice.saved_ns
    if saved.high < 0:
        return f"costs {_ms(saved, sign=-1)} against FP32 and loses {_points(choice.lost)}"
    if saved.low <= 0:
        return f"saves {_ms(saved)}, which may be nothing, and loses {_points(choice.lost)}"
    return f"saves {_ms(saved)} and loses {_points(choice.lost)}"


def _at_boundaries(group: GroupExplanation) -> str:
    boundary, saved = group.boundary_ns, group.saved_ns
    may_be_none = boundary.low <= 0 <= boundary.high
    if may_be_none or abs(boundary.value) < _TOLD_BOUNDARY * abs(saved.value):
        return ""
    if boundary.value > 0:
        return f", {_ms(boundary)} of its own gain going to boundaries"
    return f", {_ms(boundary, sign=-1)} of that by sparing boundaries"


def _ms(figure: Estimate, *, sign: int = 1) -> str:
    half = (figure.high - figure.low) / 2e6
    # Two significant digits of the error (GUM, JCGM 100:2008, 7.2.6), a nanosecond at the finest.
    places = min(max(0, 1 - math.floor(math.log10(half))), 6) if half > 0 else 2
    return f"{_fixed(sign * figure.value / 1e6, places)} ± {half:.{places}f} ms"


def _points(figure: Estimate) -> str:
    half = (figure.high - figure.low) / 2
    return f"{_fixed(100 * figure.value, 2)} ± {100 * half:.2f} points"


def _fixed(value: float, places: int) -> str:
    """With that many decimals, and no zero below zero."""
    return f"{round(value, places) + 0.0:.{places}f}"
