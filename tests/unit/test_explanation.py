"""Explanations: what the fitted model says of a trial's groups, and how sure it says it is."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from autotune.api_explanation import Explanation, GroupExplanation
from autotune.errors import JobNotReady
from autotune.search.explanation import explain, fitted_model, model_error
from device_agents.protocol import KernelSpeed, KernelTime, Profile
from search_spaces import (
    FP32,
    INT8,
    Candidate,
    FloatOperator,
    LayerInventory,
    LayerKind,
    RuntimeOptions,
    SearchSpace,
)
from storage.records import JobRecord, JobState, TrialRecord
from storage.sensitivity import Sensitivity
from tests.unit.fakes import description
from tests.unit.records import NOW, latency, trial
from tests.unit.spaces import group

NAMES = tuple("abcdef")
SAVES_MS = dict(zip(NAMES, (0.4, -0.2, 0.8, 0.1, 0.6, 0.3), strict=True))
LOSES = dict(zip(NAMES, (0.0, 0.001, 0.002, 0.0, 0.012, 0.0), strict=True))
BOUNDARY_MS = 0.15
FP32_MS = 4.0
INVENTORY = LayerInventory(
    model_digest="0" * 64,
    groups=tuple(
        group(name, 1000, LayerKind.DEPTHWISE_CONV if name == "b" else LayerKind.CONV)
        for name in NAMES
    ),
)


def job(**changes: Any) -> JobRecord:
    facts: dict[str, Any] = {
        "id": "j-1",
        "name": "planted",
        "state": JobState.FINISHED,
        "phase": "finished",
        "reason": None,
        "spec": {},
        "cancel_requested": False,
        "inventory": INVENTORY,
        "space": SearchSpace.build(INVENTORY, precisions=[INT8]),
        "device_id": "d-1",
        "reference_latency_ns": FP32_MS * 1e6,
        "sensitivity": tuple(
            Sensitivity(group=name, precision="w8a8", mean_kl=2 * LOSES[name], n_samples=400)
            for name in NAMES
        ),
        "created_at": NOW,
    }
    return JobRecord(**{**facts, **changes})


def planted(number: int, quantized: str, **changes: Any) -> TrialRecord:
    """Each group saves and loses its own; every change of precision costs a boundary."""
    crossings = sum(
        (one in quantized) != (two in quantized) for one, two in itertools.pairwise(NAMES)
    )
    ms = FP32_MS - sum(SAVES_MS[name] for name in quantized) + BOUNDARY_MS * crossings
    ms *= 1 + 0.0025 * random.Random(number).gauss(0, 1)
    candidate = Candidate(precisions=dict.fromkeys(quantized, INT8))
    value = 0.95 - sum(LOSES[name] for name in quantized)
    return trial(number, ms, value, half_width=0.005, **{"candidate": candidate} | changes)


def baselines() -> list[TrialRecord]:
    return [
        planted(0, "", proposed_by="baseline"),
        planted(1, "abcdef", proposed_by="baseline"),
    ]


def many() -> list[TrialRecord]:
    """FP32, INT8 and 28 random mixtures."""
    rng = random.Random(1)
    drawn = {"".join(n for n in NAMES if rng.random() < 0.5) for _ in range(60)} - {"", "abcdef"}
    return baselines() + [planted(i, q) for i, q in enumerate(sorted(drawn)[:28], start=2)]


def explained(trials: list[TrialRecord], quantized: str, **changes: Any) -> Explanation:
    return explain(job(**changes), trials, planted(99, quantized), description())


def of(found: Explanation, name: str) -> GroupExplanation:
    return next(entry for entry in found.groups if entry.group == name)


def test_what_a_group_saves_and_loses_is_found_in_mixtures() -> None:
    found = explained(many(), "cde")
    saved = {entry.group: entry.by_itself_ns.value / 1e6 for entry in found.groups}
    for name in "cde":
        assert saved[name] == pytest.approx(SAVES_MS[name], abs=0.1)
        assert of(found, name).lost.value == pytest.approx(LOSES[name], abs=0.002)
    assert saved["a"] == 0, "FP32 against itself"


def test_a_planted_gain_lies_in_the_interval_that_is_told() -> None:
    found = explained(many(), "abcdef")
    inside = [
        entry.by_itself_ns.low <= SAVES_MS[entry.group] * 1e6 <= entry.by_itself_ns.high
        for entry in found.groups
    ]
    assert sum(inside) >= 5
    assert all(entry.saved_ns.measured_share > 0.5 for entry in found.groups)


def test_a_change_of_precision_is_charged_to_the_edge_where_it_happens() -> None:
    found = explained(many(), "cde")
    edges = {entry.group: [edge.neighbour for edge in entry.edges] for entry in found.groups}
    assert edges == {"a": [], "b": ["c"], "c": ["b"], "d": [], "e": ["f"], "f": ["e"]}
    (edge,) = of(found, "c").edges
    assert edge.cost_ns.value / 1e6 == pytest.approx(BOUNDARY_MS, abs=0.06)
    # Alone among FP32 groups a group pays for two boundaries; between 8-bit ones it spares them.
    assert of(found, "d").boundary_ns.value < 0
    assert of(found, "d").saved_ns.value > of(found, "d").by_itself_ns.value


def test_the_groups_and_their_edges_add_up_to_the_prediction() -> None:
    found = explained(many(), "cde")
    own = sum(entry.by_itself_ns.value for entry in found.groups)
    crossings = sum(edge.cost_ns.value for entry in found.groups for edge in entry.edges) / 2
    # What two quantized neighbours do to each other is neither: it is what is left.
    rest = found.fp32_latency_ns - own + crossings - found.latency_ns.value
    assert abs(rest) < 0.15e6
    assert found.latency_ns.low < (FP32_MS - 1.5 + 0.3) * 1e6 < found.latency_ns.high


def test_an_alternative_that_is_slower_or_hurts_is_the_reason() -> None:
    found = explained(many(), "cd")
    assert of(found, "b").why.startswith("w8a8 would be slower by")
    assert "w8a8 would save" in of(found, "e").why and "lose 1" in of(found, "e").why
    assert of(found, "c").why.startswith("saves 0.")


def test_a_job_with_two_trials_says_that_it_guesses() -> None:
    found = explained(baselines(), "cde")
    assert found.n_fitted == 2 and found.model_error is None
    assert "fitted to 2 trials" in found.basis and "no kernel profile" in found.basis
    assert of(found, "c").saved_ns.measured_share < 0.5
    assert "a guess, for few trials tell" in of(found, "c").why
    surer = of(explained(many(), "cde"), "c").saved_ns
    guessed = of(found, "c").saved_ns
    assert surer.high - surer.low < 0.5 * (guessed.high - guessed.low)


def test_the_models_error_is_that_of_trials_left_out() -> None:
    fitted = fitted_model(job(), many())
    assert fitted is not None
    error = model_error(fitted)
    assert error is not None and error.n == len(fitted.trials) - 1
    assert 0 < error.latency < 0.05 and error.latency_covered > 0.8
    mean = sum(t.latency.ratio for t in many() if t.latency) / 30
    spread = sum(abs(t.latency.ratio - mean) / t.latency.ratio for t in many() if t.latency) / 30
    assert error.latency < 0.5 * spread, "better than always saying the mean"


def test_pruning_and_the_runtime_are_parts_of_their_own() -> None:
    quiet = RuntimeOptions(threads=2, spinning=False)
    space = SearchSpace.build(INVENTORY, precisions=[INT8], runtimes=[RuntimeOptions(), quiet])
    pruned = Candidate(prune_ratios={"a": 0.5}, runtime=quiet)
    trials = [*many(), trial(40, 1.0, 0.94, candidate=pruned)]
    found = explain(job(space=space), trials, trials[-1], description())
    assert [(part.part, part.chosen) for part in found.parts] == [
        ("pruning", "1 group by 50 %"),
        ("runtime", "onnxruntime, CPUExecutionProvider, 2 threads, no spinning"),
    ]
    saved = sum(part.saved_ns.value for part in found.parts)
    assert saved == pytest.approx(3e6, rel=0.2)


def test_nothing_is_explained_before_fp32_was_measured() -> None:
    with pytest.raises(JobNotReady, match="no FP32 trial"):
        explained([planted(1, "abcdef")], "cde")


# Uniform INT8


def profiled(record: TrialRecord, **times_ms: float) -> TrialRecord:
    """The trial with a profile; names that are no group are operators between groups."""
    assert record.latency is not None
    kernels = tuple(
        KernelTime(
            name=name,
            operator="Conv" if name in NAMES else name,
            time_ns=ms * 1e6,
            group=name if name in NAMES else None,
        )
        for name, ms in times_ms.items()
    )
    report = record.latency.model_copy(update={"profile": Profile(kernels=kernels, n_runs=9)})
    return replace(record, latency=report)


def slow_int8(**changes: Any) -> list[TrialRecord]:
    fp32, int8 = baselines()
    return [
        profiled(fp32, a=1.0, b=0.5, c=2.0),
        profiled(
            replace(int8, latency=latency(4.6, half_width=0.01), **changes),
            a=0.9, b=0.9, c=2.1, QuantizeLinear=0.2,
        ),
    ]  # fmt: skip


def test_int8_that_is_slower_is_explained_by_kernels_and_conversions() -> None:
    text = explained(slow_int8(), "cde").int8
    assert text is not None
    assert text.startswith("INT8 is slower than FP32 here (1.15 [1.14, 1.16] of its time) because")
    assert "2 of 3 groups take longer in it, 0.5 ms in all (b +0.4 ms, c +0.1 ms)" in text
    assert "spends 0.2 ms more (QuantizeLinear +0.2 ms)" in text


def test_kernel_times_of_the_trial_and_of_the_baselines_are_what_their_profiles_measured() -> None:
    trials = slow_int8()
    a = of(explain(job(), trials, trials[0], description()), "a")
    assert (a.kernel_ns, a.fp32_kernel_ns, a.int8_kernel_ns) == (1.0e6, 1.0e6, 0.9e6)


def test_the_devices_benchmark_and_what_was_not_executed_are_causes_too() -> None:
    speed = {"runtime": "onnxruntime", "ratio": 1.35, "ratio_low": 1.3, "ratio_high": 1.4}
    device = description().model_copy(
        update={
            "kernel_speeds": (
                KernelSpeed(operator="depthwise", precision="w8a8/u8s8", **speed),
                KernelSpeed(operator="conv3x3", precision="w8a8/s8s8", **speed),
            )
        }
    )
    undone = {"group": "d", "planned": "w8a8", "effective": "fp32", "reason": "not fused"}
    unseen = {"group": "a", "planned": "w8a8", "effective": None, "reason": "not seen"}
    trials = slow_int8(compression={"groups": [undone, unseen]})
    inventory = replace(
        INVENTORY, float_operators=(FloatOperator(operator="HardSwish", count=9, reason="none"),)
    )
    text = explain(job(inventory=inventory), trials, trials[0], device).int8 or ""
    assert "a depthwise convolution takes 1.35 [1.3, 1.4] of FP32's time in 8 bits" in text
    assert "3x3" not in text, "this device's kernels take unsigned activations"
    assert "1 of 2 groups do not run as planned (1 of them: not fused)" in text
    explained_trial = explain(job(inventory=inventory), trials, trials[1], device)
    assert "what it runs as is unknown (not seen)" in of(explained_trial, "a").why
    assert "9 operators stay in FP32 between 8-bit ones (9 HardSwish)" in text


def test_without_profiles_the_fitted_model_stands_in_and_says_so() -> None:
    trials = many()
    trials[1] = replace(trials[1], latency=latency(4.6, half_width=0.01))
    text = explained(trials, "cde").int8 or ""
    assert "by the fitted model (no kernel profile is stored)" in text and "b +0." in text


def test_int8_that_is_faster_is_said_to_be_with_the_groups_that_lose() -> None:
    assert (explained(many(), "c").int8 or "").startswith("INT8 is faster than FP32 here")
    fp32, int8 = baselines()
    trials = [profiled(fp32, a=1.0, b=0.5), profiled(int8, a=0.4, b=0.7)]
    text = explained(trials, "c").int8 or ""
    assert "but the kernels of 1 of 2 groups take longer in it: b +0.2 ms" in text


def test_a_space_without_int8_has_nothing_to_say_of_it() -> None:
    space = SearchSpace.build(INVENTORY, precisions=[FP32])
    found = explain(job(space=space), [baselines()[0]], baselines()[0], None)
    assert found.int8 is None and found.groups == []
