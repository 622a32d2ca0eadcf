"""What a job is told before it starts and at its end: limits of its model, its data and device."""

from __future__ import annotations

import pytest

from autotune.errors import InvalidModel
from autotune.search.conclusion import data_limits, limits, state_in_words
from autotune.spec import JobSpec, parse_job
from device_agents.protocol import LatencyReport
from search_spaces import FloatOperator, LayerGroup, LayerInventory, PrunableGroup
from tests.unit.records import latency


def job(**keys: object) -> JobSpec:
    return parse_job(
        {"model": {"source": "onnx:m.onnx"}, "data": {"evaluation": "npz:e.npz"}, **keys}
    )


def told(spec: JobSpec, *, calibration: int = 128, search: int = 400, held_out: int = 600) -> str:
    sizes = {"n_calibration": calibration, "n_search": search, "n_held_out": held_out}
    return "\n".join(data_limits(spec, **sizes))


def test_enough_samples_need_no_notice() -> None:
    assert told(job(max_accuracy_drop=0.01)) == ""
    assert told(job()) == ""


def test_parts_too_small_for_the_allowed_drop_are_named_with_what_they_leave_open() -> None:
    text = told(job(max_accuracy_drop=0.005), search=400, held_out=600)
    assert "max_accuracy_drop (0.50%)" in text
    assert "400 search samples (up to 0.8 points)" in text
    assert "held-out samples" not in text, "3 / 600 is the drop itself"
    assert "at least 600 samples" in text


def test_without_an_allowed_drop_one_point_is_the_measure() -> None:
    text = told(job(), search=40, held_out=60)
    assert "a loss of one point" in text
    assert "40 search samples (up to 7.5 points), 60 held-out samples (up to 5.0 points)" in text


def test_short_calibration_is_told() -> None:
    assert "calibrated on 1 samples, not the 128 asked for" in told(job(), calibration=1)


def test_operators_that_stay_float_are_listed_once_with_their_reason() -> None:
    operators = (
        FloatOperator(operator="Erf", count=12, reason="it has no 8-bit kernel"),
        FloatOperator(operator="org.acme:Whiten", count=1, reason="nothing is known of it"),
    )
    layer_group = LayerGroup(name="fc", layers=(), nodes=("fc",), precisions=("fp32",))
    inventory = LayerInventory(
        model_digest="0" * 64, groups=(layer_group,), float_operators=operators
    )
    notices = limits(job(search={"prune_ratios": [0.0]}), inventory, has_training=False)
    assert (
        "operators that stay in FP32: 12 Erf (it has no 8-bit kernel), 1 org.acme:Whiten "
        "(nothing is known of it)"
    ) in notices


def test_groups_that_batch_norm_cannot_rank_are_counted() -> None:
    groups = tuple(
        PrunableGroup(name=name, channels=32, layers=(name,), batch_norms=norms)
        for name, norms in (("a", ("a_norm",)), ("b", ()), ("c", ()))
    )
    inventory = LayerInventory(model_digest="0" * 64, groups=(), prunable_groups=groups)
    spec = job(search={"prune_importance": "batch_norm"})
    (notice,) = limits(spec, inventory, has_training=True)
    assert "2 of 3 prunable groups have no BatchNorm" in notice
    assert limits(job(), inventory, has_training=True) == []


def test_a_model_without_a_layer_is_refused_with_what_it_has() -> None:
    softmax = FloatOperator(operator="Softmax", count=1, reason="it has no 8-bit kernel")
    empty = LayerInventory(model_digest="0" * 64, groups=(), float_operators=(softmax,))
    with pytest.raises(InvalidModel, match=r"nothing in the model can be tuned.*1 Softmax"):
        limits(job(), empty, has_training=True)


def test_an_inventory_of_the_first_version_is_still_read() -> None:
    document = {
        "version": 1, "model_digest": "0" * 64, "groups": [], "prunable_groups": [],
        "float_operators": [["Erf", 2]], "pruning_unavailable": None,
    }  # fmt: skip
    (operator,) = LayerInventory.from_json(document).float_operators
    assert (operator.operator, operator.count) == ("Erf", 2)


def test_a_device_in_another_state_than_when_it_was_calibrated_is_told_with_what_it_costs() -> None:
    busy = state_in_words(latency(2.0, reference_p50_ns=4.2e6))
    assert busy.startswith("while it was measured FP32 took 5% more time than when it was calib")
    assert busy.endswith("which makes its interval of latency 5% wider on each side")
    assert "20% less time" in state_in_words(latency(2.0, reference_p50_ns=3.2e6))


def test_a_device_that_is_not_at_rest_is_told_with_what_it_costs() -> None:
    bad = state_in_words(latency(2.0, reference_p50_ns=4.24e6, reference_rest_ns=4e6))
    assert "took 6% more time than it does on this device at rest" in bad
    assert bad.endswith("which makes its interval of latency 6% wider on each side")
    fast = latency(2.0, reference_p50_ns=3.95e6, reference_rest_ns=4e6)
    assert state_in_words(fast) == "", "faster than at rest is no worse"


@pytest.mark.parametrize(
    ("found_ns", "rest_ns", "words"),
    [
        (3.8e6, 3.8e6, "slow moment of the device, at 4 ms where it takes 3.8 ms"),
        (3.8e6, 4e6, "slow moment of the device, at 4 ms where it takes 3.8 ms"),
        (4.4e6, 4.4e6, "fast moment of the device, at 4 ms where it takes 4.4 ms"),
    ],
)
def test_a_calibration_in_a_bad_minute_is_told_with_what_it_costs(
    found_ns: float, rest_ns: float, words: str
) -> None:
    told = state_in_words(latency(2.0, reference_p50_ns=found_ns, reference_rest_ns=rest_ns))
    assert told.startswith(f"FP32 was calibrated in a {words}, which makes the interval")
    assert told.endswith("5% wider below" if found_ns < 4e6 else "10% wider above")


@pytest.mark.parametrize("report", [None, latency(2.0), latency(2.0, reference_p50_ns=4.05e6)])
def test_a_device_in_its_calibrated_state_is_not_talked_about(report: LatencyReport | None) -> None:
    assert state_in_words(report) == ""
