"""What the headline benchmark asks for, and how it states what a bundle loses."""

from pathlib import Path

import pytest

from autotune.spec import parse_job
from storage.records import AccuracyReport
from tests.benchmarks import headline


@pytest.mark.parametrize("model", headline.MODELS)
def test_the_job_asks_for_the_fastest_within_a_point_on_one_thread(model: str) -> None:
    spec = parse_job(headline.job_document(model, Path("weights.safetensors")))
    assert (spec.max_accuracy_drop, spec.latency_budget) == (0.01, None)
    assert spec.search.threads == (1,)
    assert max(spec.search.prune_ratios) > 0.5
    assert spec.search.time_s is not None
    assert spec.search.time_s < 2400


def test_points_lost_are_the_paired_drop_in_points() -> None:
    report = AccuracyReport(
        split="held_out",
        n_samples=600,
        value=0.935,
        value_low=0.91,
        value_high=0.95,
        fp32_value=0.94,
        drop=0.005,
        drop_low=-0.004,
        drop_high=0.014,
        mean_kl=0.01,
        wall_s=1.0,
    )
    figure = headline.points_lost(report)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.5, -0.4, 1.4))
    assert figure.n == 600
