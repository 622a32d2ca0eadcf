"""What the main benchmark reads out of a bundle, and how it judges it."""

import copy

import pytest
import yaml

from autotune.export.bundle import bundle_files
from autotune.spec import parse_job
from examples.digits.prepare import job_text
from tests.benchmarks import main_job
from tests.unit import fabricated_job as fabricated


@pytest.fixture(scope="module")
def exported() -> dict:
    inventory = fabricated.inventory()
    trials = fabricated.trials(inventory)
    files = bundle_files(
        job=fabricated.job(inventory),
        trial=trials[7],
        device=fabricated.device(),
        model=fabricated.linear_model(),
        fp32_trial=trials[0],
        int8_trial=trials[1],
    )
    return yaml.safe_load(files["reports.json"])["figures"]


@pytest.fixture
def figures(exported: dict) -> dict:
    return copy.deepcopy(exported)


def test_speedups_come_from_the_confirmed_ratio(figures: dict) -> None:
    found = main_job.job_figures(figures, wall_s=123.44)
    winner = found["winner_speedup"]
    assert winner.value == pytest.approx(1 / 0.474)
    assert winner.low < winner.value < winner.high
    assert winner.n == 960
    assert found["int8_speedup"].value == pytest.approx(1.6)
    assert found["wall_s"].value == 123.4


def test_a_trial_that_was_not_confirmed_falls_back_to_screening(figures: dict) -> None:
    figures["int8"]["latency"]["confirmed"] = None
    figures["int8"]["accuracy"]["held_out"] = None
    found = main_job.job_figures(figures, wall_s=1.0)
    assert (found["int8_speedup"].n, found["int8_accuracy"].n) == (320, 400)
    assert found["int8_accuracy"].value == pytest.approx(0.938)


def test_accuracies_are_the_held_out_ones(figures: dict) -> None:
    found = main_job.job_figures(figures, wall_s=1.0)
    assert found["winner_accuracy"].value == pytest.approx(0.941)
    assert found["fp32_accuracy"].value == pytest.approx(0.948)
    assert found["winner_accuracy"].n == 600


def test_int8_without_figures_has_no_keys(figures: dict) -> None:
    figures["int8"] = None
    assert not [k for k in main_job.job_figures(figures, wall_s=1.0) if k.startswith("int8")]
    assert main_job.at_least_int8(figures) is None


@pytest.mark.parametrize(
    ("value", "fast", "expected"),
    [(0.941, True, True), (0.935, True, True), (0.90, True, False), (0.96, False, False)],
)
def test_the_winner_is_held_against_uniform_int8(
    figures: dict, value: float, fast: bool, expected: bool
) -> None:
    held_out = figures["winner"]["accuracy"]["held_out"]
    held_out.update(value=value, value_low=value - 0.01, value_high=value + 0.01)
    if not fast:
        confirmed = figures["winner"]["latency"]["confirmed"]
        confirmed.update(ratio=0.9, ratio_low=0.89, ratio_high=0.91)
    assert main_job.at_least_int8(figures) is expected


@pytest.mark.parametrize("model", main_job.MODELS)
def test_the_quick_job_is_a_valid_one_without_pruning(model: str) -> None:
    document = main_job.quick_document(yaml.safe_load(job_text(model)))
    spec = parse_job(document)
    assert spec.search.prune_ratios == (0.0,)
    assert spec.search.trials < 10
    assert spec.latency_budget is not None
