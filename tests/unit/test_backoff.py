import random

import pytest

from device_agents.backoff import Backoff


def test_back_off_doubles_up_to_its_bound_and_starts_again():
    backoff = Backoff(first_s=1, longest_s=5, uniform=lambda _, high: high)
    assert [backoff.next_s() for _ in range(4)] == [1, 2, 4, 5]
    backoff.reset()
    assert backoff.next_s() == 1


def test_a_fleet_that_lost_the_service_at_one_moment_comes_back_over_the_whole_interval():
    backoffs = [
        Backoff(first_s=1, longest_s=8, uniform=random.Random(seed).uniform) for seed in range(2000)
    ]
    for bound in (1, 2, 4, 8, 8):
        waits = [backoff.next_s() for backoff in backoffs]
        assert min(waits) >= 0
        assert max(waits) <= bound
        # Uniform from nothing to the bound: its mean and its spread (bound / sqrt 12).
        mean = sum(waits) / len(waits)
        spread = (sum((wait - mean) ** 2 for wait in waits) / len(waits)) ** 0.5
        assert mean == pytest.approx(bound / 2, rel=0.05)
        assert spread == pytest.approx(bound / 12**0.5, rel=0.05)


def test_a_service_that_stays_away_for_days_is_asked_at_the_longest_interval():
    backoff = Backoff(first_s=0.5, longest_s=30, uniform=lambda _, high: high)
    assert [backoff.next_s() for _ in range(10_000)][-1] == 30
