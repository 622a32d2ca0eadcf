"""What the benchmarks of measurements and of the fleet make of what they saw."""

import math

import numpy as np
import pytest

from storage.records import MeasurementRecord, MeasurementState
from tests import running_service
from tests.benchmarks import device_time, fleet, latency_spread
from tests.benchmarks.protocols import Measured, interquartile_range, ratio_of_means, share
from tests.benchmarks.simulated_agents import Ledger
from tests.unit import fabricated_job


def measured(ratio, half_width=0.01, device_s=1.0):
    return Measured(
        ratio=ratio,
        low=ratio * (1 - half_width),
        high=ratio * (1 + half_width),
        device_s=device_s,
        n_samples=20,
        reference_ns=1e6,
    )


def test_a_ratio_of_means_has_the_interval_of_independent_runs():
    generator = np.random.default_rng(1)
    found = []
    for _ in range(200):
        a, b = generator.normal(50, 5, 100), generator.normal(100, 10, 100)
        found.append(ratio_of_means(a, b, device_s=1.0))
    assert np.mean([x.ratio for x in found]) == pytest.approx(0.5, rel=0.01)
    assert 0.9 <= np.mean([x.claims(0.5) for x in found]) <= 0.99


def test_an_interquartile_range_is_a_fraction_and_the_same_upside_down():
    ratios = [0.5 * 1.01**n for n in range(5)]
    assert interquartile_range(ratios) == pytest.approx(2 * np.log(1.01))
    assert interquartile_range([1 / x for x in ratios]) == pytest.approx(2 * np.log(1.01))


def test_a_share_has_an_exact_interval():
    figure = share([True] * 19 + [False])
    assert figure.value == 0.95
    assert (figure.low, figure.high, figure.n) == (
        pytest.approx(0.751, abs=1e-3),
        pytest.approx(0.9987, abs=1e-4),
        20,
    )


def spread_of(width):
    """Repeats around 0.5 whose ratios spread by that much."""
    return [measured(0.5 * (1 + width * (n - 2)), half_width=0.015) for n in range(5)]


@pytest.fixture
def spreads():
    turns = {
        "agent": spread_of(0.01),
        "usual": spread_of(0.05),
        "agent_same": [
            measured(1.005),
            measured(0.98),
            measured(1.0),
            measured(1.0),
            measured(1.0),
        ],
    }
    return {"idle": turns, "loaded": turns | {"agent": spread_of(0.02)}}


def test_spreads_are_compared_within_a_condition(spreads):
    found = latency_spread.figures(spreads)
    assert found["iqr_ratio_idle"].value == pytest.approx(0.2, rel=0.01)
    assert found["iqr_ratio_loaded"].value == pytest.approx(0.4, rel=0.01)


def test_intervals_are_held_against_the_median_of_their_condition(spreads):
    found = latency_spread.figures(spreads)
    # Idle: 1 % off is inside ±1.5 %, 2 % off is not; loaded: 2 % and 4 % are not.
    assert found["coverage"].value == pytest.approx((3 + 1) / 10)
    assert found["false_difference_rate"].value == pytest.approx(2 / 10)


def test_device_seconds_are_summed_over_the_models_medians():
    turns = {
        "short": {
            "agent": [measured(1.0, device_s=s) for s in (1, 1, 9)],
            "fixed": [measured(1.0)],
        },
        "long": {
            "agent": [measured(1.02, device_s=5)],
            "fixed": [measured(1.005, 0.02, device_s=19)],
        },
    }
    found = device_time.figures(turns)
    assert found["device_seconds_ratio"].value == pytest.approx((1 + 5) / (1 + 19))
    assert found["device_seconds_ratio_once"].value == found["device_seconds_ratio"].value
    assert found["coverage"].value == pytest.approx(3 / 4)
    assert found["coverage_fixed"].value == found["coverage_fixed_2pct"].value == 1


def test_fixed_runs_that_spread_are_done_as_often_as_two_per_cent_takes():
    off = [measured(math.exp(x), device_s=2) for x in (0.05, -0.05)]
    found = device_time.figures({"model": {"agent": [measured(1.0, device_s=12)], "fixed": off}})
    assert found["device_seconds_ratio_once"].value == pytest.approx(6)
    assert found["device_seconds_ratio"].value == pytest.approx(6 / (1.96 * 2.5) ** 2, rel=1e-3)


def done(name, token):
    return MeasurementRecord(
        id=name,
        job_id="job-1",
        trial_id=None,
        device_id="dev-1",
        request=running_service.request(),
        state=MeasurementState.DONE,
        fencing_token=token,
        attempts=1,
        report=fabricated_job.latency(1e6),
        created_at=fabricated_job.START,
    )


def test_a_measurement_with_the_acknowledged_result_is_neither_lost_nor_duplicated():
    ledger = Ledger(accepted={"m-1": {2}})
    assert fleet.audit([done("m-1", 2)], ["m-1"], ledger) == ([], [])


@pytest.mark.parametrize(
    ("kept", "acknowledged"),
    [([], {"m-1": {1}}), ([done("m-1", 1)], {}), ([done("m-1", 2)], {"m-1": {1}})],
)
def test_a_result_that_is_gone_or_another_than_acknowledged_is_lost(kept, acknowledged):
    lost, duplicated = fleet.audit(kept, ["m-1"], Ledger(accepted=acknowledged))
    assert (lost, duplicated) == (["m-1"], [])


def test_two_acknowledged_leases_of_one_measurement_are_a_duplicate():
    ledger = Ledger(accepted={"m-1": {1, 2}})
    assert fleet.audit([done("m-1", 2)], ["m-1"], ledger) == ([], ["m-1"])
