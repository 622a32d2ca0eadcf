"""The four output formats and the texts of figures."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TextIO

import pytest

from autotune.api_types import GroupPrecision, Interval
from autotune.cli import figures
from autotune.cli.output import Column, Field, View, cell_width, print_one, print_rows
from autotune.cli.views.front import FRONT, front_rows
from autotune.cli.views.jobs import JOB, JOBS
from autotune.cli.views.trials import (
    GROUPS,
    TRIAL,
    TRIALS,
    group_counts,
    kept_channels,
    prune_summary,
    recovery_summary,
    seen_in,
)
from tests.unit.cli_fakes import (
    baseline_trials,
    finished_job,
    interval,
    make_job,
    make_result,
    make_trial,
)

PAIRS: View[tuple[str, int | None]] = View(
    columns=[
        Column(title="name", text=lambda pair: pair[0]),
        Column(title="amount", text=lambda pair: str(pair[1]), right=True),
    ],
    fields=[
        Field(name="name", value=lambda pair: pair[0]),
        Field(name="amount", value=lambda pair: pair[1]),
        Field(name="is_known", value=lambda pair: pair[1] is not None),
    ],
    document=lambda pair: {"name": pair[0], "amount": pair[1]},
)
ROWS: list[tuple[str, int | None]] = [("a,b", 1), ("größe", None)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(output_format: str, rows: list[tuple[str, int | None]] = ROWS) -> str:
    to = io.StringIO()
    print_rows(PAIRS, rows, output_format=output_format, to=to)
    return to.getvalue()


def test_json_is_a_list_of_documents() -> None:
    assert json.loads(printed("json")) == [
        {"name": "a,b", "amount": 1},
        {"name": "größe", "amount": None},
    ]


def test_jsonl_is_one_document_per_line() -> None:
    assert [json.loads(line)["name"] for line in printed("jsonl").splitlines()] == ["a,b", "größe"]


def test_csv_quotes_and_leaves_a_missing_figure_empty() -> None:
    rows = list(csv.reader(io.StringIO(printed("csv"))))
    assert rows == [["name", "amount", "is_known"], ["a,b", "1", "true"], ["größe", "", "false"]]


@pytest.mark.parametrize(
    ("output_format", "expected"),
    [
        ("json", "[]\n"),
        ("jsonl", ""),
        ("csv", "name,amount,is_known\n"),
        ("table", "name  amount\n"),
    ],
)
def test_no_rows_are_still_a_valid_answer(output_format: str, expected: str) -> None:
    assert printed(output_format, []) == expected


def test_a_table_elsewhere_than_on_a_terminal_is_aligned_plain_and_whole() -> None:
    long = "x" * 300
    text = printed("table", [("short", 1), (long, 22)])
    lines = text.splitlines()
    assert long in text and "\x1b" not in text
    assert {len(line) for line in lines} == {300 + 2 + len("amount")}


def test_a_table_on_a_terminal_shows_every_cell() -> None:
    to: TextIO = Terminal()
    print_rows(PAIRS, ROWS, output_format="table", to=to)
    assert isinstance(to, Terminal)
    assert "größe" in to.getvalue() and "─" in to.getvalue()


def test_one_row_is_an_object_in_json_and_lines_in_a_table() -> None:
    as_json, as_table = io.StringIO(), io.StringIO()
    print_one(JOB, make_job(), output_format="json", to=as_json)
    print_one(JOB, make_job(), output_format="table", to=as_table)
    assert json.loads(as_json.getvalue())["id"] == "job-1"
    assert "latency budget  2.000 ms" in as_table.getvalue()


def test_one_row_as_csv_has_the_columns_of_the_list() -> None:
    one, many = io.StringIO(), io.StringIO()
    print_one(JOB, make_job(), output_format="csv", to=one)
    print_rows(JOBS, [make_job()], output_format="csv", to=many)
    assert one.getvalue() == many.getvalue()


def test_csv_of_trials_has_bare_figures_with_their_units_in_the_names() -> None:
    to = io.StringIO()
    print_rows(TRIALS, [make_trial(5)], output_format="csv", to=to)
    (row,) = csv.DictReader(io.StringIO(to.getvalue()))
    assert float(row["latency_ns"]) == 2.4e6
    assert float(row["latency_ns_low"]) == 2.37e6
    assert row["is_steady"] == "true" and row["held_out_accuracy"] == ""


def test_wide_letters_take_two_columns_and_accents_none() -> None:
    assert cell_width("日本") == 4
    assert cell_width("e\u0301") == 1


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (interval(2.4e6, 0.03e6), "2.400 [2.370, 2.430]"),
        (interval(2.4e6, 0.3e6), "2.40 [2.10, 2.70]"),
        (interval(1234e6, 120e6), "1234 [1114, 1354]"),
        (Interval(value=2e6, low=2e6, high=2e6), "2.000"),
    ],
)
def test_a_figure_shows_the_digits_that_its_spread_leaves(figure: Interval, text: str) -> None:
    assert figures.milliseconds(figure) == text


def test_group_counts_tell_what_runs_and_what_was_planned_otherwise() -> None:
    assert group_counts(make_trial(1)) == "1 w8a8, 1 fp32 (1 not as planned)"
    assert group_counts(make_trial(1, groups=[])) == "1 w8a8 planned"


def test_groups_that_nobody_saw_are_counted_apart_from_those_that_run_as_planned() -> None:
    seen = GroupPrecision(group="a", planned="w8a8", effective="w8a8", seen_in="here")
    unseen = GroupPrecision(group="b", planned="w8a8", effective=None, reason="not seen: why")
    assert group_counts(make_trial(1, groups=[seen, unseen])) == "1 w8a8, 1 unseen (planned w8a8)"
    assert seen_in(make_trial(1, groups=[seen, seen])) == "here"
    assert seen_in(make_trial(1, groups=[seen, unseen])) == "1 in here"
    assert [c.text(unseen) for c in GROUPS.columns[1:3]] == ["w8a8", "unknown"]


def test_a_pruned_trial_says_how_and_what_its_recovery_cost() -> None:
    base = {
        "pruning": {
            "importance": "batch_norm",
            "channel_multiple": 16,
            "channels": {"a": (64, 32), "b": (96, 48)},
            "ranked_by_l2": ["b"],
        },
        "recovery": {
            "wall_s": 12.0,
            "epochs": 4,
            "kept_epoch": 3,
            "samples": 2152,
            "stopped_because": "all 4 epochs were run",
            "validation_samples": 239,
            "recovered_accuracy": 0.95,
            "teacher_accuracy": 0.99,
        },
    }
    trial = make_trial(1, pruned_base=base)
    kept = "80 of 160, ranked by batch_norm (1 groups by l2), in multiples of 16"
    assert kept_channels(trial) == kept
    text = recovery_summary(trial)
    assert "4 epochs of 2152 samples; all 4 epochs were run" in text
    assert "95.0% after epoch 3, FP32 99.0% (n=239, held back)" in text


def test_an_unpruned_trial_has_neither() -> None:
    assert kept_channels(make_trial(1)) == recovery_summary(make_trial(1)) == "-"
    noted = make_trial(1, pruned_base={"note": "no training data"})
    assert recovery_summary(noted) == "no training data"


def test_prune_summary_counts_ratios_and_leaves_zero_out() -> None:
    assert prune_summary(make_trial(1)) == "1 x 25%"
    assert prune_summary(make_trial(1, prune_ratios={})) == "none"


def test_an_unsteady_latency_says_so() -> None:
    to = io.StringIO()
    print_rows(TRIALS, [make_trial(1, is_steady=False)], output_format="table", to=to)
    assert "unsteady" in to.getvalue()


def test_a_group_that_runs_otherwise_than_planned_gives_its_reason() -> None:
    to = io.StringIO()
    print_rows(GROUPS, make_trial(1).groups, output_format="table", to=to)
    assert to.getvalue().splitlines()[2].split() == ["fc", "w8a8", "fp32", "-", "-", "no", "kernel"]


def test_a_front_stands_beside_its_baselines_fastest_first() -> None:
    trials = baseline_trials()
    rows = front_rows(trials[2:], trials, result=make_result())
    assert [row.trial.number for row in rows] == [3, 5, 1, 0]
    assert [row.roles[0] for row in rows] == ["front", "winner", "INT8", "FP32"]


def test_a_baseline_on_the_front_is_one_row_with_both_roles() -> None:
    trials = baseline_trials()
    rows = front_rows(trials, trials, result=make_result(winner="trial-1"))
    assert next(r.roles for r in rows if r.trial.number == 1) == ("winner", "INT8", "front")


def test_a_front_shows_confirmed_figures_where_there_are_some_and_says_so() -> None:
    confirmed = make_trial(
        1,
        held_out_accuracy=interval(0.9, 0.01),
        held_out_samples=540,
        confirmed_latency_ns=interval(2e6, 1e4),
        confirmed_latency_samples=900,
    )
    to = io.StringIO()
    rows = front_rows([confirmed, make_trial(2)], [], result=None)
    print_rows(FRONT, rows, output_format="table", to=to)
    first, second = to.getvalue().splitlines()[1:]
    assert "confirmed" in first and "90.0 [89.0, 91.0]" in first and "2.000 [1.990" in first
    assert first.split().count("540") == 1 and "900" in first.split()
    assert "search" in second and "93.4" in second and "320" in second.split()


@pytest.mark.parametrize(("width", "is_whole"), [(150, True), (80, False)])
def test_a_narrow_terminal_gets_intervals_below_their_figures_and_fewer_columns(
    width: int, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    to = Terminal()
    rows = front_rows(baseline_trials()[2:], baseline_trials(), result=make_result())
    print_rows(FRONT, rows, output_format="table", to=to)
    text = to.getvalue()
    assert "[2.370, 2.430]" in text and "2.400 [2.370" not in text
    assert ("pruned" in text.partition("no room for")[0]) is is_whole
    assert ("no room for" in text) is not is_whole


def test_a_wide_terminal_gets_one_line_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    to = Terminal()
    rows = front_rows(baseline_trials()[2:], baseline_trials(), result=make_result())
    print_rows(FRONT, rows, output_format="table", to=to)
    assert "2.400 [2.370, 2.430]" in to.getvalue()


def test_a_trial_that_was_not_measured_shows_no_figures() -> None:
    to = io.StringIO()
    bare = make_trial(1, accuracy=0.9).model_copy(
        update={"accuracy": None, "latency_ns": None, "latency_samples": None}
    )
    print_one(TRIAL, bare, output_format="table", to=to)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in to.getvalue().splitlines())
    assert lines["accuracy, search data"] == lines["latency p50"] == "-"
    assert lines["accuracy, held-out data"] == "-"


def test_a_finished_job_shows_verdict_and_reason() -> None:
    to = io.StringIO()
    result = make_result(verdict="impossible_budget", missed_by_ns=5e5)
    print_one(
        JOB, finished_job().model_copy(update={"result": result}), output_format="table", to=to
    )
    assert "impossible_budget, missed by 500.0 µs" in to.getvalue()
