"""The parent side of a measurement: one throw-away child, supervised, one outcome.

Owns the child's life (start, limits, time limit, cancellation, end) and the mapping of each way
it can end to an `Outcome` with a reason. Loads no runtime and no numpy: whatever a model does,
it does to the child. The child's own work is `measurement_child.py`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from device_agents.conditions import ROOT, Memory, NotAvailable
from device_agents.files import NO_ROOM, NO_ROOM_EXIT
from device_agents.protocol import (
    LatencyReport,
    MeasurementPlan,
    Outcome,
    RuntimeRequest,
)
from device_agents.rest import RestMemory

MEMORY_FRACTION = 0.9
"""Share of the memory that is available at the start which a measurement may take."""
LOG_TAIL_BYTES = 2000
NO_ROOM_REASON = (
    "no room left for the measurement in the folder of temporary files: free some space, or set "
    "TMPDIR to a folder on another disk"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementOutcome:
    """How a measurement ended; `report` is there for OK and UNSTABLE."""

    outcome: Outcome
    reason: str | None = None
    report: LatencyReport | None = None


class Measurement:
    """One measurement in one child process; made for one `run`.

    `reference_runtime` is what the reference runs with; by default what the candidate does.
    With `profile` the candidate's kernels are timed too, in a session of their own at the end.
    `memory` says how long it waits for a device at rest, and learns from it; by default that of
    an agent that has just been started. `cancel` may come from any thread, before, during or
    after `run`.
    """

    def __init__(
        self,
        *,
        candidate: Path,
        reference: Path,
        runtime: RuntimeRequest,
        plan: MeasurementPlan,
        reference_runtime: RuntimeRequest | None = None,
        profile: bool = False,
        memory: RestMemory | None = None,
        memory_limit_bytes: int | None = None,
    ) -> None:
        self._candidate = candidate
        self._reference = reference
        self._runtime = runtime
        self._reference_runtime = reference_runtime or runtime
        self._plan = plan
        self._profile = profile
        self._memory = memory or RestMemory()
        self._rest = self._memory.ask(self._reference_key, plan, is_reference=self._is_reference)
        self._memory_limit_bytes = memory_limit_bytes or default_memory_limit()
        self._child: subprocess.Popen[bytes] | None = None
        self._killed: Outcome | None = None
        self._guard = threading.Lock()

    def cancel(self) -> None:
        """Kill the child, if there is one, or keep it from being started."""
        self._kill(Outcome.CANCELLED)

    def run(self) -> MeasurementOutcome:
        """Measure. Takes at most the plan's `timeout_s`; never raises for what the child does.

        Nor for a device without room for a folder or for another process, which are outcomes.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="autotune-measurement-") as name:
                ended = self._run_in(Path(name))
        except OSError as error:
            return _not_begun(error)
        outcome = interpret(ended, runtime=self._runtime, timeout_s=self._plan.timeout_s)
        self._memory.learn(
            self._reference_key, self._plan, outcome.report, is_reference=self._is_reference
        )
        return outcome

    @property
    def _is_reference(self) -> bool:
        candidate = (self._candidate, self._runtime)
        return candidate == (self._reference, self._reference_runtime)

    @property
    def _reference_key(self) -> tuple[Path, str]:
        return self._reference, self._reference_runtime.model_dump_json()

    def _run_in(self, folder: Path) -> ChildEnd:
        job_path, report_path = folder / "job.json", folder / "report.json"
        job_path.write_text(json.dumps(self._job()), encoding="utf-8")
        started_s = time.monotonic()
        with (folder / "log").open("wb") as log:
            self._start(job_path, report_path, log)
        kills_before = system_oom_kills()
        return_code = self._wait()
        return ChildEnd(
            return_code=return_code,
            process_s=time.monotonic() - started_s,
            killed=self._killed,
            was_oom_killed=kills_before != system_oom_kills(),
            document=_read_document(report_path),
            log_tail=_tail(folder / "log"),
        )

    def _job(self) -> dict[str, Any]:
        plan, runtime, reference = self._plan, self._runtime, self._reference_runtime
        threads = max(runtime.threads, reference.threads)
        return {
            "candidate_path": str(self._candidate),
            "reference_path": str(self._reference),
            "runtime": runtime.runtime,
            "options": runtime.model_dump(exclude={"runtime"}),
            "reference_runtime": reference.runtime,
            "reference_options": reference.model_dump(exclude={"runtime"}),
            "target_half_width": plan.target_half_width,
            "time_cap_s": plan.time_cap_s,
            "rest_ns": self._rest.reference_ns,
            "rest_cap_s": self._rest.cap_s,
            "is_calibration": plan.is_calibration,
            "min_blocks": plan.min_blocks,
            "quantile": plan.quantile,
            "seed": plan.seed,
            "reference_latency_ns": plan.reference_latency_ns,
            "memory_limit_bytes": self._memory_limit_bytes,
            "cpu_limit_s": math.ceil(plan.timeout_s * (threads + 1)) + 10,
            "parent_pid": os.getpid(),
            "profile": self._profile,
        }

    def _start(self, job_path: Path, report_path: Path, log: Any) -> None:
        command = [sys.executable, "-m", "device_agents.measurement_child"]
        with self._guard:
            if self._killed is not None:
                return
            self._child = subprocess.Popen(  # noqa: S603 - our own module
                [*command, str(job_path), str(report_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # numpy's idle threads would keep the child from a network of its own.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # a terminal's Ctrl-C is the parent's to handle
            )

    def _wait(self) -> int:
        if self._child is None:
            return 0
        # A blocking wait with a timer costs nothing while the child measures; waiting with a
        # time limit would poll 20 times a second.
        timer = threading.Timer(self._plan.timeout_s, self._kill, args=(Outcome.TIMEOUT,))
        timer.daemon = True
        timer.start()
        try:
            return self._child.wait()
        finally:
            timer.cancel()
            self._sweep()

    def _kill(self, reason: Outcome) -> None:
        with self._guard:
            if self._killed is None:
                self._killed = reason
            if self._child is not None and self._child.returncode is None:
                # SIGKILL at once: a child that hangs may ignore anything milder, and it has
                # nothing to save.
                _kill_group(self._child.pid)

    def _sweep(self) -> None:
        if self._child is not None:
            _kill_group(self._child.pid)  # processes that the child left behind


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnd:
    """All that is known when the child is gone; `process_s` is how long it lived."""

    return_code: int
    process_s: float
    killed: Outcome | None
    was_oom_killed: bool
    document: dict[str, Any] | None
    log_tail: str


def _not_begun(error: OSError) -> MeasurementOutcome:
    """The outcome where the device had no room for the child; anything else is not for us."""
    # Where no folder for temporary files can be written to, `tempfile` names none.
    has_no_folder = isinstance(error, FileNotFoundError) and error.filename is None
    if error.errno in NO_ROOM or has_no_folder:
        return MeasurementOutcome(outcome=Outcome.DEVICE_DISK, reason=NO_ROOM_REASON)
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        reason = f"the device could not start a process: {error.strerror}"
        return MeasurementOutcome(outcome=Outcome.OOM, reason=reason)
    raise error


def interpret(ended: ChildEnd, *, runtime: RuntimeRequest, timeout_s: float) -> MeasurementOutcome:
    """The outcome of a child that ended so.

    What we did ourselves comes first, then how the system ended it, then what it said.
    """
    if ended.killed is Outcome.TIMEOUT:
        reason = f"no result within {timeout_s:g} s; the process was killed"
        return MeasurementOutcome(outcome=Outcome.TIMEOUT, reason=reason)
    if ended.killed is not None:
        return MeasurementOutcome(outcome=ended.killed, reason="the lease was taken back")
    if ended.return_code < 0:
        return _ended_by_signal(ended)
    if ended.document is None and ended.return_code == NO_ROOM_EXIT:
        return MeasurementOutcome(outcome=Outcome.DEVICE_DISK, reason=NO_ROOM_REASON)
    if ended.document is None:
        reason = f"the process ended with code {ended.return_code} and without a result"
        return MeasurementOutcome(outcome=Outcome.RUNTIME_CRASH, reason=reason + _quote(ended))
    return _reported(ended, runtime)


def _ended_by_signal(ended: ChildEnd) -> MeasurementOutcome:
    name = _signal_name(-ended.return_code)
    if ended.return_code == -signal.SIGXCPU:
        reason = f"the CPU time limit was reached ({name})"
        return MeasurementOutcome(outcome=Outcome.TIMEOUT, reason=reason)
    if ended.return_code == -signal.SIGKILL:
        sure = "the kernel ran" if ended.was_oom_killed else "most likely the kernel ran"
        reason = f"{name} from outside: {sure} out of memory"
        return MeasurementOutcome(outcome=Outcome.OOM, reason=reason)
    if any(sign in ended.log_tail for sign in ("bad_alloc", "MemoryError")):
        reason = f"out of memory: {name}{_quote(ended)}"
        return MeasurementOutcome(outcome=Outcome.OOM, reason=reason)
    reason = f"the runtime died of {name}{_quote(ended)}"
    return MeasurementOutcome(outcome=Outcome.RUNTIME_CRASH, reason=reason)


def _reported(ended: ChildEnd, runtime: RuntimeRequest) -> MeasurementOutcome:
    document = ended.document or {}
    try:
        outcome = Outcome(document["outcome"])
        report = document.get("report")
        if report is not None and outcome is Outcome.UNSTABLE and math.isinf(report["ratio_high"]):
            report = None  # two blocks or fewer: nothing is known of the spread
        if report is not None:
            known = {"runtime": runtime.model_dump(), "process_s": ended.process_s}
            report = LatencyReport.model_validate(report | known)
            _require_numbers(report)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        reason = f"the process wrote a result that makes no sense: {type(error).__name__}"
        return MeasurementOutcome(outcome=Outcome.RUNTIME_CRASH, reason=reason)
    return MeasurementOutcome(outcome=outcome, reason=document.get("reason"), report=report)


def _require_numbers(report: LatencyReport) -> None:
    """Refuse NaN and infinities: a clock or a runtime that gives them measured nothing."""
    for name, value in report:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")


def default_memory_limit(root: Path = ROOT) -> int | None:
    """What a measurement may take of the memory available now; None where unknown."""
    try:
        return int(Memory(root=root).read() * MEMORY_FRACTION)
    except (NotAvailable, OSError, ValueError):
        return None


def system_oom_kills(root: Path = ROOT) -> int | None:
    """How often the kernel killed for lack of memory since it started; None where unknown."""
    try:
        text = (root / "proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return None
    counts = [line.split()[1] for line in text.splitlines() if line.startswith("oom_kill ")]
    return int(counts[0]) if counts else None


def _read_document(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def _quote(ended: ChildEnd) -> str:
    printable = "".join(x if x.isprintable() or x == "\n" else " " for x in ended.log_tail)
    lines = [line.strip() for line in printable.splitlines() if line.strip()]
    return f"; it last wrote: {lines[-1][:200]}" if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill_group(process_group: int) -> None:
    try:
        os.killpg(process_group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # gone already
