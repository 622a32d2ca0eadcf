"""Why uniform INT8 is slower than FP32 on a device, where it is.

Owns the sentence and what it rests on: the kernel profiles of the two baselines, the device's
own benchmark of kernels, and what the runtime really executes. Without profiles the fitted
model's figures stand in, and the sentence says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autotune.api_explanation import Estimate
from autotune.compression.kernels import kernels_of
from autotune.search.conclusion import baseline_trials
from autotune.search.front import latency_of, profile_of
from device_agents.protocol import DeviceDescription, LatencyReport, Profile
from search_spaces import LayerInventory
from storage.records import JobRecord, TrialRecord

_NAMED = 3
"""Groups or operators named in a sentence; the table has all of them."""

_OPERATORS = {
    "conv3x3": "a 3x3 convolution",
    "conv1x1": "a 1x1 convolution",
    "depthwise": "a depthwise convolution",
    "matmul": "a matrix product",
}


def why_int8(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    device: DeviceDescription | None,
    predicted: Sequence[tuple[str, Estimate]],
) -> str | None:
    """The sentence; None where one of the two baselines has no latency.

    `predicted` is what the fitted model thinks that INT8 saves in each group by itself, in ns.
    """
    if job.space is None:
        return None
    fp32_trial, int8_trial = baseline_trials(job.space, trials)
    if fp32_trial is None or int8_trial is None:
        return None
    fp32, int8 = latency_of(fp32_trial), latency_of(int8_trial)
    if fp32 is None or int8 is None:
        return None
    figure = f"{int8.ratio:.3g} [{int8.ratio_low:.3g}, {int8.ratio_high:.3g}] of its time"
    if int8.ratio_high < fp32.ratio_low:
        return _faster(figure, _profiles(fp32_trial, int8_trial))
    causes = [
        *_kernels(_profiles(fp32_trial, int8_trial), predicted),
        *_benchmark(device, int8),
        *_not_executed(int8_trial),
        *_float_operators(job.inventory),
    ]
    because = "; ".join(causes) or "neither profiles nor the device's own benchmark tell"
    if int8.ratio_low > fp32.ratio_high:
        return f"INT8 is slower than FP32 here ({figure}) because {because}"
    return f"INT8 is not known to be faster than FP32 here ({figure}): {because}"


def _profiles(fp32: TrialRecord, int8: TrialRecord) -> tuple[Profile, Profile] | None:
    """The kernel profiles of both; None unless both have times of groups."""
    before, after = profile_of(fp32), profile_of(int8)
    return None if before is None or after is None else (before, after)


def _changes(profiles: tuple[Profile, Profile]) -> dict[str, float]:
    """What INT8 adds to each group's kernels, in ns; negative where it is faster."""
    before, after = (profile.group_ns() for profile in profiles)
    return {name: after[name] - before[name] for name in before if name in after}


def _faster(figure: str, profiles: tuple[Profile, Profile] | None) -> str:
    text = f"INT8 is faster than FP32 here ({figure})"
    changes = {} if profiles is None else _changes(profiles)
    slower = {name: ns for name, ns in changes.items() if ns > 0}
    if not slower:
        return text
    return (
        f"{text}, but the kernels of {len(slower)} of {len(changes)} groups take longer in it: "
        f"{_largest(slower)}"
    )


def _kernels(
    profiles: tuple[Profile, Profile] | None, predicted: Sequence[tuple[str, Estimate]]
) -> list[str]:
    """Groups whose kernels take longer, and what lies between groups."""
    if profiles is None:
        slower = {name: -saved.value for name, saved in predicted if saved.value < 0}
        if not slower:
            return []
        return [
            f"by the fitted model (no kernel profile is stored) {len(slower)} of "
            f"{len(predicted)} groups are slower in it: {_largest(slower)}"
        ]
    causes = []
    changes = _changes(profiles)
    slower = {name: ns for name, ns in changes.items() if ns > 0}
    gained = -sum(ns for ns in changes.values() if ns < 0)
    if slower:
        causes.append(
            f"the kernels of {len(slower)} of {len(changes)} groups take longer in it, "
            f"{_ms(sum(slower.values()))} in all ({_largest(slower)}), while the others gain "
            f"{_ms(gained)}"
        )
    before, after = (profile.other_ns() for profile in profiles)
    between = {
        operator: ns - before.get(operator, 0.0)
        for operator, ns in after.items()
        if ns > before.get(operator, 0.0)
    }
    if between:
        causes.append(
            f"between groups, converting and what stays in FP32, it spends "
            f"{_ms(sum(between.values()))} more ({_largest(between)})"
        )
    return causes


def _benchmark(device: DeviceDescription | None, int8: LatencyReport) -> list[str]:
    """Kinds of operators that the device itself found slower in 8 bits."""
    if device is None:
        return []
    signs = "s8s8" if kernels_of(device).signed_activations else "u8s8"
    slow = [
        f"{_OPERATORS.get(speed.operator, speed.operator)} takes {speed.ratio:.3g} "
        f"[{speed.ratio_low:.3g}, {speed.ratio_high:.3g}] of FP32's time in 8 bits"
        for speed in device.kernel_speeds
        if (speed.runtime, speed.precision) == (int8.runtime.runtime, f"w8a8/{signs}")
        and speed.ratio_low is not None
        and speed.ratio_low > 1
    ]
    return [f"by the device's own benchmark {', '.join(slow)}"] if slow else []


def _not_executed(int8: TrialRecord) -> list[str]:
    """Groups that were planned in 8 bits and run as something else."""
    groups = (int8.compression or {}).get("groups", ())
    wrong = [group for group in groups if group["effective"] not in (None, group["planned"])]
    if not wrong:
        return []
    (reason, n), *_ = Counter(str(g["reason"] or "no reason known") for g in wrong).most_common()
    return [f"{len(wrong)} of {len(groups)} groups do not run as planned ({n} of them: {reason})"]


def _float_operators(inventory: LayerInventory | None) -> list[str]:
    operators = () if inventory is None else inventory.float_operators
    if not operators:
        return []
    named = ", ".join(f"{operator.count} {operator.operator}" for operator in operators[:_NAMED])
    total = sum(operator.count for operator in operators)
    return [f"{total} operators stay in FP32 between 8-bit ones ({named})"]


def _largest(costs: dict[str, float]) -> str:
    ordered = sorted(costs, key=lambda name: -costs[name])
    named = ", ".join(f"{name} +{_ms(costs[name])}" for name in ordered[:_NAMED])
    return f"{named}, ..." if len(ordered) > _NAMED else named


def _ms(duration_ns: float) -> str:
    return f"{duration_ns / 1e6:.2g} ms"
