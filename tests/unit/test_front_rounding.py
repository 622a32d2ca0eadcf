"""A learned rounding as the answer: in the winner's place, and only where it is no worse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autotune.search.feasibility import Limits
from autotune.search.front import answer
from search_spaces import INT8, Candidate
from storage.records import TrialRecord
from tests.unit.records import accuracy, latency, trial


def learned_pair(**changes: Any) -> list[TrialRecord]:
    """A winner, and the same candidate with a learned rounding."""
    candidate = Candidate(precisions={"a": INT8})
    confirmed = {
        "confirmed_latency": latency(2.0),
        "held_out_accuracy": accuracy(0.94, split="held_out"),
    }
    origin = trial(1, 2.0, 0.94, candidate=candidate, **confirmed)
    learned = replace(candidate, rounding="adaround")
    return [origin, trial(2, 2.0, 0.94, candidate=learned, **{**confirmed, **changes})]


def winner_of(trials: list[TrialRecord], budget_ns: float = 2.5e6) -> int:
    found = answer(trials, limits=Limits(latency_ns=budget_ns), max_accuracy_drop=0.02)
    assert found is not None
    return found.winner.number


def test_a_learned_rounding_that_is_no_worse_takes_the_winners_place() -> None:
    assert winner_of(learned_pair()) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": accuracy(0.939)},
        {"held_out_accuracy": accuracy(0.939)},
        {"held_out_accuracy": None},
        {"confirmed_latency": None},
        {"confirmed_latency": latency(2.1)},
        {"accuracy": accuracy(0.94, drop_high=0.03)},
    ],
)
def test_a_learned_rounding_that_is_worse_in_anything_does_not(changes: dict[str, Any]) -> None:
    assert winner_of(learned_pair(**changes)) == 1


def test_a_learned_rounding_never_answers_for_another_candidate() -> None:
    origin, learned = learned_pair()
    fastest = trial(0, 1.5, 0.945)
    assert winner_of([fastest, origin, learned]) == 0
    assert winner_of(learned_pair(confirmed_latency=latency(2.49, half_width=0.02))) == 1
