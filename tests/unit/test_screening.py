"""Which sensitivities are measured, what the others are estimated as, and the whole phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from autotune.errors import CompressionError
from autotune.search import screening
from autotune.search.interruption import Stopped
from autotune.search.sensitivity import SensitivityPhase, damage, limit_s, prune_damage
from autotune.search.workers import CallFailed
from autotune.spec import SearchSpec
from storage.sensitivity import Sensitivity
from tests.unit.fakes import FakePool
from tests.unit.records import NOW, trial
from tests.unit.spaces import inventory, space


def entry(group: str, precision: str, sqnr_db: float, kl: float | None = None) -> Sensitivity:
    return Sensitivity(group=group, precision=precision, sqnr_db=sqnr_db, mean_kl=kl)


def screen(entries: Sequence[Sensitivity], gain: dict[str, float]) -> dict[Any, Sensitivity]:
    """Measure what is asked for until nothing is; every group obeys its gain."""
    known = {e.key: e for e in entries}
    while due := screening.next_precisions(known.values()):
        for e in due:
            kl = gain[e.group] * 10 ** (-(e.sqnr_db or 0) / 10)
            known[e.key] = entry(e.group, e.precision or "", e.sqnr_db or 0, kl)
    return known


GROUPS = [f"g{i:02}" for i in range(24)]
GAINS = {group: 0.02 * (1 + i % 7) for i, group in enumerate(GROUPS)}


def test_a_precision_far_below_the_harmful_ones_is_not_measured() -> None:
    loud = [entry(g, "w4", 20 + i % 5) for i, g in enumerate(GROUPS)]
    quiet = [entry(g, "w8a16", 75 + i % 5) for i, g in enumerate(GROUPS)]
    known = screen([*loud, *quiet], GAINS)
    assert all(known[g, "w4"].is_measured for g in GROUPS)
    assert not any(known[g, "w8a16"].is_measured for g in GROUPS)


def test_the_noisiest_groups_are_measured_first_at_one_precision() -> None:
    entries = [
        entry(g, p, 30 + i + (10 if p == "w8" else 0))
        for i, g in enumerate(GROUPS)
        for p in ("w8a8", "w8")
    ]
    first = screening.next_precisions(entries)
    assert [(e.group, e.precision) for e in first] == [(g, "w8a8") for g in GROUPS[:8]]


def test_a_group_that_no_gain_seen_could_make_harmful_is_left_out() -> None:
    entries = [entry(g, "w8a8", 20 if i < 12 else 70) for i, g in enumerate(GROUPS)]
    known = screen(entries, GAINS)
    assert [g for g in GROUPS if known[g, "w8a8"].is_measured] == GROUPS[:12]


def test_noise_too_loud_for_the_law_is_measured_and_no_anchor() -> None:
    entries = [entry("a", "w1", 3.0), entry("a", "w8a8", 40.0), entry("a", "w8", 90.0)]
    assert [e.precision for e in screening.next_precisions(entries)] == ["w8a8"]
    known = screen(entries, {"a": 0.1})
    assert known["a", "w1"].is_measured and not known["a", "w8"].is_measured


def test_no_entry_that_matters_is_left_out_when_gains_lie_within_the_margins() -> None:
    sqnr = {"w8a8": 35, "w4": 22, "w8": 52, "w2": 9}
    entries = [entry(g, p, db + i % 6) for i, g in enumerate(GROUPS) for p, db in sqnr.items()]
    known = screen(entries, GAINS)
    for e in known.values():
        truth = GAINS[e.group] * 10 ** (-(e.sqnr_db or 0) / 10)
        worst = max(k.mean_kl or 0 for k in known.values() if k.precision == e.precision)
        assert e.is_measured or truth < max(screening.NEGLIGIBLE_KL, 0.01 * worst)


def test_an_estimate_is_the_groups_gain_times_the_noise_and_says_so() -> None:
    entries = [entry("a", "w4", 20.0, 1e-3), entry("a", "w8", 40.0), entry("b", "w8", 30.0)]
    found = {e.group: e for e in screening.estimated_precisions(entries)}
    assert found["a"].mean_kl == pytest.approx(1e-5)
    assert found["b"].mean_kl == pytest.approx(1e-4)  # the usual gain
    assert all(e.is_estimate and e.drop is None and e.n_samples == 0 for e in found.values())
    assert screening.estimated_precisions([entry("b", "w8", 30.0)]) == []


def test_prune_ratios_go_breadth_first_and_the_heaviest_groups_lead() -> None:
    entries = [
        Sensitivity(group=g, prune_ratio=r, removed_share=r / 2)
        for g in ("stem", "body")
        for r in (0.25, 0.5, 0.75)
    ]
    order = screening.prune_order(entries, inventory())
    assert order[:2] == [("body", 0.5), ("stem", 0.5)]
    assert order[2:] == [("body", 0.75), ("body", 0.25), ("stem", 0.75), ("stem", 0.25)]


def test_a_prune_estimate_follows_the_weights_removed() -> None:
    entries = [
        Sensitivity(group="a", prune_ratio=0.25, removed_share=0.1, mean_kl=0.01),
        Sensitivity(group="a", prune_ratio=0.5, removed_share=0.3),
        Sensitivity(group="b", prune_ratio=0.5, removed_share=0.2),
    ]
    found = {e.group: e.mean_kl for e in screening.estimated_pruning(entries)}
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.02)}


class Recorder:
    """Keeps what a phase stores and says."""

    def __init__(self) -> None:
        self.stored: tuple[Sensitivity, ...] = ()
        self.notices: list[str] = []

    def phase(self, *, limit: float = 60.0, clock: Any = lambda: 0.0) -> SensitivityPhase:
        return SensitivityPhase(
            space=space(),
            inventory=inventory(),
            known=self.stored,
            store=lambda entries: setattr(self, "stored", entries),
            notice=self.notices.append,
            limit_s=limit,
            clock=clock,
        )


def never() -> bool:
    return False


def test_every_choice_ends_with_a_damage_measured_or_estimated() -> None:
    recorder = Recorder()
    entries = recorder.phase().run(FakePool(), should_stop=never, with_pruning=True)
    offered = space()
    wanted = {(g, p.name) for g, c in offered.precisions.items() for p in c if not p.is_float}
    assert set(damage(entries)) == wanted
    assert set(prune_damage(entries)) == {(g, r) for g in ("stem", "body") for r in (0.25, 0.5)}
    assert recorder.stored == entries


@pytest.mark.parametrize("calls", range(1, 16, 3))
def test_a_killed_service_goes_on_with_the_missing_entries(calls: int) -> None:
    recorder, first, second = Recorder(), FakePool(), FakePool()
    with pytest.raises(Stopped):
        recorder.phase().run(
            first, should_stop=lambda: len(first.calls) >= calls, with_pruning=True
        )
    entries = recorder.phase().run(second, should_stop=never, with_pruning=True)
    made = [(c.method, c.arguments) for c in (*first.calls, *second.calls)]
    assert len(first.calls) == calls
    assert all(made.count(call) == 1 for call in made)
    assert len(prune_damage(entries)) == 4


def test_without_time_the_cheap_figures_are_all_there_is() -> None:
    pool, recorder = FakePool(), Recorder()
    recorder.phase(limit=0.0).run(pool, should_stop=never, with_pruning=True)
    assert {call.method for call in pool.calls} == {"noise", "removal"}
    assert all(e.mean_kl is None for e in recorder.stored)


def test_a_group_that_cannot_be_measured_is_said_and_does_not_hold_up_the_others() -> None:
    class Failing(FakePool):
        def _divergence(self, group: str, precision: Any) -> Any:
            failed = CallFailed(error="no kernel for body")
            return failed if group == "body" else super()._divergence(group, precision)

    recorder = Recorder()
    entries = recorder.phase().run(Failing(), should_stop=never, with_pruning=False)
    assert recorder.notices == ["a sensitivity could not be measured: no kernel for body"]
    body = next(e for e in entries if e.key == ("body", "w8a8"))
    assert body.is_estimate and body.mean_kl is not None


def test_a_precision_that_a_group_cannot_take_leaves_its_other_ones_measured() -> None:
    class Overflowing(FakePool):
        def _noise(self, group: str, precisions: Any) -> Any:
            found = super()._noise(group, precisions)
            return [
                CompressionError("w4 is beyond it") if e.precision == "w4" else e for e in found
            ]

    recorder = Recorder()
    entries = recorder.phase().run(Overflowing(), should_stop=never, with_pruning=False)
    offered = space().precisions.items()
    left = {(g, p.name) for g, c in offered for p in c if p.name not in ("fp32", "w4")}
    assert set(damage(entries)) == left
    assert set(recorder.notices) == {"w4 is beyond it"}


def test_entries_of_the_first_version_keep_their_figures_and_get_the_new_ones() -> None:
    document = {"group": "body", "precision": "w8a8", "mean_kl": 0.1, "drop": 0.0, "n_samples": 9}
    old = Sensitivity.from_json(document)
    recorder, pool = Recorder(), FakePool()
    recorder.stored = (old,)
    recorder.phase().run(pool, should_stop=never, with_pruning=False)
    assert old.is_measured and old.sqnr_db is None
    assert any(c.method == "noise" and c.arguments[0] == "body" for c in pool.calls)
    with pytest.raises(ValueError, match="newer"):
        Sensitivity.from_json({**document, "version": 99})


def test_the_phase_gets_a_share_of_the_jobs_probable_time() -> None:
    trials = [
        trial(n, 4.0, 0.9, created_at=NOW, finished_at=NOW.replace(second=10)) for n in (0, 1)
    ]
    assert limit_s(SearchSpec(trials=50), trials) == pytest.approx(0.15 * 50 * 10 * 2)
    assert limit_s(SearchSpec(trials=50, time_s=200), trials) == pytest.approx(30)
    assert limit_s(SearchSpec(trials=1), []) == 5.0
