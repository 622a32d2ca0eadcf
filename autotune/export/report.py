"""The report: one HTML page with a job's answer, its pictures and how they were measured.

The page is self-contained: no script, no font and no style sheet from elsewhere, so that it can
be mailed, archived and opened years later. It only shows records; figures come from
`figures.py`, the pictures from `front_plot.py` and `layer_picture.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from autotune.api_explanation import Explanation
from autotune.api_types import BlockingGroup, Portability, Verification
from autotune.export import figures
from autotune.export.front_plot import inline_front
from autotune.export.heat_map import inline_heat_map
from autotune.export.layer_picture import layer_cells
from autotune.export.provenance import provenance
from autotune.export.sensitivity_table import in_order
from autotune.limits import AMOUNTS
from device_agents.protocol import LatencyReport
from storage.records import DeviceRecord, JobRecord, TrialOutcome, TrialRecord

CONDITION_LABELS = {
    "load_1m": ("load, 1 minute", "{:.2f}"),
    "cpu_frequency_mhz": ("CPU frequency", "{:.0f} MHz"),
    "temperature_celsius": ("temperature", "{:.1f} °C"),
    "governor": ("governor", "{}"),
    "available_memory_bytes": ("available memory", "{}"),
    "steal_fraction": ("stolen CPU time", "{:.1%}"),
    "throttled_now": ("throttled now", "{}"),
    "throttled_since_boot": ("throttled since start", "{}"),
    "throttle_events": ("throttling events so far", "{}"),
    "involuntary_switches": ("involuntary context switches", "{}"),
}


def render_report(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    device: DeviceRecord | None,
    *,
    verification: Verification | None = None,
    portability: Portability | None = None,
    explanation: Explanation | None = None,
) -> str:
    """The page as text; a job without an answer yet gets a page that says so.

    `verification` is the exported bundle measured again; its figures stand beside the winner's.
    Of a job on several devices job and trials are as they are on `device`, and `portability` is
    what the winner on each costs on the others. `explanation` is the winner's.
    """
    result = job.result or {}
    by_id = {trial.id: trial for trial in trials}
    winner = by_id.get(result.get("winner", ""))
    fp32 = by_id.get(result.get("fp32_trial") or "")
    int8 = by_id.get(result.get("int8_trial") or "")
    ranked = [trial for trial in trials if figures.is_ranked(trial)]
    page = _environment().get_template("report.html")
    return page.render(
        job=job,
        result=result,
        device=device,
        figures=figures,
        winner=winner,
        compared=_compared(fp32, int8, winner),
        verification=verification,
        at=job.spec.get("latency_at") or "p50",
        limits=[
            f"at most {job.spec[key]} of {key.removeprefix('max_')}"
            for key in AMOUNTS
            if job.spec.get(key)
        ],
        portability=portability,
        explanation=explanation,
        blocking=[BlockingGroup.model_validate(g) for g in result.get("blocking_groups") or ()],
        device_names={t.device_id: t.device_name for t in portability.targets}
        if portability
        else {},
        plot=_plot(job, trials, fp32=fp32, int8=int8, winner=winner) if ranked else None,
        n_ranked=len(ranked),
        heat_map=_heat_map(job),
        front=figures.front_line(trials),
        cells=layer_cells(job, winner) if winner is not None else [],
        latency=None if winner is None else figures.latency_of(winner),
        accuracy=None if winner is None else figures.accuracy_of(winner),
        conditions=_conditions(None if winner is None else figures.latency_of(winner)),
        outcomes=Counter(_outcome(trial) for trial in trials),
        proposers=Counter(trial.proposed_by for trial in trials),
        failed=[t for t in trials if t.outcome not in (None, TrialOutcome.OK)],
        n_trials=len(trials),
        provenance=None if winner is None else provenance(job, winner, device),
        spec=json.dumps(dict(job.spec), indent=2, ensure_ascii=False),
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("autotune", "web/templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _compared(
    fp32: TrialRecord | None, int8: TrialRecord | None, winner: TrialRecord | None
) -> list[tuple[str, TrialRecord]]:
    """The rows of the comparison; a baseline that won stands there once, as the winner."""
    rows = [("FP32", fp32), ("uniform INT8", int8), ("winner", winner)]
    shown = [(label, trial) for label, trial in rows if trial is not None]
    if winner is None:
        return shown
    return [
        (f"winner ({label})" if label != "winner" else label, trial)
        if trial.id == winner.id
        else (label, trial)
        for label, trial in shown
        if label != "winner" or winner.id not in {t.id for t in (fp32, int8) if t}
    ]


def _plot(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    *,
    fp32: TrialRecord | None,
    int8: TrialRecord | None,
    winner: TrialRecord | None,
) -> Markup:
    svg = inline_front(
        trials,
        fp32=fp32,
        int8=int8,
        winner=winner,
        budget_ns=job.latency_budget_ns,
        describe=describe,
    )
    return Markup(svg)  # noqa: S704 - made by matplotlib, the texts in it escaped by inline_front


def _heat_map(job: JobRecord) -> Markup | None:
    if not job.sensitivity:
        return None
    svg = inline_heat_map(in_order(job.sensitivity, job.inventory))
    return Markup(svg)  # noqa: S704 - made by matplotlib, which escapes the texts in it


def describe(trial: TrialRecord) -> str:
    """One trial in a line, for the text that a browser shows over its point."""
    return (
        f"trial {trial.number} ({trial.proposed_by}): "
        f"{figures.accuracy_text(trial.accuracy)}, {figures.latency_text(trial.latency)}, "
        f"{figures.precisions_text(trial)}, pruned: {figures.prune_text(trial)}"
    )


def _outcome(trial: TrialRecord) -> str:
    return (trial.outcome or trial.state).value.replace("_", " ")


def _conditions(report: LatencyReport | None) -> list[tuple[str, str, str, str]]:
    """Rows of (what, before, between sittings, after); a value that is missing says why."""
    if report is None:
        return []
    before, after = report.before.model_dump(), report.after.model_dump()
    between = [read.model_dump() for read in report.between]
    return [
        (
            label,
            _condition(before, name, form),
            _conditions_between(between, name, form),
            _condition(after, name, form),
        )
        for name, (label, form) in CONDITION_LABELS.items()
    ]


def _conditions_between(read: Sequence[dict[str, Any]], name: str, form: str) -> str:
    """From the least to the largest of what was read while it was measured; of words, each."""
    told = [side for side in read if side[name] is not None]
    if not told:
        return figures.NONE
    is_number = isinstance(told[0][name], int | float)
    if is_number:
        shown = [pick(told, key=lambda side: side[name]) for pick in (min, max)]
    else:
        shown = [side for side in told if side[name]] or told[:1]
    words = dict.fromkeys(_condition(side, name, form) for side in shown)
    return (" to " if is_number else ", ").join(words)


def _condition(side: dict[str, Any], name: str, form: str) -> str:
    value = side[name]
    if value is None:
        return f"{figures.NONE} ({side['missing'].get(name, 'not reported')})"
    if isinstance(value, tuple | list):
        return ", ".join(value) or "no"
    return figures.size_text(value) if name.endswith("_bytes") else form.format(value)
