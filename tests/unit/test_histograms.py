"""Histograms in bounded memory, and the ranges that follow from them."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.compression.histograms import (
    _SHRINKS,
    BINS,
    PERCENTILE,
    Histogram,
    choose_range,
    entropy_range,
    percentile_range,
    square_error_range,
    upper_end,
)


def filled(values: np.ndarray, *, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, parts):
        histogram.add(part)
    return histogram


def test_bins_join_when_values_leave_them_and_no_count_is_lost() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 0.01, 500), rng.normal(0, 100, 500), [-3e4, 1e-3]])
    grown = filled(values, parts=7)
    assert grown.n == len(values)
    assert len(grown.counts) <= BINS
    edges = (grown.first + np.arange(len(grown.counts) + 1)) * 2.0**grown.exponent
    assert (np.histogram(values, edges)[0] == grown.counts).all()


def test_a_histogram_survives_being_written_down() -> None:
    histogram = filled(np.random.default_rng(1).normal(size=100))
    again = Histogram.from_json(histogram.to_json())
    assert (again.exponent, again.first) == (histogram.exponent, histogram.first)
    assert (again.counts == histogram.counts).all()


def test_an_outlier_is_cut_off_by_each_narrow_method() -> None:
    values = np.concatenate([np.random.default_rng(2).normal(0, 1, 400_000), [1000.0]])
    histogram = filled(values)
    for method in (percentile_range, entropy_range, square_error_range):
        low, high = method(histogram, float(values.min()), 1000.0)
        assert values.min() <= low < 0 < high < 700, method


def test_the_percentile_range_ends_with_the_bins_of_the_datas_percentiles() -> None:
    values = np.random.default_rng(8).standard_t(5, 1_000_003)
    histogram, ends = filled(values, parts=3), (float(values.min()), float(values.max()))
    low, high = percentile_range(histogram, *ends)
    tail = (100 - PERCENTILE) / 2
    exact = np.percentile(values, [tail, 100 - tail], method="inverted_cdf")
    width = 2.0**histogram.exponent
    assert ends[0] < low <= exact[0] < low + width
    assert high - width <= exact[1] < high < ends[1]
    assert percentile_range(filled(np.abs(values)), 0.0, ends[1])[0] == 0.0


def test_the_entropy_range_is_the_clip_point_that_a_search_bin_by_bin_finds() -> None:
    histogram = filled(np.random.default_rng(9).standard_t(3, 50_000), parts=3)
    counts, centres = histogram.counts, histogram.centres
    largest = float(np.abs(centres).max())

    def divergence(end: float) -> float:
        """Migacz 2017: the values with what is cut off at the ends, against their codes."""
        kept = [i for i, centre in enumerate(centres) if -end <= centre <= end]
        if len(kept) < 256:
            return np.inf
        bins_of: dict[int, list[int]] = {}
        for i in kept:
            bins_of.setdefault(round((centres[i] + end) / (2 * end / 255)), []).append(i)
        p, q = np.zeros(len(counts)), np.zeros(len(counts))
        for bins in bins_of.values():
            used = [i for i in bins if counts[i]]
            for i in used:
                p[i], q[i] = counts[i], counts[bins].sum() / len(used)
        p[kept[0]] += counts[: kept[0]].sum()
        p[kept[-1]] += counts[kept[-1] + 1 :].sum()
        p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-12)
        return sum(p[i] * np.log(p[i] / q[i]) for i in kept if p[i])

    clip_points = [largest * shrink for shrink in _SHRINKS]
    low, high = entropy_range(histogram, -largest, largest)
    assert (-low, high) == (min(clip_points, key=divergence),) * 2
    assert 0.1 * largest < high < 0.95 * largest


def test_square_error_is_least_at_the_range_that_a_search_by_hand_finds() -> None:
    values = np.random.default_rng(3).laplace(0, 1, 20_000)
    end = float(np.abs(values).max())
    low, high = square_error_range(filled(values), -end, end)

    def error(at: float) -> float:
        step = 2 * at / 255
        return float(((np.clip(np.rint(values / step) * step, -at, at) - values) ** 2).mean())

    assert low == -high
    assert error(high) <= 1.05 * min(error(at) for at in np.linspace(0.2 * end, end, 60))


def test_ordinary_values_keep_their_whole_range() -> None:
    values = np.random.default_rng(4).uniform(-1, 2, 10_000)
    low, high = float(values.min()), float(values.max())
    assert choose_range(filled(values), low, high) == ("min-max", (low, high))


def test_one_absurd_value_in_a_million_does_not_take_all_codes() -> None:
    rng = np.random.default_rng(5)
    histogram = filled(np.concatenate([rng.normal(0, 1, 1_000_000), [1e5]]), parts=3)
    # Rounding in steps of 400 would lose the tensor.
    method, (_, high) = choose_range(histogram, -5.0, 1e5)
    assert method != "min-max"
    assert high < 1000


def test_the_upper_end_is_where_a_search_by_hand_finds_the_least_error() -> None:
    values = np.random.default_rng(6).exponential(0.5, 1_000_000) - 0.375
    high = float(values.max())

    def error(end: float) -> float:
        rounding = ((end + 0.375) / 255) ** 2 / 12
        return rounding + 3 * float((np.maximum(values - end, 0.0) ** 2).mean())

    found = upper_end(filled(values), -0.375, high)
    assert 0.4 * high < found < 0.95 * high
    assert error(found) <= 1.02 * min(error(end) for end in np.linspace(0.3 * high, high, 100))


@pytest.mark.parametrize("value", [0.0, 1e-30, 5.0])
def test_constants_have_a_histogram_too(value: float) -> None:
    histogram = filled(np.full(10, value, np.float32))
    assert histogram.n == 10
    assert histogram.centres[0] == pytest.approx(value, abs=2.0**histogram.exponent)
