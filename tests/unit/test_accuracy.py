"""Accuracy reports: intervals with their published examples, and real artifacts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from autotune.compression.accuracy import (
    AccuracyEvaluator,
    mean_kl_divergence,
    paired_difference_interval,
    wilson_interval,
)
from autotune.compression.data import LabelledData
from autotune.compression.racing import Race
from autotune.errors import CompressionError, InvalidModel
from search_spaces import INT8, W4
from storage.records import AccuracyReport
from tests.unit.compression_models import labelled, quantizable, run, samples, tiny_source


def pairs(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    left = np.array([True] * (both + first) + [False] * (second + neither))
    right = np.array([True] * both + [False] * first + [True] * second + [False] * neither)
    return left, right


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1),
    ],
)
def test_the_wilson_interval_gives_the_published_figures(
    successes: int, n: int, low: float, high: float
) -> None:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I."""
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((54, 0, 0, 0), -0.0664, 0.0664),
    ],
)
def test_the_paired_interval_follows_newcombes_method_10(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    """The figures are the paper's, table II."""
    assert paired_difference_interval(*pairs(*counts)) == pytest.approx((low, high), abs=5e-4)


def test_the_paired_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        first = rng.random(200) < 0.92
        second = np.where(rng.random(200) < 0.06, rng.random(200) < 0.5, first)
        low, high = paired_difference_interval(first, second)
        covered += low <= 0.06 * (0.92 - 0.5) <= high
    assert covered / 2000 >= 0.94


def test_fp32_against_itself_loses_nothing() -> None:
    evaluator = AccuracyEvaluator(tiny_source().fp32_bytes, labelled(40), split="search")
    report = evaluator.evaluate(tiny_source().fp32_bytes)
    assert (report.drop, report.mean_kl) == (0.0, 0.0)
    assert report.value == report.fp32_value
    assert report.drop_low < 0 < report.drop_high


def test_the_report_is_about_the_artifact_itself() -> None:
    data = labelled(40)
    artifact = quantizable("tiny").emit({"head": INT8, "hidden": W4})
    report = AccuracyEvaluator(tiny_source().fp32_bytes, data, split="search").evaluate(artifact)
    answers = run(artifact, data.x).argmax(axis=1)
    assert report.value == pytest.approx((answers == data.y).mean())
    assert report.value_low < report.value < report.value_high
    assert report.n_samples == 40
    assert report.mean_kl > 0


def test_a_drop_of_six_in_three_hundred_samples_is_two_points_and_not_a_rounding_more() -> None:
    x = samples(300, seed=5)
    fp32, artifact = tiny_source().fp32_bytes, against_half_of_the_answers()[1]
    answers, others = (run(model, x).argmax(axis=1) for model in (fp32, artifact))
    differing = np.flatnonzero(answers != others)
    labels = answers.copy()
    for index in differing[6:]:  # neither is right
        labels[index] = ({0, 1, 2} - {answers[index], others[index]}).pop()
    data = LabelledData(x=x, y=labels)
    report = AccuracyEvaluator(fp32, data, split="search").evaluate(artifact)
    assert len(differing) > 6
    assert report.drop == 0.02 != report.fp32_value - report.value


def test_read_only_samples_are_accepted() -> None:
    data = labelled(20)
    data.x.setflags(write=False)
    AccuracyEvaluator(tiny_source().fp32_bytes, data, split="search")


def test_an_artifact_that_does_not_run_is_refused() -> None:
    evaluator = AccuracyEvaluator(tiny_source().fp32_bytes, labelled(4), split="search")
    with pytest.raises(CompressionError, match="onnxruntime cannot run the artifact"):
        evaluator.evaluate(b"no model")
    with pytest.raises(InvalidModel, match="the FP32 model cannot be evaluated"):
        AccuracyEvaluator(b"no model", labelled(4), split="search")


def test_an_artifact_that_answers_nan_is_refused() -> None:
    model = onnx.load_from_string(tiny_source().fp32_bytes)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.raw_data = np.full(5, np.nan, np.float32).tobytes()
    evaluator = AccuracyEvaluator(tiny_source().fp32_bytes, labelled(4), split="search")
    with pytest.raises(CompressionError, match="NaN or infinite on 4 samples"):
        evaluator.evaluate(model.SerializeToString())


def test_a_race_over_all_samples_gives_the_full_report() -> None:
    artifact = quantizable("tiny").emit({"head": W4})
    evaluator = AccuracyEvaluator(tiny_source().fp32_bytes, labelled(30), split="search")
    full, raced = (
        replace(evaluator.evaluate(artifact, race=race), wall_s=0.0, mean_kl=0.0)
        for race in (None, Race(limit=0.9))
    )
    assert raced == full
    assert full.stopped_early is None and full.drop_error is None


def test_a_complete_report_has_the_margins_that_others_race_by() -> None:
    artifact = quantizable("tiny").emit({"head": W4})
    evaluator = AccuracyEvaluator(tiny_source().fp32_bytes, labelled(30), split="search")
    report, shown = evaluator.complete(artifact)
    assert replace(report, wall_s=0.0) == replace(evaluator.evaluate(artifact), wall_s=0.0)
    assert shown.margins.shape == (30,) and shown.divergences.mean() == pytest.approx(
        report.mean_kl
    )
    assert (shown.margins > 0).mean() == pytest.approx(report.value)
    # Raced by its own margins every sample is foreseen, and the first ones tell the drop.
    raced = evaluator.evaluate(artifact, race=Race(limit=0.9, auxiliary=shown))
    assert raced.drop == pytest.approx(report.drop, abs=1 / 30)


def test_a_race_that_is_lost_says_so_and_compares_with_full_reports() -> None:
    evaluator, worse = against_half_of_the_answers()
    full = evaluator.evaluate(worse)
    report = evaluator.evaluate(worse, race=Race(limit=0.01))
    assert report.n_samples < full.n_samples == 320
    assert report.stopped_early == (
        f"{report.n_samples} of 320 samples were enough: the accuracy drop exceeds 1 points "
        "(error rate 5 %)"
    )
    assert report.fp32_value == full.fp32_value == 1.0
    assert report.value == pytest.approx(1 - report.drop)
    assert report.drop_low < full.drop < report.drop_high
    assert report.value_low < full.value < report.value_high
    assert abs(report.drop - full.drop) < 3 * (report.drop_error or 0.0)
    assert 0.3 < report.mean_kl / full.mean_kl < 3


def test_a_race_ends_when_the_rest_would_hardly_change_what_is_known() -> None:
    evaluator, _ = against_half_of_the_answers()
    fp32 = evaluator.evaluate(tiny_source().fp32_bytes, race=Race(limit=0.05))
    assert fp32.n_samples == 32
    assert fp32.drop == pytest.approx(0.0, abs=1e-9) and fp32.drop_error == 1 / 320
    assert fp32.stopped_early is not None
    assert fp32.stopped_early.endswith("almost none of those left are expected to change sides")


def test_a_race_and_all_samples_give_equal_figures_to_the_last_bit() -> None:
    n_equal = 0
    for n_wrong in range(0, 40, 2):
        evaluator, worse = against_part_of_the_answers(0.03, n_wrong=n_wrong)
        full, shown = evaluator.complete(worse)
        raced = evaluator.evaluate(worse, race=Race(limit=1, auxiliary=shown, likeness=1.0))
        assert raced.n_samples < full.n_samples
        if raced.drop == pytest.approx(full.drop, abs=1e-9):
            assert (raced.value, raced.drop) == (full.value, full.drop)
            n_equal += full.drop > 0
    assert n_equal > 5


def test_a_stopped_report_survives_storage_and_old_ones_saw_all_samples() -> None:
    evaluator, worse = against_half_of_the_answers()
    report = evaluator.evaluate(worse, race=Race(limit=0.01))
    assert AccuracyReport.from_json(report.to_json()) == report
    later = ("stopped_early", "drop_error")
    old = {k: v for k, v in report.to_json().items() if k not in later}
    assert AccuracyReport.from_json(old).stopped_early is None


def against_half_of_the_answers() -> tuple[AccuracyEvaluator, bytes]:
    """An evaluator whose labels are FP32's own answers, and a model that gives half of them."""
    return against_part_of_the_answers(0.5, n_wrong=0)


def against_part_of_the_answers(lost: float, *, n_wrong: int) -> tuple[AccuracyEvaluator, bytes]:
    """The same with a model that loses such a part; the first labels are wrong for either."""
    x = samples(320, seed=5)
    logits = run(tiny_source().fp32_bytes, x)
    answers = logits.argmax(axis=1)
    favourite = int(np.bincount(answers).argmax())
    margin = logits[:, favourite] - np.delete(logits, favourite, axis=1).max(axis=1)
    model = onnx.load_from_string(tiny_source().fp32_bytes)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            bias = numpy_helper.to_array(tensor).copy()
            bias[favourite] -= np.quantile(margin, lost)
            tensor.raw_data = bias.tobytes()
    least_likely = logits.argmin(axis=1)
    labels = np.where(np.arange(len(x)) < n_wrong, least_likely, answers)
    data = LabelledData(x=x, y=labels)
    evaluator = AccuracyEvaluator(tiny_source().fp32_bytes, data, split="search")
    return evaluator, model.SerializeToString()


def test_the_divergence_is_the_textbook_sum() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert mean_kl_divergence(np.log(p), np.log(q)) == pytest.approx(expected)
    assert mean_kl_divergence(np.log(p), np.log(p)) == 0.0
    assert np.isnan(mean_kl_divergence(np.log(p), np.full(p.shape, np.nan))), "not the best of all"


@pytest.mark.parametrize("counts", [(18, 14, 0, 18), (5, 0, 9, 80), (0, 3, 4, 0)])
def test_the_paired_interval_agrees_with_the_formula_written_out_again(
    counts: tuple[int, int, int, int],
) -> None:
    expected = pytest.approx(_by_hand(*counts), abs=1e-12)
    assert paired_difference_interval(*pairs(*counts)) == expected


def _by_hand(e: int, f: int, g: int, h: int) -> tuple[float, float]:
    n = e + f + g + h
    p1, p2 = (e + f) / n, (e + g) / n
    (l1, u1), (l2, u2) = wilson_interval(e + f, n), wilson_interval(e + g, n)
    margins = (e + f) * (g + h) * (e + g) * (f + h)
    a = e * h - f * g
    phi = 0.0 if margins == 0 else (max(a - n / 2, 0) if a > 0 else a) / margins**0.5
    delta = ((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2) ** 0.5
    epsilon = ((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2) ** 0.5
    return p1 - p2 - delta, p1 - p2 + epsilon
