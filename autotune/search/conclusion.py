"""What a job may search and what it concludes: the space, its limits, and the answer in words.

Pure functions of records; the phases that call them are `tuning.py`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autotune.api_types import BlockingGroup, JobResult, TargetResult
from autotune.compression.device_kernels import DeviceKernels
from autotune.compression.kernels import X86_VNNI
from autotune.errors import InvalidJob, InvalidModel
from autotune.search.best_baseline import BASELINE, comparison
from autotune.search.blocking import blocking_groups, in_words
from autotune.search.fleet import runtime_request
from autotune.search.front import Answer, latency_of
from autotune.search.runtimes import asked_for, remarks
from autotune.search.targets import View, views
from autotune.spec import JobSpec
from device_agents.latency import level_bounds_ns, state_uncertainty
from device_agents.protocol import LatencyReport
from search_spaces import (
    LayerGroup,
    LayerInventory,
    PerBlock,
    Precision,
    SearchSpace,
    can_take,
)
from storage.records import JobRecord, TrialRecord

if TYPE_CHECKING:
    from autotune.compression.data import DataSplits

CANCELLED_BY_HAND = "cancelled by hand"

_USUAL = (DeviceKernels(kernels=X86_VNNI),)

_NONE_LOST = 3.0
"""The rule of three: -ln(0.05), rounded up."""

_WORTH_SAYING = 0.03
"""By how much another state of the device makes an interval wider before it is said. A choice."""

_ONE_POINT = 0.01
"""What a user who allows no drop in particular would still want to see."""


def build_space(
    spec: JobSpec, inventory: LayerInventory, *, kernels: Sequence[DeviceKernels] = _USUAL
) -> SearchSpace:
    """The job's choices applied to the model's inventory, on devices with those kernels.

    A precision that cannot be faster on any is offered only where size is an objective.
    """
    return SearchSpace.build(
        inventory,
        precisions=[Precision.parse(name) for name in spec.search.precisions],
        prune_ratios=spec.search.prune_ratios,
        runtimes=asked_for(spec.search, [device.runtimes for device in kernels]),
        is_offered=lambda group, precision: _why_left_out(spec, group, precision, kernels) is None,
    )


def left_out(
    spec: JobSpec, inventory: LayerInventory, *, kernels: Sequence[DeviceKernels] = _USUAL
) -> list[str]:
    """Which of the job's precisions are not offered to which groups, and why; a sentence each."""
    precisions = [Precision.parse(name) for name in spec.search.precisions]
    causes: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for precision in dict.fromkeys(precisions):
        by_reason: dict[str, list[str]] = {}
        for group in inventory.groups:
            reason = _why_left_out(spec, group, precision, kernels)
            if not can_take(group, precision) and not precision.is_float:
                is_blocked = isinstance(precision.granularity, PerBlock)
                reason = (
                    "only matrix products share scales by blocks"
                    if is_blocked and can_take(group, precision.plain)
                    else "no kernel computes such a layer in it"
                )
            if reason is not None:
                by_reason.setdefault(reason, []).append(group.name)
        for reason, names in by_reason.items():
            causes.setdefault((reason, tuple(names)), []).append(precision.name)
    return [
        f"{', '.join(named)} not offered to {_groups(names, inventory)}: {reason}"
        for (reason, names), named in causes.items()
    ]


def _why_left_out(
    spec: JobSpec, group: LayerGroup, precision: Precision, kernels: Sequence[DeviceKernels]
) -> str | None:
    if "size" in spec.search.objectives or spec.max_size is not None:
        return None
    slow = [
        of_device.why_not_faster(precision, group, runtimes=spec.search.runtimes)
        for of_device in kernels
    ]
    if None in slow:
        return None
    return f"{slow[0]}, so the file is only smaller; add size to search.objectives to have it"


def _groups(names: Sequence[str], inventory: LayerInventory) -> str:
    total = len(inventory.groups)
    if len(names) == total:
        return "any layer group"
    if len(names) <= 3:
        return f"layer group {', '.join(names)}"
    return f"{len(names)} of {total} layer groups ({names[0]}, {names[1]}, ...)"


def limits(
    spec: JobSpec,
    inventory: LayerInventory,
    *,
    has_training: bool,
    kernels: Sequence[DeviceKernels] = _USUAL,
) -> list[str]:
    """What the job asked for and this model or data cannot give, one sentence each.

    Raises:
        InvalidJob: pruning was asked for, is impossible, and may not be left out.
        InvalidModel: the model holds nothing that could be quantized or pruned.
    """
    notices = []
    if not inventory.groups and not inventory.prunable_groups:
        listed = ", ".join(map(str, inventory.float_operators)) or "none"
        raise InvalidModel(
            "nothing in the model can be tuned: it has no convolution or matrix product with "
            f"constant weights (operators that compute in float: {listed})"
        )
    asked = any(ratio > 0 for ratio in spec.search.prune_ratios)
    if asked and inventory.pruning_unavailable:
        if not spec.search.allow_without_pruning:
            raise InvalidJob(
                f"the job asks for pruning: {inventory.pruning_unavailable}; set "
                "search.allow_without_pruning to true, or search.prune_ratios to [0]"
            )
        notices.append(f"going on without pruning: {inventory.pruning_unavailable}")
    elif asked and inventory.recovery_unavailable:
        notices.append(
            "pruned candidates get re-estimated statistics only, no recovery training: "
            f"{inventory.recovery_unavailable}"
        )
        if spec.search.prune_importance not in ("l1", "l2"):
            notices.append(
                f"prune_importance {spec.search.prune_importance} needs a torch module: channels "
                "are ranked by the variance of their outputs on the calibration samples"
            )
    elif asked and not has_training:
        notices.append(
            "no training data: pruned candidates get BatchNorm re-estimation only, no recovery "
            "training; name data.training to change that"
        )
    trainable = inventory.recovery_unavailable is None
    if asked and trainable and spec.search.prune_importance == "batch_norm":
        without = [g.name for g in inventory.prunable_groups if not g.batch_norms]
        if without:
            notices.append(
                f"{len(without)} of {len(inventory.prunable_groups)} prunable groups have no "
                "BatchNorm: their channels are ranked by the L2 norm of their weights"
            )
    if inventory.float_operators:
        listed = ", ".join(map(str, inventory.float_operators))
        notices.append(f"operators that stay in FP32: {listed}")
    notices += left_out(spec, inventory, kernels=kernels)
    return notices + remarks(spec.search, [device.runtimes for device in kernels])


def all_limits(
    spec: JobSpec,
    inventory: LayerInventory,
    splits: DataSplits,
    *,
    kernels: Sequence[DeviceKernels],
) -> list[str]:
    """`limits` and `data_limits` of a job, with the data it has."""
    has_training = splits.training is not None
    return limits(spec, inventory, has_training=has_training, kernels=kernels) + data_limits(
        spec,
        n_calibration=len(splits.calibration),
        n_search=len(splits.search),
        n_held_out=len(splits.held_out),
    )


def data_limits(spec: JobSpec, *, n_calibration: int, n_search: int, n_held_out: int) -> list[str]:
    """What so few samples cannot show, one sentence each; empty where there are enough.

    An artifact that loses none of n samples may still lose up to 3 / n of all (95 %, the rule
    of three: Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything all right?").
    Samples are too few where that is more than `max_accuracy_drop`, one point where it is not
    set. Calibration is short where fewer samples than asked for could be spared.
    """
    notices = []
    allowed = spec.max_accuracy_drop
    bound = _ONE_POINT if allowed is None else allowed
    few = [
        f"{n} {role} samples (up to {_NONE_LOST / n * 100:.1f} points)"
        for role, n in (("search", n_search), ("held-out", n_held_out))
        if bound > 0 and n * bound < _NONE_LOST
    ]
    if few:
        what = "one point" if allowed is None else f"max_accuracy_drop ({allowed:.2%})"
        notices.append(
            f"the evaluation data is too small to show a loss of {what}: an artifact that loses "
            f"not one sample may still lose more of all: {', '.join(few)}; at least "
            f"{math.ceil(_NONE_LOST / bound)} samples in each part would show it"
        )
    if n_calibration < spec.data.calibration_samples:
        notices.append(
            f"calibrated on {n_calibration} samples, not the {spec.data.calibration_samples} "
            "asked for: the data has no more to spare; name data.training, or give more"
        )
    return notices


def baseline_trials(
    space: SearchSpace, trials: Sequence[TrialRecord]
) -> tuple[TrialRecord | None, TrialRecord | None]:
    """The FP32 and the uniform INT8 trial on the first runtime; None where not tried yet.

    A space without INT8 has no uniform INT8: its candidate would be FP32 under another name.
    """
    by_digest = {trial.candidate.digest: trial for trial in trials}
    fp32, int8 = space.fp32().digest, space.uniform_int8().digest
    return by_digest.get(fp32), None if int8 == fp32 else by_digest.get(int8)


def noise_in_words(again: LatencyReport) -> str:
    """What the A/A run says of the device: FP32 was measured against itself."""
    off = max(again.ratio_high - 1, 1 - again.ratio_low)
    return (
        f"A/A run: FP32 takes {again.ratio:.3f} [{again.ratio_low:.3f}, {again.ratio_high:.3f}] of "
        f"its own latency here; one measurement tells no smaller difference than {off:.1%} for sure"
    )


def state_in_words(report: LatencyReport | None) -> str:
    """Why an interval is wide though it was measured for long; nothing where it is not."""
    if report is None:
        return ""
    found_ns, calibrated_ns = report.reference_p50_ns, report.reference_latency_ns
    is_rest_known = report.reference_rest_ns is not None
    rest_ns = report.reference_rest_ns or calibrated_ns
    said = []
    wider = math.expm1(state_uncertainty(found_ns, calibrated_ns, report.reference_rest_ns))
    if wider >= _WORTH_SAYING:
        moved = found_ns / rest_ns - 1
        state = "it does on this device at rest" if is_rest_known else "when it was calibrated"
        said.append(
            f"while it was measured FP32 took {abs(moved):.0%} {'more' if moved > 0 else 'less'} "
            f"time than {state} (by a neighbour on the host, or by its clock), which makes its "
            f"interval of latency {wider:.0%} wider on each side"
        )
    low_ns, high_ns = level_bounds_ns(found_ns, calibrated_ns, report.reference_rest_ns)
    for moment, side, other_ns in (("slow", "below", low_ns), ("fast", "above", high_ns)):
        apart = max(calibrated_ns / other_ns, other_ns / calibrated_ns) - 1
        if apart >= _WORTH_SAYING:
            said.append(
                f"FP32 was calibrated in a {moment} moment of the device, at "
                f"{calibrated_ns / 1e6:.4g} ms where it takes {other_ns / 1e6:.4g} ms, which makes "
                f"the interval {apart:.0%} wider {side}"
            )
    return "; ".join(said)


def compared_with(job: JobRecord, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """FP32, uniform INT8, and the best baseline on each device as it stands now.

    Once that was measured again, it may be another one.
    """
    limit = job.spec.get("max_accuracy_drop")
    best = [view.best_baseline(limit) for view in views(job, trials)]
    usual = () if job.space is None else baseline_trials(job.space, trials)
    return [trial for trial in (*usual, *best) if trial is not None]


def conclude(
    job: JobRecord,
    view: View,
    found: Answer,
    *,
    stopped_because: str,
    targets: Sequence[TargetResult] = (),
) -> JobResult:
    """The answer with its reasons, for people and programs.

    `view` is the one that the job's objective is about; `targets` are the answers on each device
    of a job on several.
    """
    fp32, int8 = (None, None) if job.space is None else baseline_trials(job.space, view.trials)
    winner = found.winner
    is_baseline = winner.proposed_by == BASELINE
    sentences = [_found_out(found)]
    is_fp32 = fp32 is not None and winner.id == fp32.id
    baseline = view.best_baseline(job.spec.get("max_accuracy_drop"))
    if is_baseline:
        what = "the FP32 model itself" if is_fp32 else "a baseline"
        sentences.append(f"it is {what}: nothing that was searched beats it")
    if job.space is not None and len(job.space.runtimes) > 1:
        sentences.append(f"it runs in {runtime_request(winner.candidate.runtime).text()}")
    held_out = winner.held_out_accuracy
    if held_out is not None and not is_fp32:
        sentences.append(
            f"on {held_out.n_samples} held-out samples it loses {held_out.drop * 100:.2f} points "
            f"({held_out.drop_low * 100:.2f} to {held_out.drop_high * 100:.2f})"
        )
    if baseline is not None and not is_baseline:
        sentences.append(comparison(winner, baseline, at=view.limits.at, shares=view.is_of_worst))
    sentences.append("" if is_fp32 else state_in_words(latency_of(winner)))
    blocking = blocking_of(job, found)
    sentences.append(in_words(blocking))
    return JobResult(
        winner=winner.id,
        verdict=found.verdict,
        explanation="; ".join(sentence for sentence in sentences if sentence),
        missed_by_ns=found.missed_by_ns,
        missed=dict(found.missed),
        blocking_groups=blocking,
        best_baseline=baseline and baseline.id,
        fp32_trial=fp32.id if fp32 else None,
        int8_trial=int8.id if int8 else None,
        beats_baseline=not is_baseline,
        stopped_because=stopped_because,
        targets=list(targets),
    )


def conclude_views(
    job: JobRecord, found: Sequence[tuple[View, Answer | None]], *, stopped_because: str
) -> JobResult | None:
    """The job's answer with those on each of its devices; None where its own view has none.

    `found` begins with the job's own view; where it has several devices the view of each
    follows.
    """
    (own, best), *on_each = found
    if best is None:
        return None
    max_drop = job.spec.get("max_accuracy_drop")
    targets = []
    for view, there in on_each:
        if there is None or view.target is None:
            continue
        baseline = view.best_baseline(max_drop)
        targets.append(
            TargetResult(
                device_id=view.target.device_id,
                winner=there.winner.id,
                verdict=there.verdict,
                explanation=_found_out(there),
                missed_by_ns=there.missed_by_ns,
                latency_budget_ns=view.latency_budget_ns,
                fp32_latency_ns=view.target.reference_latency_ns,
                beats_baseline=there.winner.proposed_by != BASELINE,
                best_baseline=baseline and baseline.id,
                blocking_groups=blocking_of(job, there),
            )
        )
    return conclude(job, own, best, stopped_because=stopped_because, targets=targets)


def blocking_of(job: JobRecord, found: Answer) -> list[BlockingGroup]:
    """What keeps the answer from the latency budget; empty where it is inside, or unknown."""
    excess = found.missed.get("latency")
    if excess is None or job.inventory is None:
        return []
    return blocking_groups(found.winner, job.inventory, excess=excess)


def _found_out(found: Answer) -> str:
    what = "is the nearest" if found.verdict == "impossible_budget" else "wins"
    return f"trial {found.winner.number} {what}: {found.explanation}"


def conclude_cancelled(job: JobRecord, trials: Sequence[TrialRecord]) -> JobResult | None:
    """The answer of a job that was cancelled while it did not run; None without trials."""
    max_drop = job.spec.get("max_accuracy_drop")
    found = [(view, view.answer(max_accuracy_drop=max_drop)) for view in views(job, trials)]
    return conclude_views(job, found, stopped_because=CANCELLED_BY_HAND)


def news_of(trial: TrialRecord) -> dict[str, Any]:
    """What the event of a finished trial says."""
    return {
        "trial": trial.id,
        "number": trial.number,
        "outcome": trial.outcome.value if trial.outcome else None,
        "reason": trial.reason,
        "proposed_by": trial.proposed_by,
        "accuracy": trial.accuracy.value if trial.accuracy else None,
        "latency_ns": trial.latency.p50_ns if trial.latency else None,
    }


def nothing_ranks(trials: Sequence[TrialRecord]) -> str:
    """Why a job with trials has no answer: what kept most of them from ranking."""
    causes = Counter(
        trial.latency.unsteady_reason or "the latency is not steady"
        if trial.latency is not None and not trial.latency.is_steady
        else trial.reason or "no reason given"
        for trial in trials
    )
    (cause, n), *_ = causes.most_common(1) or [("no trial was finished", 0)]
    return (
        f"none of {len(trials)} trials can be ranked; {n} of them because: {cause}. Stop what "
        "else runs on the device, or widen measurement.target_half_width, and resume the job "
        "with more trials"
    )
