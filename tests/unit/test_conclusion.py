"""What a job is told before it starts: limits of its model and of its data."""

from __future__ import annotations

from autotune.search.conclusion import data_limits, limits
from autotune.spec import JobSpec, parse_job
from search_spaces import FloatOperator, LayerInventory


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
    assert "max_accuracy_drop (0.5 points)" in text
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
    inventory = LayerInventory(model_digest="0" * 64, groups=(), float_operators=operators)
    (notice,) = limits(job(search={"prune_ratios": [0.0]}), inventory, has_training=False)
    assert notice == (
        "operators that stay in FP32: 12 Erf (it has no 8-bit kernel), 1 org.acme:Whiten "
        "(nothing is known of it)"
    )


def test_an_inventory_of_the_first_version_is_still_read() -> None:
    document = {
        "version": 1, "model_digest": "0" * 64, "groups": [], "prunable_groups": [],
        "float_operators": [["Erf", 2]], "pruning_unavailable": None,
    }  # fmt: skip
    (operator,) = LayerInventory.from_json(document).float_operators
    assert (operator.operator, operator.count) == ("Erf", 2)
