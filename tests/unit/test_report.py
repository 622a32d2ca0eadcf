"""The report and its pictures, from records made up for the purpose."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from autotune.api_types import Interval, Verification
from autotune.export import figures
from autotune.export.front_plot import COLOURS, front_figure, inline_front
from autotune.export.layer_picture import layer_cells
from autotune.export.report import render_report
from autotune.search.explanation import explain
from autotune.search.front import non_dominated
from search_spaces import FP32, INT8, Candidate, SearchSpace
from storage.records import JobState
from tests.unit import fabricated_job as fabricated

VOID = {"meta", "br", "link", "img", "hr", "input"}


@pytest.fixture(scope="module")
def inventory():
    return fabricated.inventory()


@pytest.fixture(scope="module")
def job(inventory):
    return fabricated.job(inventory)


@pytest.fixture(scope="module")
def trials(inventory):
    return fabricated.trials(inventory)


@pytest.fixture(scope="module")
def page(job, trials) -> str:
    return render_report(job, trials, fabricated.device())


class Nesting(HTMLParser):
    """Raises nothing, remembers every tag that closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_page_is_well_formed(page: str) -> None:
    nesting = Nesting()
    nesting.feed(page)
    assert (nesting.wrong, nesting.open) == ([], [])


def test_the_page_fetches_nothing(page: str) -> None:
    assert "<script" not in page
    assert "@import" not in page
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert [target for target in fetched if not target.startswith("#")] == []
    assert [target for target in re.findall(r"url\(([^)]*)\)", page) if target[0] != "#"] == []


def test_the_page_has_every_section(page: str) -> None:
    ids = re.findall(r'<section id="([a-z]+)">', page)
    assert ids == ["answer", "front", "layers", "sensitivity", "measured", "provenance"]


def test_the_answer_carries_unit_interval_and_n(page: str) -> None:
    text = text_of(page)
    assert "Trial 7 wins under the budget of 1.200 ms" in text
    assert "1.138 ms [1.128, 1.147], n=960" in text
    assert "94.10 % [92.90, 95.20], n=600" in text
    assert "2.11× [2.09, 2.13], n=960" in text


def test_the_baselines_stand_beside_the_winner(page: str) -> None:
    rows = re.findall(r'<td class="nowrap">([^<]+)<small>trial (\d+)', page)
    assert rows == [("FP32", "0"), ("uniform INT8", "1"), ("winner", "7")]


def test_a_baseline_that_wins_is_shown_once(job, trials) -> None:
    won = replace(job, result={**job.result, "winner": "trial-0001"})
    page = render_report(won, trials, fabricated.device())
    rows = re.findall(r'<td class="nowrap">([^<]+)<small>trial (\d+)', page)
    assert rows == [("FP32", "0"), ("winner (uniform INT8)", "1")]


def test_the_verification_stands_in_the_comparison(job, trials) -> None:
    interval = Interval(value=0.9432, low=0.92, high=0.96)
    verification = Verification(
        artifact_sha256="a" * 64,
        device_name="kitchen-pi4",
        outcome="ok",
        latency_ns=Interval(value=1.131e6, low=1.12e6, high=1.14e6),
        fp32_ratio=Interval(value=0.4711, low=0.468, high=0.474),
        latency_samples=777,
        held_out_accuracy=interval,
        held_out_accuracy_drop=Interval(value=0.01, low=0.0, high=0.02),
        held_out_samples=601,
    )
    text = text_of(render_report(job, trials, fabricated.device(), verification=verification))
    assert "the bundle, again ok 94.32 % [92.00, 96.00] n=601" in text
    assert "1.131 ms [1.120, 1.140] n=777, on kitchen-pi4 0.471 [0.468, 0.474]" in text


def test_an_impossible_budget_says_by_how_much_and_what_blocks(job, trials) -> None:
    result = {
        **job.result,
        "verdict": "impossible_budget",
        "missed_by_ns": 338_000.0,
        "explanation": "the groups that hold it back: features.0.0, classifier.1",
        "blocking_groups": ["features.0.0", "classifier.1"],
    }
    page = render_report(replace(job, result=result), trials, fabricated.device())
    text = text_of(page)
    assert "No candidate is inside the budget. Trial 7 comes closest, 338.0 µs above it" in text
    assert text.count("hold it back") == 1  # the explanation names them; nothing repeats it


def test_what_blocks_a_budget_stands_there_with_what_it_costs(job, trials) -> None:
    blocking = [
        {"group": "features.0.0", "cost_ns": 612_000.0, "share": 0.54, "is_profiled": True},
        {"group": "classifier.1", "cost_ns": 101_000.0, "share": 0.09, "is_profiled": True},
    ]
    result = {**job.result, "verdict": "impossible_budget", "blocking_groups": blocking}
    text = text_of(render_report(replace(job, result=result), trials, fabricated.device()))
    assert "2 layer groups that must cost less for the budget to be kept" in text
    assert "features.0.0 612.0 µs 54.0 % classifier.1 101.0 µs 9.0 %" in text
    assert "By the profile that the device took of the trial" in text


def test_a_baseline_that_wins_is_said_to_be_one(job, trials) -> None:
    result = {**job.result, "winner": "trial-0001", "beats_baseline": False}
    text = text_of(render_report(replace(job, result=result), trials, fabricated.device()))
    assert "A baseline wins: nothing that was searched is better than it" in text
    assert "A baseline wins" not in text_of(render_report(job, trials, fabricated.device()))


def test_the_winners_groups_are_explained_with_their_alternatives(job, trials) -> None:
    space = SearchSpace.build(job.inventory, precisions=(FP32, INT8), prune_ratios=(0.25, 0.5))
    asked = replace(job, space=space)
    winner = next(t for t in trials if t.number == 7)
    found = explain(asked, trials, winner, fabricated.device().description)
    text = text_of(render_report(asked, trials, fabricated.device(), explanation=found))
    assert "Why these choices INT8 is faster than FP32 here" in text
    assert f"Each of {found.model_error.n} trials predicted from the others" in text
    assert "36 layer groups with their choices" in text and "features.1.conv.0.0 w8a8" in text
    assert "Why these choices" not in text_of(render_report(job, trials, fabricated.device()))


def test_a_job_without_an_answer_says_in_which_state_it_is(job) -> None:
    waiting = replace(
        job,
        state=JobState.WAITING_FOR_DEVICE,
        phase="baselines",
        result=None,
        reason="device pi4 is offline",
    )
    text = text_of(render_report(waiting, [], None))
    assert "the job is waiting for device, baselines" in text
    assert "device pi4 is offline" in text
    assert "No trial with both an accuracy and a steady latency to draw" in text


def test_a_job_that_ended_without_an_answer_says_why(job, trials) -> None:
    ended = replace(job, result=None)
    text = text_of(render_report(ended, [replace(trials[2], latency=None)], None))
    assert "There is no answer: the job is finished" in text
    assert "None of its 1 trials has both an accuracy and a steady latency" in text


def test_trials_that_failed_are_listed_with_their_reason(page: str) -> None:
    text = text_of(page)
    assert "2 trials without a result" in text
    assert "compression failed group features.3.conv.0.0: its range is zero" in text


def test_what_the_device_does_not_have_says_why(page: str) -> None:
    text = text_of(page)
    assert "stolen CPU time – (no hypervisor)" in text
    assert "temperature 51.5 °C 52.0 °C to 54.5 °C 52.8 °C" in text
    assert "governor ondemand ondemand ondemand" in text


def test_the_page_says_how_many_samples_the_latency_is_of(page: str) -> None:
    assert "nothing disturbs them, which was so in 87 % of the samples" in text_of(page)


def test_an_unsteady_latency_says_so(job, trials) -> None:
    report = trials[7].confirmed_latency.model_copy(
        update={"is_steady": False, "unsteady_reason": "the reference drifted by 5 %"}
    )
    shaken = [replace(t, confirmed_latency=report) if t.number == 7 else t for t in trials]
    text = text_of(render_report(job, shaken, fabricated.device()))
    assert "latency p50, unsteady" in text
    assert "Unsteady: the reference drifted by 5 %" in text


def test_names_are_escaped(job, trials) -> None:
    hostile = replace(job, name="<b>&</b>")
    strange = replace(trials[4], proposed_by="<i>x</i>")
    page = render_report(hostile, [*trials[:4], strange, *trials[5:]], fabricated.device())
    assert "<b>&</b>" not in page
    assert "<i>x</i>" not in page
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in page


def test_the_same_records_give_the_same_page(job, trials, page: str) -> None:
    assert render_report(job, trials, fabricated.device()) == page


def test_the_layer_strip_has_a_cell_per_group_with_its_story(page: str, inventory) -> None:
    strip = page[page.index('<svg class="layers"') :]
    titles = re.findall(r"<title>\s*([^:<]+):", strip)
    assert titles == [group.name for group in inventory.groups]
    assert "planned w8a8: a float consumer keeps the unit from fusing" in strip


def test_layer_cells_tell_planned_from_effective(job, inventory) -> None:
    candidate = Candidate(
        precisions={group.name: INT8 for group in inventory.groups},
        prune_ratios={inventory.prunable_groups[0].name: 0.25},
    )
    trial = fabricated.trial(
        1, candidate, model_inventory=inventory, accuracy_value=0.9, p50_ns=1e6
    )
    cells = layer_cells(job, trial)
    assert [cell.differs for cell in cells] == [i % 13 == 5 for i in range(len(cells))]
    assert {c.group for c in cells if c.prune_ratio} == set(inventory.prunable_groups[0].layers)
    assert sum(cell.macs_share for cell in cells) == pytest.approx(1.0)


def test_a_group_that_cannot_be_pruned_has_no_ratio(job, trials) -> None:
    by_name = {cell.group: cell for cell in layer_cells(job, trials[0])}
    assert by_name["classifier.1"].prune_ratio is None
    assert by_name["features.1.conv.0.0"].prune_ratio == 0.0


def test_a_group_that_nobody_saw_is_unknown_and_not_counted_as_quantized(job, trials) -> None:
    first, *rest = trials[1].compression["groups"]
    unseen = {**first, "planned": "w8a8", "effective": None, "reason": "not seen: <none> tells"}
    blind = replace(trials[1], compression={"groups": [unseen, *rest]})
    cell = next(cell for cell in layer_cells(job, blind) if cell.group == first["group"])
    assert (cell.shown, cell.effective, cell.differs) == ("unknown", None, False)
    assert "1 unseen (planned w8a8)" in figures.precisions_text(blind)
    all_blind = [replace(trial, compression=blind.compression) for trial in trials]
    page = render_report(job, all_blind, fabricated.device())
    assert "1 whose execution was not seen" in page
    assert "unknown (planned w8a8: not seen: &lt;none&gt; tells)" in page


def test_an_unbuilt_trial_shows_its_plan(job, trials) -> None:
    unbuilt = replace(trials[1], compression=None)
    assert {cell.effective for cell in layer_cells(job, unbuilt)} == {"w8a8"}


def test_a_job_without_an_inventory_has_no_strip(job, trials) -> None:
    bare = replace(job, inventory=None)
    assert layer_cells(bare, trials[1]) == []
    assert '<section id="layers">' not in render_report(bare, trials, fabricated.device())


def test_the_front_line_is_what_a_naive_search_finds(trials) -> None:
    ranked = [trial for trial in trials if figures.is_ranked(trial)]
    naive = {
        a.number
        for a in ranked
        if not any(
            figures.point(b)[0] <= figures.point(a)[0]
            and figures.point(b)[1] >= figures.point(a)[1]
            and figures.point(a) != figures.point(b)
            for b in ranked
        )
    }
    line = figures.front_line(list(reversed(trials)))
    assert {trial.number for trial in line} == naive
    assert len(line) > 3
    assert [figures.point(t) for t in line] == sorted(figures.point(t) for t in line)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_line_is_the_front_that_answers_budgets(inventory, seed: int) -> None:
    trials = fabricated.trials(inventory, seed=seed)
    twin = replace(trials[7], id="twin", number=90)
    assert figures.front_line([twin, *trials]) == non_dominated([*trials, twin])


def test_nan_and_missing_never_enter_the_front_line(trials) -> None:
    nowhere = replace(trials[2], accuracy=fabricated.accuracy(float("nan")))
    fastest = replace(trials[3], latency=None)
    unsteady = replace(
        trials[4], latency=fabricated.latency(1e5).model_copy(update={"is_steady": False})
    )
    assert figures.front_line([nowhere, fastest, unsteady]) == []


def test_the_picture_as_a_file_is_valid_svg_and_repeats(trials) -> None:
    arguments = {"fp32": trials[0], "int8": trials[1], "winner": trials[7], "budget_ns": 1.2e6}
    first = front_figure(trials, **arguments)
    root = ET.fromstring(first)
    assert root.tag.endswith("svg")
    assert first == front_figure(trials, **arguments)
    assert b"budget 1.200 ms" in first


def test_the_picture_as_png_has_a_png_signature(trials) -> None:
    assert front_figure(trials, title="a front", form="png").startswith(b"\x89PNG\r\n\x1a\n")


def test_the_picture_in_a_page_leaves_colours_to_the_style_sheet(page: str, trials) -> None:
    svg = inline_front(trials, winner=trials[7])
    assert not [colour for colour in COLOURS.values() if colour in svg]
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", svg))
    defined = set(re.findall(r"--([a-z0-9-]+):", page))
    assert used <= defined
    assert "winner" in used


def test_the_picture_styles_nothing_but_itself(trials) -> None:
    svg = inline_front(trials)
    assert re.findall(r"<style[^>]*>([^{]*)\{", svg) == ["svg.front *"]


def test_every_ranked_trial_has_a_point_with_its_figures(trials) -> None:
    root = ET.fromstring(inline_front(trials, describe=lambda t: f"number {t.number} & co"))
    space = "{http://www.w3.org/2000/svg}"
    titles = {
        group.get("id"): group.findtext(f"{space}title")
        for group in root.iter(f"{space}g")
        if (group.get("id") or "").startswith("trial-")
    }
    ranked = [trial for trial in trials if figures.is_ranked(trial)]
    assert titles == {f"trial-{t.number}": f"number {t.number} & co" for t in ranked}


def test_ruined_candidates_do_not_squash_the_picture(trials) -> None:
    ruined = replace(trials[5], accuracy=fabricated.accuracy(0.12))
    svg = front_figure([*trials[:5], ruined], form="svg").decode()
    assert "1 more below" in svg


def test_a_picture_of_nothing_has_its_axes() -> None:
    assert "latency p50" in inline_front([], budget_ns=None)


def test_a_single_trial_makes_a_picture(trials) -> None:
    assert 'id="trial-0"' in inline_front(trials[:1], fp32=trials[0])
