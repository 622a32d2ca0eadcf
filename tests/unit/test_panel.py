"""What is shown while a job runs, and how following it ends."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Self

import pytest

from autotune.api_types import (
    Event,
    HypervolumePoint,
    Job,
    ModelError,
    Progress,
    Proposer,
)
from autotune.cli.panel import LivePanel, PlainLines, event_text, open_display, panel_lines
from autotune.cli.watching import Ended, follow, require_finished
from autotune.client import FINAL_STATES
from autotune.errors import InvalidModel, JobNotReady, ServiceError
from storage.records import JobState
from tests.unit.cli_fakes import NOW, FakeClient, finished_job, make_event, make_job, make_trial


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Recorder:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.events: list[int] = []
        self.lines: list[str] = []

    def show(self, job: Job) -> None:
        self.jobs.append(job)

    def note(self, event: Event, *, at_s: float) -> None:
        self.events.append(event.id)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        return None


def texts(job: Job) -> dict[str, str]:
    return dict(panel_lines(job))


def test_the_panel_says_phase_progress_best_front_device_and_time() -> None:
    said = texts(make_job())
    assert said["phase"] == "search (running)"
    assert said["trials"] == "7 of 40"
    assert said["best inside the budget"] == (
        "#5: accuracy 93.4 [91.4, 95.4] %, n=360; 2.400 [2.370, 2.430] ms p50, n=320"
    )
    assert said["front"] == "3 trials, hypervolume 0.01234"
    assert said["device"] == "local"
    assert said["time"] == "1 min 5 s elapsed, about 2 min 10 s left"
    assert said["budget"] == "2.000 ms (0.50 x FP32, which takes 4.000 ms)"


def test_the_panel_says_what_was_gained_how_sure_it_is_and_who_had_the_ideas() -> None:
    history = [
        HypervolumePoint(trials=1, device_s=30.0, hypervolume=0.1),
        HypervolumePoint(trials=20, device_s=40.0, hypervolume=0.4),
    ]
    progress = make_job().progress.model_copy(
        update={
            "hypervolume_history": history,
            "model_error": ModelError(n=19, latency=0.023, latency_covered=0.95, drop=0.0041),
            "proposers": {
                "flip": Proposer(trials=9, ranked=9, on_front=3),
                "optuna": Proposer(trials=4, ranked=3, on_front=0),
            },
            "time_left_error_s": 20.0,
        }
    )
    said = texts(make_job(progress=progress))
    assert said["over trials"] == " " + "▃" * 22 + "█ 20"
    assert said["over device time"] == " " * 17 + "▃" * 6 + "█ 40 s"
    assert said["model"] == (
        "off by 2.3% of the latency and 0.41 points, each of n=19 trials predicted from the others"
    )
    assert said["proposed by"] == "flip 9 (3 on the front), optuna 4"
    assert said["time"] == "1 min 5 s elapsed, about 2 min 10 s ± 20 s left"


def test_what_is_not_known_yet_is_not_shown_as_a_figure() -> None:
    progress = Progress(phase="load", trials_finished=0, trials_total=40, elapsed_s=1.0)
    said = texts(make_job(progress=progress, latency_budget_ns=None))
    assert said["best inside the budget"] == "none yet" and said["device"] == "none yet"
    assert said["time"] == "1 s elapsed" and "budget" not in said


def test_an_offline_device_and_an_unsteady_best_are_named() -> None:
    progress = make_job().progress.model_copy(
        update={"device_online": False, "best_trial": make_trial(2, is_steady=False)}
    )
    said = texts(make_job(progress=progress, reason="waiting for pi4"))
    assert said["device"] == "local, OFFLINE"
    assert "unsteady" in said["best inside the budget"] and said["note"] == "waiting for pi4"


def test_a_terminal_gets_the_panel_and_a_file_gets_lines() -> None:
    assert isinstance(open_display(Terminal()), LivePanel)
    assert isinstance(open_display(io.StringIO()), PlainLines)


def test_the_live_panel_draws_the_job_and_its_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with LivePanel(stream) as panel:
        panel.note(make_event(1, "trial_confirmed", number=7), at_s=3.0)
        panel.say("hello [there]")
        panel.show(make_job(name="digits [v2]"))
    drawn = stream.getvalue()
    assert "7 of 40" in drawn and "trial #7 measured again" in drawn
    assert "digits [v2]" in drawn and "hello [there]" in drawn


def test_the_live_panel_restores_the_cursor_after_an_error() -> None:
    stream = Terminal()
    with pytest.raises(RuntimeError), LivePanel(stream) as panel:
        panel.show(make_job())
        raise RuntimeError
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_plain_lines_carry_seconds_and_say_a_thing_once() -> None:
    now = [100.0]
    stream = io.StringIO()
    lines = PlainLines(stream, clock=lambda: now[0])
    now[0] = 101.5
    lines.note(make_event(1, "phase", phase="search"), at_s=1.2)
    lines.show(make_job())
    lines.show(make_job(phase="confirming"))
    assert stream.getvalue().splitlines() == [
        "[    1.2 s] phase: search",
        "[    1.5 s] state: running",
        "[    1.5 s] phase: confirming",
    ]


def test_plain_lines_of_an_earlier_job_carry_that_jobs_seconds() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, clock=lambda: 100.0)
    lines.note(make_event(1, "phase", phase="search"), at_s=60.0)
    lines.say("watching")
    assert stream.getvalue() == "[   60.0 s] phase: search\n[   60.0 s] watching\n"


def test_plain_lines_repeat_no_notice() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    job = make_job(notices=["the source is ONNX: nothing is pruned"])
    lines.show(job)
    lines.show(job)
    assert stream.getvalue().count("nothing is pruned") == 1


@pytest.mark.parametrize(
    ("kind", "payload", "text"),
    [
        (
            "trial_finished",
            {
                "number": 7,
                "proposed_by": "optuna",
                "outcome": "ok",
                "accuracy": 0.934,
                "latency_ns": 2.4e6,
            },
            "trial #7 (optuna): ok, accuracy 93.4%, p50 2.400 ms",
        ),
        (
            "trial_finished",
            {
                "number": 8,
                "proposed_by": "flip",
                "outcome": "compression_failed",
                "reason": "fc",
            },
            "trial #8 (flip): compression_failed: fc",
        ),
        (
            "base_prepared",
            {
                "base": {
                    "prune_ratios": {"a": 0.25, "b": 0.25},
                    "macs": 1_500_000,
                    "recovery_epochs": 8,
                    "recovery_s": 12.3,
                }
            },
            "pruned base: 25% of 2 groups, 1.50 M MACs, recovered in 8 epochs (12 s)",
        ),
        (
            "model",
            {"n": 12, "latency": 0.0312, "latency_covered": 0.92, "drop": 0.004},
            "model: off by 3.1% of the latency and 0.40 points, each of n=12 trials predicted "
            "from the others",
        ),
        ("state", {"state": "failed", "reason": "no room"}, "state: failed: no room"),
        ("notice", {"message": "nothing is pruned"}, "note: nothing is pruned"),
        (
            "device_moved",
            {"to": 3, "why": "two words", "x": 2.41234, "y": None},
            'device moved to=3 why="two words" x=2.412',
        ),
    ],
)
def test_an_event_is_one_line(kind: str, payload: dict[str, Any], text: str) -> None:
    assert event_text(make_event(1, kind, **payload)) == text


def test_following_shows_every_state_and_event_and_returns_the_last() -> None:
    client = FakeClient(
        states=[make_job(), make_job(), finished_job()],
        event_list=[make_event(1), make_event(2)],
    )
    display = Recorder()
    ended = follow(client, "job-1", display, poll_s=0.01)
    assert ended.job.state == "finished" and ended.job == display.jobs[-1]
    assert display.events == [1, 2]


def test_following_leaves_out_what_happened_before() -> None:
    old = make_event(1).model_copy(update={"created_at": NOW - timedelta(hours=1)})
    client = FakeClient(event_list=[old, make_event(2)])
    display = Recorder()
    follow(client, "job-1", display, since=NOW, poll_s=0.01)
    assert display.events == [2]


class Flaky(FakeClient):
    """Does not answer the first two times; its event stream never works."""

    refusals = 2

    def job(self, reference: str) -> Job:
        if self.refusals:
            self.refusals -= 1
            raise ServiceError("connection refused")
        return super().job(reference)

    def events(self, reference: str) -> Iterator[Event]:
        raise ServiceError("connection refused")


def test_a_service_that_is_away_for_a_moment_does_not_end_the_watch() -> None:
    display = Recorder()
    assert follow(Flaky(), "job-1", display, poll_s=0.01).job.state == "finished"
    assert len(display.lines) == 2


def test_a_dead_child_ends_the_watch_at_once() -> None:
    def check() -> None:
        raise ServiceError("the agent ended unexpectedly")

    with pytest.raises(ServiceError, match="agent ended"):
        follow(FakeClient(states=[make_job()]), "job-1", Recorder(), check=check)


def test_the_final_states_are_those_of_the_records() -> None:
    assert {state.value for state in JobState if state.is_final} == FINAL_STATES


def test_a_finished_job_passes_and_a_cancelled_one_does_not() -> None:
    assert require_finished(Ended(finished_job())) == finished_job()
    with pytest.raises(JobNotReady, match="is cancelled: by its user"):
        require_finished(Ended(make_job(state="cancelled", reason="by its user")))


def test_a_failed_job_raises_the_error_that_its_last_event_names() -> None:
    failed = make_job(state="failed", reason="the file is truncated")
    client = FakeClient(
        states=[failed], event_list=[make_event(1, "state", state="failed", error="InvalidModel")]
    )
    with pytest.raises(InvalidModel, match="truncated"):
        require_finished(follow(client, "job-1", Recorder(), poll_s=0.01))
    with pytest.raises(JobNotReady, match="truncated"):
        require_finished(Ended(failed, "KeyError"))
