"""A service and one agent of its own, for the time of one command.

Owns the two children, their files in the data directory and the client that talks to them.
They are the same programs that `autotune serve` and `autotune-agent run` start, and they
talk HTTP over loopback exactly as a remote device would.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from autotune.cli.children import Child, wait_until
from autotune.client import Client
from autotune.errors import DeviceUnavailable, ServiceError

AGENT_NAME = "local"
# The first start migrates the database and starts Ray (2.4 s); a loaded machine needs more.
_START_TIMEOUT_S = 120.0


class EmbeddedService:
    """Starts with `with`, and ends with it whatever happened inside.

    `program` is what starts the service, by the options of `autotune serve`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        trust_job_code: bool,
        workers: int | None = None,
        say: Callable[[str], None] = lambda _text: None,
        program: Sequence[str] = ("-m", "autotune.cli", "serve"),
    ) -> None:
        self.data_dir = data_dir
        self._program = tuple(program)
        self._trust_job_code = trust_job_code
        self._workers = workers
        self._say = say
        self._children: list[Child] = []
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The client of the running service."""
        if self._client is None:
            raise ServiceError("the service has not been started")
        return self._client

    def check(self) -> None:
        """Return while both children live.

        Raises:
            AutotuneError: one of them ended; the message holds the end of its log.
        """
        for child in self._children:
            child.require_alive()

    def __enter__(self) -> Self:
        try:
            self._start_service()
            self._start_agent()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the agent, then the service: the agent still gets its last result delivered."""
        while self._children:
            self._children.pop().stop()
        if self._client is not None:
            self._client.close()

    def _start_service(self) -> None:
        ready_file = self.data_dir / "ready.json"
        ready_file.unlink(missing_ok=True)
        command = [sys.executable, *self._program, "--port", "0"]
        command += ["--data-dir", str(self.data_dir), "--ready-file", str(ready_file)]
        command.append("--trust-job-code" if self._trust_job_code else "--no-trust-job-code")
        if self._workers is not None:
            command += ["--workers", str(self._workers)]
        self._say("starting the service")
        service = Child("service", command, log=self.data_dir / "logs" / "service.log")
        self._children.append(service)
        ready = _read_when_written(ready_file, service)
        self._client = Client(ready["url"], ready["token"])

    def _start_agent(self) -> None:
        started = time.monotonic()
        token = self.client.enrolment_token()
        command = [sys.executable, "-m", "device_agents", "run", "--service", self.client.url]
        command += ["--token", token.token, "--name", AGENT_NAME]
        command += ["--state-dir", str(self.data_dir / "agent")]
        self._say("starting the agent")
        agent = Child("agent", command, log=self.data_dir / "logs" / "agent.log")
        self._children.append(agent)

        def online() -> bool:
            agent.require_alive()
            return any(
                d.is_online and d.last_seen_s_ago <= time.monotonic() - started
                for d in self.client.devices()
                if d.name == AGENT_NAME
            )

        if not wait_until(online, timeout_s=_START_TIMEOUT_S):
            raise DeviceUnavailable(
                f"the agent did not enroll within {_START_TIMEOUT_S:.0f} s; see {agent.log}"
            )


def _read_when_written(ready_file: Path, service: Child) -> dict[str, str]:
    found: dict[str, str] = {}

    def ready() -> bool:
        service.require_alive()
        with contextlib.suppress(OSError, ValueError):
            found.update(json.loads(ready_file.read_text(encoding="utf-8")))
        return bool(found)

    if not wait_until(ready, timeout_s=_START_TIMEOUT_S):
        raise ServiceError(
            f"the service was not ready within {_START_TIMEOUT_S:.0f} s; see {service.log}"
        )
    return found
