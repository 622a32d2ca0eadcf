"""Child processes that never outlive their parent, with their logs in files.

Owns starting, watching and stopping; what runs is `embedded.py`'s choice. A child sits in a
session of its own, so that Ctrl-C reaches the parent alone and the end is orderly.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import autotune.errors
from autotune.errors import AutotuneError, ServiceError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TAIL_LINES = 20
_GRACE_S = 15.0


class Child:
    """One running child. `log` is appended to; the part since the start belongs to it."""

    def __init__(self, name: str, command: Sequence[str], *, log: Path) -> None:
        self.name = name
        self.log = log
        # A service prints its token when it makes one: logs are their user's alone.
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        log.touch(mode=0o600)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # no threads started yet
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """It has not ended."""
        return self._exit_code() is None

    def require_alive(self) -> None:
        """Return while the child runs.

        Raises:
            AutotuneError: it ended; the class is that of its exit code, the message its last
                words.
        """
        code = self._exit_code()
        if code is not None:
            raise self._explain(code)

    def stop(self, grace_s: float = _GRACE_S) -> None:
        """Ask the child to end, then end it with everything that it started."""
        if self._process.returncode is not None:
            return
        if self.is_alive:
            self._process.terminate()
            wait_until(lambda: not self.is_alive, timeout_s=grace_s)
        # What is left in its session (workers of a crashed service) goes with it. The child
        # is not reaped yet, so its number still names this group and no other.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs. Does not reap."""
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def tail(self) -> str:
        """The last lines of its log, this run's only."""
        with self.log.open("rb") as written:
            written.seek(self._log_start)
            text = written.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def _explain(self, code: int) -> AutotuneError:
        last_words = self.tail()
        said = [
            line.removeprefix("error: ")
            for line in last_words.splitlines()
            if line.startswith("error: ")
        ]
        known = _error_of(code)
        if known is not None:
            # A full disk takes no last words; the exit code still tells what it was.
            meaning = " ".join((known.__doc__ or "").split())
            return known(said[-1] if said else f"the {self.name} ended: {meaning}")
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        indented = "\n".join(f"  | {line}" for line in last_words.splitlines())
        return ServiceError(
            f"the {self.name} ended unexpectedly ({ended}); the end of {self.log}:\n{indented}"
        )


def wait_until(ready: Callable[[], bool], *, timeout_s: float, poll_s: float = 0.1) -> bool:
    """Whether `ready` came true within the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(poll_s)
    return ready()


def _error_of(exit_code: int) -> type[AutotuneError] | None:
    for error in vars(autotune.errors).values():
        if (
            isinstance(error, type)
            and issubclass(error, AutotuneError)
            and error is not AutotuneError
            and error.exit_code == exit_code
        ):
            return error
    return None


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child runs before its program: the kernel sends it SIGTERM when `parent` dies.

    Linux only (prctl(2), PR_SET_PDEATHSIG); elsewhere an orphan ends by its own means.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return prepare
