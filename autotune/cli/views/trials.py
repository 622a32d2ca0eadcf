"""Trials and their layer groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from autotune.api_types import GroupPrecision, Interval, Trial
from autotune.cli import figures
from autotune.cli.output import Column, Field, View
from autotune.limits import joules_text
from device_agents.protocol import RuntimeRequest


def group_counts(trial: Trial) -> str:
    """How many layer groups really run in which precision, most first.

    A trial whose file was never built shows its plan.
    """
    if not trial.groups:
        precisions = trial.candidate.get("precisions", {})
        planned = Counter(str(name) for name in precisions.values())
        return figures.counted(planned) + " planned" if planned else "all fp32"
    text = figures.counted(
        Counter(group.effective or f"unseen (planned {group.planned})" for group in trial.groups)
    )
    differing = sum(group.effective not in (None, group.planned) for group in trial.groups)
    return f"{text} ({differing} not as planned)" if differing else text


def seen_in(trial: Trial) -> str:
    """Where the groups' effective precisions were seen, most first."""
    counter = Counter(group.seen_in for group in trial.groups if group.seen_in)
    if len(counter) == 1 and counter.total() == len(trial.groups):
        return next(iter(counter))
    return "; ".join(f"{n} in {where}" for where, n in counter.most_common()) or figures.MISSING


def prune_summary(trial: Trial) -> str:
    """How many prunable groups lose which share of their channels."""
    counter = Counter(ratio for ratio in trial.prune_ratios.values() if ratio > 0)
    if not counter:
        return "none"
    return ", ".join(f"{amount} x {ratio:.0%}" for ratio, amount in sorted(counter.items()))


def kept_channels(trial: Trial) -> str:
    """How many channels of the pruned groups stayed, and how they were chosen."""
    pruning = (trial.pruned_base or {}).get("pruning")
    if not pruning:
        return figures.MISSING
    before, after = (sum(pair[side] for pair in pruning["channels"].values()) for side in (0, 1))
    text = f"{after} of {before}, ranked by {pruning['importance']}"
    if pruning["ranked_by_l2"]:
        text += f" ({len(pruning['ranked_by_l2'])} groups by l2)"
    return f"{text}, in multiples of {pruning['channel_multiple']}"


def recovery_summary(trial: Trial) -> str:
    """What the recovery training cost, why it stopped and what it brought."""
    recovery = (trial.pruned_base or {}).get("recovery")
    if not recovery:
        return (trial.pruned_base or {}).get("note") or figures.MISSING
    text = (
        f"{figures.seconds(recovery['wall_s'])} for {recovery['epochs']} epochs of "
        f"{recovery['samples']} samples; {recovery['stopped_because']}"
    )
    if recovery["recovered_accuracy"] is None:
        return text
    return (
        f"{text}; {recovery['recovered_accuracy']:.1%} after epoch {recovery['kept_epoch']}, "
        f"FP32 {recovery['teacher_accuracy']:.1%} (n={recovery['validation_samples']}, held back)"
    )


def kernel_time(time_ns: float | None) -> str:
    """A kernel's time in ms, without the unit: the column's title carries it."""
    return figures.MISSING if time_ns is None else figures.number(time_ns / 1e6)


def profile_summary(trial: Trial) -> str:
    """Of what the kernel times are the parts; why there are none."""
    profile = trial.profile
    if profile is None:
        return figures.MISSING
    if profile.missing is not None:
        return f"none: {profile.missing}"
    return f"{figures.latency(profile.inference_ns)} an inference (n={profile.n_runs})"


def runtime(trial: Trial) -> RuntimeRequest:
    """The runtime with its options; the usual ones where the candidate does not say."""
    return RuntimeRequest.model_validate(trial.candidate.get("runtime", {}))


def runtime_text(trial: Trial) -> str:
    """The runtime with what is not usual about its options."""
    usual = RuntimeRequest().text().split(", ")[1:]
    return ", ".join(word for word in runtime(trial).text().split(", ") if word not in usual)


def latency_text(trial: Trial) -> str:
    """The p50 interval in ms, marked where it is unsteady."""
    text = figures.milliseconds(trial.latency_ns)
    return f"{text} unsteady" if trial.is_steady is False else text


def _tail(value_ns: float | None, high_ns: float | None) -> str:
    """A quantile with its upper bound."""
    if value_ns is None:
        return figures.MISSING
    bound = (
        "too few samples for a bound" if high_ns is None else f"at most {figures.latency(high_ns)}"
    )
    return f"{figures.latency(value_ns)} ({bound})"


def _energy(joules: float | None) -> str:
    return figures.MISSING if joules is None else joules_text(joules)


def _samples(trial: Trial) -> str:
    return figures.MISSING if trial.latency_samples is None else str(trial.latency_samples)


def _outcome(trial: Trial) -> str:
    if trial.outcome is None:
        return trial.state
    return f"{trial.outcome}: {trial.reason}" if trial.reason else trial.outcome


def _claim(value: bool | None) -> str:
    return {None: figures.MISSING, True: "yes", False: "no"}[value]


def _bounds(name: str, pick: Callable[[Trial], Interval | None]) -> list[Field[Trial]]:
    """Three fields of an interval: the figure, its lower and its upper bound."""

    def part(attribute: str) -> Callable[[Trial], float | None]:
        def value(trial: Trial) -> float | None:
            figure = pick(trial)
            return None if figure is None else float(getattr(figure, attribute))

        return value

    return [
        Field(name=name, value=part("value")),
        Field(name=f"{name}_low", value=part("low")),
        Field(name=f"{name}_high", value=part("high")),
    ]


TRIAL_FIELDS: list[Field[Trial]] = [
    Field(name="trial", value=lambda t: t.id),
    Field(name="number", value=lambda t: t.number),
    Field(name="state", value=lambda t: t.state),
    Field(name="outcome", value=lambda t: t.outcome),
    Field(name="reason", value=lambda t: t.reason),
    Field(name="proposed_by", value=lambda t: t.proposed_by),
    *_bounds("accuracy", lambda t: t.accuracy),
    *_bounds("accuracy_drop", lambda t: t.accuracy_drop),
    Field(name="accuracy_samples", value=lambda t: t.accuracy_samples),
    Field(name="accuracy_stopped_early", value=lambda t: t.accuracy_stopped_early),
    Field(name="mean_kl_nats", value=lambda t: t.mean_kl),
    *_bounds("latency_ns", lambda t: t.latency_ns),
    Field(name="latency_p90_ns", value=lambda t: t.latency_p90_ns),
    Field(name="latency_p90_high_ns", value=lambda t: t.latency_p90_high_ns),
    Field(name="latency_p99_ns", value=lambda t: t.latency_p99_ns),
    Field(name="latency_p99_high_ns", value=lambda t: t.latency_p99_high_ns),
    Field(name="peak_memory_bytes", value=lambda t: t.peak_memory_bytes),
    Field(name="energy_joules", value=lambda t: t.energy_joules),
    Field(name="latency_samples", value=lambda t: t.latency_samples),
    Field(name="is_steady", value=lambda t: t.is_steady),
    *_bounds("fp32_ratio", lambda t: t.fp32_ratio),
    Field(name="is_feasible", value=lambda t: t.is_feasible),
    Field(name="is_on_front", value=lambda t: t.is_on_front),
    *_bounds("held_out_accuracy", lambda t: t.held_out_accuracy),
    *_bounds("held_out_accuracy_drop", lambda t: t.held_out_accuracy_drop),
    Field(name="held_out_samples", value=lambda t: t.held_out_samples),
    *_bounds("confirmed_latency_ns", lambda t: t.confirmed_latency_ns),
    Field(name="confirmed_latency_samples", value=lambda t: t.confirmed_latency_samples),
    *_bounds("confirmed_fp32_ratio", lambda t: t.confirmed_fp32_ratio),
    Field(name="size_bytes", value=lambda t: t.artifact_size_bytes),
    Field(name="groups", value=group_counts),
    Field(name="pruning", value=prune_summary),
    Field(name="runtime", value=lambda t: runtime(t).runtime),
    Field(name="provider", value=lambda t: runtime(t).provider),
    Field(name="threads", value=lambda t: runtime(t).threads),
    Field(name="graph_level", value=lambda t: runtime(t).graph_level),
    Field(name="memory_arena", value=lambda t: runtime(t).memory_arena),
    Field(name="spinning", value=lambda t: runtime(t).spinning),
    Field(name="candidate_digest", value=lambda t: t.candidate_digest),
    Field(name="artifact_sha256", value=lambda t: t.artifact_sha256),
]


TRIALS: View[Trial] = View(
    columns=[
        Column(title="trial", text=lambda t: f"#{t.number}", right=True),
        Column(title="outcome", text=_outcome),
        Column(title="accuracy % [95 %]", text=lambda t: figures.percent(t.accuracy), right=True),
        Column(title="p50 ms [95 %]", text=latency_text, right=True),
        Column(title="runs", text=_samples, right=True, secondary=True),
        Column(title="x FP32", text=lambda t: figures.interval(t.fp32_ratio), right=True),
        Column(
            title="size",
            text=lambda t: figures.size(t.artifact_size_bytes),
            right=True,
            secondary=True,
        ),
        Column(title="groups", text=group_counts),
        Column(title="pruned", text=prune_summary, secondary=True),
        Column(title="runtime", text=runtime_text, secondary=True),
        Column(title="by", text=lambda t: t.proposed_by, secondary=True),
        Column(title="front", text=lambda t: "yes" if t.is_on_front else ""),
    ],
    fields=TRIAL_FIELDS,
    document=lambda trial: trial.model_dump(mode="json"),
    style=lambda trial: "bold" if trial.is_on_front else None,
)


TRIAL: View[Trial] = View(
    columns=[
        Column(title="trial", text=lambda t: f"#{t.number}  {t.id}"),
        Column(title="outcome", text=_outcome),
        Column(title="proposed by", text=lambda t: t.proposed_by),
        Column(
            title="accuracy, search data",
            text=lambda t: figures.with_unit(figures.percent(t.accuracy), "%", t.accuracy_samples),
        ),
        Column(title="drop from FP32, points", text=lambda t: figures.percent(t.accuracy_drop)),
        Column(title="stopped early", text=lambda t: t.accuracy_stopped_early or "no"),
        Column(
            title="accuracy, held-out data",
            text=lambda t: figures.with_unit(
                figures.percent(t.held_out_accuracy), "%", t.held_out_samples
            ),
        ),
        Column(title="mean KL from FP32, nats", text=lambda t: figures.optional(t.mean_kl)),
        Column(
            title="latency p50",
            text=lambda t: figures.with_unit(latency_text(t), "ms", t.latency_samples),
        ),
        Column(
            title="latency p90",
            text=lambda t: _tail(t.latency_p90_ns, t.latency_p90_high_ns),
        ),
        Column(
            title="latency p99",
            text=lambda t: _tail(t.latency_p99_ns, t.latency_p99_high_ns),
        ),
        Column(
            title="confirmed in a fresh process",
            text=lambda t: figures.with_unit(
                figures.milliseconds(t.confirmed_latency_ns), "ms", t.confirmed_latency_samples
            ),
        ),
        Column(title="ratio to FP32", text=lambda t: figures.interval(t.fp32_ratio)),
        Column(title="profiled", text=profile_summary),
        Column(title="inside the limits", text=lambda t: _claim(t.is_feasible)),
        Column(title="on the front", text=lambda t: _claim(t.is_on_front)),
        Column(title="size", text=lambda t: figures.size(t.artifact_size_bytes)),
        Column(title="peak memory", text=lambda t: figures.size(t.peak_memory_bytes)),
        Column(title="energy an inference", text=lambda t: _energy(t.energy_joules)),
        Column(title="runtime", text=runtime_text),
        Column(title="groups", text=group_counts),
        Column(title="groups seen in", text=seen_in),
        Column(title="pruned", text=prune_summary),
        Column(title="channels kept", text=kept_channels),
        Column(title="recovery training", text=recovery_summary),
        Column(title="artifact sha256", text=lambda t: t.artifact_sha256 or figures.MISSING),
        Column(title="candidate digest", text=lambda t: t.candidate_digest),
    ],
    fields=TRIAL_FIELDS,
    document=lambda trial: trial.model_dump(mode="json"),
)


GROUPS: View[GroupPrecision] = View(
    columns=[
        Column(title="layer group", text=lambda g: g.group),
        Column(title="planned", text=lambda g: g.planned),
        Column(title="effective", text=lambda g: g.effective or "unknown"),
        Column(title="stored bits", text=lambda g: str(g.stored_bits or figures.MISSING)),
        Column(title="kernels, ms", text=lambda g: kernel_time(g.kernel_ns), right=True),
        Column(title="why they differ", text=lambda g: g.reason or ""),
    ],
    fields=[
        Field(name="group", value=lambda g: g.group),
        Field(name="planned", value=lambda g: g.planned),
        Field(name="effective", value=lambda g: g.effective),
        Field(name="stored_bits", value=lambda g: g.stored_bits),
        Field(name="seen_in", value=lambda g: g.seen_in),
        Field(name="kernel_ns", value=lambda g: g.kernel_ns),
        Field(name="reason", value=lambda g: g.reason),
    ],
    document=lambda group: group.model_dump(mode="json"),
    style=lambda group: "yellow" if group.planned != group.effective else None,
)


BETWEEN_GROUPS: View[tuple[str, float]] = View(
    columns=[
        Column(title="between and outside groups", text=lambda entry: entry[0]),
        Column(title="kernels, ms", text=lambda entry: kernel_time(entry[1]), right=True),
    ],
    fields=[
        Field(name="operator", value=lambda entry: entry[0]),
        Field(name="kernel_ns", value=lambda entry: entry[1]),
    ],
    document=lambda entry: {"operator": entry[0], "kernel_ns": entry[1]},
)


PRUNING: View[tuple[str, float]] = View(
    columns=[
        Column(title="prunable group", text=lambda entry: entry[0]),
        Column(title="channels removed", text=lambda entry: f"{entry[1]:.0%}", right=True),
    ],
    fields=[
        Field(name="group", value=lambda entry: entry[0]),
        Field(name="prune_ratio", value=lambda entry: entry[1]),
    ],
    document=lambda entry: {"group": entry[0], "prune_ratio": entry[1]},
)
