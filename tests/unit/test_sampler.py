"""Optuna as a disposable view: rebuilt from trials, deterministic, never repeating."""

from __future__ import annotations

import random

from autotune.search.feasibility import Limits
from autotune.search.landscape import Encoding
from autotune.search.sampler import Sampler
from search_spaces import FP32, Candidate
from storage.records import TrialOutcome, TrialRecord
from tests.unit.records import trial
from tests.unit.spaces import space

BASES: tuple[dict[str, float], ...] = ({}, {"stem": 0.25, "body": 0.25})


def _trials(n: int) -> list[TrialRecord]:
    rng = random.Random(1)
    trials = []
    for number in range(n):
        drawn = space().sample(rng)
        candidate = Candidate(precisions=drawn.precisions, prune_ratios=rng.choice(BASES))
        quantized = len(candidate.precisions)
        figures = (4.0 - 0.5 * quantized, 0.95 - 0.01 * quantized)
        trials.append(trial(number, *figures, candidate=candidate))
    return trials


def _sampler(budget_ns: float | None = 3e6) -> Sampler:
    encoding = Encoding(space=space(), bases=BASES)
    return Sampler(encoding=encoding, seed=7, limits=Limits(latency_ns=budget_ns))


def test_proposals_lie_in_the_space_on_known_bases_and_are_new() -> None:
    trials = _trials(12)
    known = {t.candidate.digest for t in trials}
    found = _sampler().propose(trials, 4, is_unwanted=lambda c: c.digest in known)
    assert len(found) == 4
    for candidate in found:
        space().require(candidate)
        assert candidate.prune_ratios in BASES
        assert candidate.digest not in known


def test_the_same_trials_and_seed_give_the_same_proposals() -> None:
    trials = _trials(12)
    first, second = (_sampler().propose(trials, 3, is_unwanted=lambda c: False) for _ in range(2))
    assert first == second


def test_first_the_choices_vary_in_which_the_front_differs() -> None:
    best = space().uniform_int8().with_precision("stem", FP32)
    trials = [
        trial(0, 3.0, 0.95, candidate=best.with_precision("head", FP32)),
        trial(1, 2.0, 0.94, candidate=best),
        trial(2, 4.0, 0.90, candidate=space().uniform_int8()),  # not on the front
    ]
    found = _sampler().propose(trials, 3, is_unwanted=lambda c: c in (best, trials[0].candidate))
    common = ("stem", "dw", "body")
    in_line = [c for c in found if all(c.precision(g) == best.precision(g) for g in common)]
    # The head has two precisions more: once those are had, the others vary too.
    assert [c in in_line for c in found] == [True, True, False]
    assert set(_sampler().agreed(trials)) == {f"precision:{g}" for g in common} | {"base"}


def test_an_exhausted_space_ends_in_fewer_proposals() -> None:
    assert _sampler().propose(_trials(12), 4, is_unwanted=lambda c: True) == []


def test_the_study_holds_each_ranking_trial_with_its_constraint() -> None:
    trials = [*_trials(6), trial(6, 1.0, 0.9, outcome=TrialOutcome.MEASUREMENT_FAILED)]
    study = _sampler(3e6).study(trials)
    assert [t.user_attrs["number"] for t in study.trials] == list(range(6))
    assert all(t.latency is not None for t in trials)
    for frozen, record in zip(study.trials, trials, strict=False):
        assert record.latency is not None and record.accuracy is not None
        assert frozen.values == [record.latency.p50_ns, record.accuracy.drop]
        assert frozen.constraints == {"latency": record.latency.p50_high_ns / 3e6 - 1}


def test_a_trial_on_another_base_is_left_out_of_the_study() -> None:
    stranger = trial(0, 1.0, 0.9, candidate=Candidate(prune_ratios={"stem": 0.5}))
    assert _sampler().study([stranger]).trials == []
