"""What counts of a measurement, and how much: against naive code and by simulation."""

import math

import numpy as np
import pytest

from device_agents.latency import TimedBlock, ratio_interval
from device_agents.undisturbed import (
    LARGEST_EXPONENT,
    SLOWDOWN,
    Pairs,
    Weighted,
    bootstrap,
    levels_of,
    run_length,
)
from tests.unit.simulated_blocks import (
    RATIO,
    blocks_of,
    in_spells,
    pair_order,
    simulated_device,
)


def test_pairs_agree_with_a_loop_over_blocks():
    generator = np.random.default_rng(1)
    is_candidate = pair_order(generator, 40)
    medians = np.round(generator.uniform(1e5, 2e5, 80))
    found = Pairs.of(blocks_of(is_candidate, medians))
    logs = np.log(medians).reshape(40, 2).mean(axis=1)
    fastest = sorted(logs)[2]
    for i in range(40):
        of_candidate, of_reference = (0, 1) if is_candidate[2 * i] else (1, 0)
        ratio = math.log(medians[2 * i + of_candidate] / medians[2 * i + of_reference])
        assert found.log_ratios.values[i] == pytest.approx(ratio)
        slower = max(0, logs[i] - fastest)
        assert found.log_ratios.weights[i] == pytest.approx(math.exp(-slower / SLOWDOWN))
    assert found.sittings.tolist() == [i // 3 for i in range(40)]


def test_a_weighted_mean_agrees_with_a_loop():
    generator = np.random.default_rng(2)
    values, weights = generator.normal(size=9), generator.random(9)
    series = Weighted(values, weights)
    naive = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    assert series.mean() == pytest.approx(naive)
    assert series.mean(np.array([4])) == pytest.approx(values[4])


def samples_of(logs):
    """Pairs of two copies of one model with these logarithms of samples, by block and sample."""
    rows = np.round(np.exp(logs)).astype(int).tolist()
    return [
        TimedBlock(subject=subject, samples_ns=tuple(row), median_ns=float(np.median(row)))
        for row in rows
        for subject in ("candidate", "reference")
    ]


def at_rest_ns_of(logs):
    return Pairs.of(samples_of(logs)).undisturbed_ns("reference")


def test_the_level_of_a_block_agrees_with_a_loop_over_its_samples():
    generator = np.random.default_rng(15)
    blocks = [generator.integers(100, 150, size).tolist() for size in (1, 2, 7)]
    blocks.append([1, 10**15])
    for level, samples in zip(levels_of(blocks), blocks, strict=True):
        slower = [math.log(x) - math.log(min(samples)) for x in samples]
        counts = [math.exp(-min(x / SLOWDOWN, LARGEST_EXPONENT)) for x in slower]
        above = sum(c * x for c, x in zip(counts, slower, strict=True)) / sum(counts)
        assert level == pytest.approx(math.log(min(samples)) + above)


def test_a_bad_minute_that_leaves_single_calls_alone_leaves_the_ratio_as_it_is_at_rest():
    """Two of three calls are slower, those of the candidate more: medians would give 0.56."""
    generator = np.random.default_rng(16)
    blocks = []
    for _ in range(120):
        for subject, slower in (("candidate", 0.36), ("reference", 0.25)):
            logs = generator.normal(14, 0.01, 7) + (generator.random(7) < 2 / 3) * slower
            samples = np.exp(logs) * (RATIO if subject == "candidate" else 1.0)
            blocks.append(
                TimedBlock(
                    subject=subject,
                    samples_ns=tuple(np.round(samples).astype(int).tolist()),
                    median_ns=float(np.median(samples)),
                )
            )
    assert Pairs.of(blocks).log_ratios.mean() == pytest.approx(math.log(RATIO), abs=0.01)


def test_blocks_that_something_slowed_hardly_count():
    generator = np.random.default_rng(3)
    logs = generator.normal(14, 0.02, (30, 10))
    slowed = np.concatenate([logs, 14.3 + generator.exponential(0.3, (50, 10))])
    at_rest_ns = at_rest_ns_of(logs)
    assert at_rest_ns_of(slowed) == pytest.approx(at_rest_ns, rel=0.005)
    below = 0.02**2 / SLOWDOWN  # of the mean, so tilted (Gaussian noise)
    assert at_rest_ns == pytest.approx(math.exp(14 - below), rel=0.005)
    at_rest, disturbed = (Pairs.of(samples_of(x)).log_ratios for x in (logs, slowed))
    assert at_rest.effective_size > 25, "at rest nearly all count"
    assert disturbed.effective_size < 35


def test_a_lucky_block_moves_nothing():
    logs = np.random.default_rng(4).normal(14, 0.02, (30, 10))
    plain_ns = at_rest_ns_of(logs)
    logs[3] -= 0.5
    lucky_ns = at_rest_ns_of(logs)
    assert math.exp(-2 * 0.5 / 30) < lucky_ns / plain_ns < 1


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_neighbour_that_slows_one_model_more_leaves_the_ratio_as_it_is_at_rest(share):
    centers = []
    for seed in range(40):
        blocks = in_spells(seed, n_pairs=120, share=share, of_candidate=1.45, of_reference=1.28)
        centers.append(ratio_interval(blocks, seed=0).center)
    assert np.quantile(centers, [0.05, 0.95]) == pytest.approx(RATIO, rel=0.02)


def test_exchanging_the_models_inverts_the_ratio():
    is_candidate, medians = simulated_device("disturbed", 3, 25)
    there = ratio_interval(blocks_of(is_candidate, medians), seed=0).center
    back = ratio_interval(blocks_of(~is_candidate, medians), seed=0).center
    assert there * back == pytest.approx(1)


@pytest.mark.parametrize("subjects", [[], [True], [True, True], [True, False, False]])
def test_blocks_that_are_no_pairs_are_refused(subjects):
    with pytest.raises(ValueError, match="pairs"):
        Pairs.of(blocks_of(np.array(subjects, dtype=bool), np.ones(len(subjects))))


@pytest.mark.parametrize("n", [3, 9, 30])
def test_the_bootstrap_agrees_with_a_naive_one(n):
    generator = np.random.default_rng(5)
    series = Weighted(generator.normal(size=n), generator.random(n))
    length = run_length(n)
    starts = np.random.default_rng(7).integers(0, n, size=(50, -(-n // length), 1))
    naive = []
    for resample in starts:
        picks = [(start[0] + k) % n for start in resample for k in range(length)][:n]
        added = [series.weights[i] * (series.values[i] - series.mean()) for i in picks]
        naive.append(sum(added) / sum(series.weights))
    np.testing.assert_allclose(bootstrap(series, seed=7, n_resamples=50), naive, atol=1e-12)


def test_the_bootstrap_tells_the_spread_of_weighted_means():
    """Of values that count by e^-7 more or less, as at rest and beside a neighbour."""
    generator = np.random.default_rng(12)
    weights = np.where(np.arange(150) < 120, math.exp(-7), 1.0)
    drawn = generator.normal(0, 0.02, (400, 150))
    means = [Weighted(values, weights).mean() for values in drawn]
    told = [np.std(bootstrap(Weighted(values, weights), seed=0)) for values in drawn[:40]]
    assert np.mean(told) == pytest.approx(np.std(means), rel=0.15)
