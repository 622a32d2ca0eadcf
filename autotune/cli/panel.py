"""What is shown while a job runs: one live panel on a terminal, plain lines elsewhere.

Owns the two displays and the words in them. Where the facts come from is `watching.py`'s
work. Everything here is talk, so it goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from autotune.api_types import Event, Job, ModelError, Progress, Proposer, Trial
from autotune.cli import figures

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR_WIDTH = 30


class Display(Protocol):
    """Shows a job while it runs; a context manager, so that a terminal is always restored."""

    def show(self, job: Job) -> None:
        """The job as it is now."""

    def note(self, event: Event, *, at_s: float) -> None:
        """Something happened in the job, that many seconds after it was submitted."""

    def say(self, text: str) -> None:
        """A line for the person who waits."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


def open_display(stream: TextIO | None = None) -> Display:
    """The live panel where the stream is a terminal, plain lines otherwise."""
    stream = stream or sys.stderr
    return LivePanel(stream) if stream.isatty() else PlainLines(stream)


def panel_lines(job: Job) -> list[tuple[str, str]]:
    """What the panel says, as label and text; a fact that does not exist yet is left out."""
    progress = job.progress
    lines = [
        ("phase", f"{progress.phase or job.phase} ({job.state})"),
        ("trials", f"{progress.trials_finished} of {progress.trials_total}"),
        ("best inside the budget", best_text(progress.best_trial)),
        ("front", _front_text(job)),
        *_course(job),
        ("device", device_text(job)),
        ("time", _time_text(job)),
    ]
    if job.latency_budget_ns is not None:
        lines.insert(2, ("budget", _budget_text(job)))
    if job.reason:
        lines.append(("note", job.reason))
    lines += [("note", notice) for notice in job.notices]
    return lines


def best_text(trial: Trial | None) -> str:
    """The best feasible trial so far, with accuracy and latency."""
    if trial is None:
        return "none yet"
    accuracy = figures.with_unit(figures.percent(trial.accuracy), "%", trial.accuracy_samples)
    latency = figures.with_unit(
        figures.milliseconds(trial.latency_ns), "ms p50", trial.latency_samples
    )
    unsteady = ", unsteady" if trial.is_steady is False else ""
    return f"#{trial.number}: accuracy {accuracy}; {latency}{unsteady}"


def device_text(job: Job) -> str:
    """The measuring device, and whether its agent is there."""
    progress = job.progress
    if progress.device_name is None:
        return "none yet"
    return progress.device_name if progress.device_online else f"{progress.device_name}, OFFLINE"


def _front_text(job: Job) -> str:
    text = f"{job.progress.front_size} trials"
    if job.progress.hypervolume is not None:
        text += f", hypervolume {job.progress.hypervolume:.5f}"
    return text


def _course(job: Job) -> list[tuple[str, str]]:
    """How the search went: what it gained for what it cost, how sure it is, who had the ideas."""
    progress, lines = job.progress, []
    points = progress.hypervolume_history
    if points and points[-1].hypervolume > 0:
        by_trials = figures.steps([(p.trials, p.hypervolume) for p in points])
        by_time = figures.steps([(p.device_s, p.hypervolume) for p in points])
        lines.append(("over trials", f"{by_trials} {points[-1].trials}"))
        if by_time:
            device_s = figures.seconds(points[-1].device_s)
            lines.append(("over device time", f"{by_time} {device_s}"))
    if progress.model_error is not None:
        lines.append(("model", model_error_text(progress.model_error)))
    if progress.proposers:
        lines.append(("proposed by", proposers_text(progress.proposers)))
    return lines


def model_error_text(error: ModelError) -> str:
    """How far the fitted model's predictions are off."""
    return (
        f"off by {error.latency:.1%} of the latency and {100 * error.drop:.2f} points, "
        f"each of n={error.n} trials predicted from the others"
    )


def proposers_text(proposers: Mapping[str, Proposer]) -> str:
    """How many trials each proposer had the idea of, and how many of them are on the front."""
    return ", ".join(
        f"{name} {found.trials}" + (f" ({found.on_front} on the front)" if found.on_front else "")
        for name, found in proposers.items()
    )


def _budget_text(job: Job) -> str:
    text = figures.latency(job.latency_budget_ns)
    if job.fp32_latency_ns and job.latency_budget_ns:
        share = job.latency_budget_ns / job.fp32_latency_ns
        text += f" ({share:.2f} x FP32, which takes {figures.latency(job.fp32_latency_ns)})"
    return text


def _time_text(job: Job) -> str:
    left = job.progress.time_left_s
    text = f"{figures.seconds(job.progress.elapsed_s)} elapsed"
    return f"{text}, about {time_left_text(job.progress)} left" if left else text


def time_left_text(progress: Progress) -> str:
    """The time that is left, with the half width of its 95 % interval."""
    error = progress.time_left_error_s
    return figures.seconds(progress.time_left_s) + (f" ± {figures.seconds(error)}" if error else "")


class LivePanel:
    """One panel that is redrawn in place.

    It draws when told to and has no refresh thread: the device may be this very machine, and
    a display must not disturb what is being measured on it.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._last_event = ""

    def show(self, job: Job) -> None:
        """Redraw."""
        self._live.update(self._render(job), refresh=True)

    def note(self, event: Event, *, at_s: float) -> None:
        """Keep the last event for the panel's lower edge."""
        del at_s  # the panel shows the job's own clock
        self._last_event = event_text(event)

    def say(self, text: str) -> None:
        """Print above the panel."""
        self._console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def _render(self, job: Job) -> RenderableType:
        from rich.markup import escape
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in panel_lines(job):
            grid.add_row(label, Text(text))
            if label == "trials":
                done, total = job.progress.trials_finished, max(1, job.progress.trials_total)
                grid.add_row("", ProgressBar(total=total, completed=done, width=_BAR_WIDTH))
        return Panel(
            grid,
            title=f"[bold]{escape(job.name)}[/bold] {escape(job.id[:8])}",
            subtitle=escape(self._last_event) or None,
            title_align="left",
            subtitle_align="left",
        )


class PlainLines:
    """One line per event and per change of state, each with the seconds since the submission."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._start = clock()
        self._said: set[str] = set()

    def show(self, job: Job) -> None:
        """Print what no event has said yet; nothing where everything is known."""
        notices = [f"note: {notice}" for notice in job.notices]
        phase = f"phase: {job.phase}" if job.phase and job.phase != job.state else None
        for text in (_state_text(job.state, job.reason), phase, *notices):
            if text is not None and text not in self._said:
                self._said.add(text)
                self.say(text)

    def note(self, event: Event, *, at_s: float) -> None:
        """Print the event."""
        text = event_text(event)
        self._said.add(text)
        self._start = min(self._start, self._clock() - at_s)
        self._write(text, at_s)

    def say(self, text: str) -> None:
        """Print a line."""
        self._write(text, self._clock() - self._start)

    def _write(self, text: str, at_s: float) -> None:
        self._stream.write(f"[{at_s:7.1f} s] {text}\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.flush()


def event_text(event: Event) -> str:
    """An event as one line for people; an unknown kind shows its facts as they come."""
    known = _EVENT_TEXTS.get(event.kind)
    if known is not None:
        return known(event.payload)
    facts = [f"{key}={_fact(value)}" for key, value in event.payload.items() if value is not None]
    return " ".join([event.kind.replace("_", " "), *facts])


def _trial_text(payload: Mapping[str, Any]) -> str:
    text = (
        f"trial #{payload.get('number')} ({payload.get('proposed_by')}): {payload.get('outcome')}"
    )
    if payload.get("reason"):
        text += f": {payload['reason']}"
    if payload.get("accuracy") is not None:
        text += f", accuracy {payload['accuracy']:.1%}"
    if payload.get("latency_ns") is not None:
        text += f", p50 {figures.latency(payload['latency_ns'])}"
    return text


def _base_text(payload: Mapping[str, Any]) -> str:
    base = payload.get("base") or {}
    ratios = Counter(f"{ratio:.0%}" for ratio in (base.get("prune_ratios") or {}).values())
    removed = ", ".join(f"{ratio} of {n} groups" for ratio, n in sorted(ratios.items()))
    text = f"pruned base: {removed or 'nothing removed'}"
    if base.get("macs") is not None:
        text += f", {figures.count(base['macs'])} MACs"
    if base.get("recovery_epochs"):
        text += f", recovered in {base['recovery_epochs']} epochs"
        text += f" ({figures.seconds(base.get('recovery_s'))})"
    return text


def _state_text(state: str, reason: str | None) -> str:
    return f"state: {state}" + (f": {reason}" if reason else "")


_EVENT_TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "phase": lambda payload: f"phase: {payload.get('phase')}",
    "state": lambda payload: _state_text(str(payload.get("state")), payload.get("reason")),
    "notice": lambda payload: f"note: {payload.get('message')}",
    "trial_finished": _trial_text,
    "trial_confirmed": lambda payload: f"trial #{payload.get('number')} measured again to confirm",
    "base_prepared": _base_text,
    "model": lambda payload: (
        f"model: {model_error_text(ModelError.model_validate(payload)) if payload else 'fitted'}"
    ),
    "verified": lambda payload: (
        f"bundle measured again on {payload.get('device_name')}: {payload.get('outcome')}"
    ),
}


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return figures.number(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if " " in value else value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
