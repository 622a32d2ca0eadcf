"""The process: opens the database and the address, runs the application, ends cleanly.

Owns the order of starting and stopping, and the files that tell local clients where the
service is. What it serves is `app.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from autotune.errors import AddressInUse, DatabaseInUse, DiskFull, InvalidSettings, ServiceError
from autotune.service import uploads
from autotune.service.app import create_app
from autotune.service.broadcast import Broadcast
from autotune.service.context import JobRunner, ServiceContext
from autotune.service.security import LocalToken, local_token, write_private
from autotune.settings import Settings
from device_agents.files import NO_ROOM
from storage.artifacts import ArtifactStore
from storage.database import Database, open_database
from storage.errors import ArtifactStoreFull, DatabaseFull, DatabaseLocked, StorageError
from storage.repository import Repository

GRACE_S = 10.0
"""Requests under way get this long to end; long polls and event streams end at once."""

_BACKLOG = 1024
"""Agents that come back together after a restart are queued, not refused."""

RunnerFactory = Callable[[Repository, ArtifactStore, Settings], JobRunner]


def say(text: str) -> None:
    """A line for the person at the terminal; stdout stays free for data."""
    with contextlib.suppress(OSError):  # a log on a full disk must not keep the service up
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def default_runner(
    repository: Repository, artifacts: ArtifactStore, settings: Settings
) -> JobRunner:
    """The runner that really tunes; imports the search, and Ray with it."""
    from autotune.search.fleet import ONLINE_WITHIN_S
    from autotune.search.runner import Runner
    from autotune.service.views import ONLINE_HEARTBEATS
    from device_agents.device import host_id

    return Runner(
        repository,
        artifacts,
        data_dir=settings.data_dir,
        workers=settings.workers,
        trust_job_code=settings.trust_job_code,
        host_id=host_id(),
        online_within_s=max(ONLINE_WITHIN_S, ONLINE_HEARTBEATS * settings.heartbeat_s),
    )


def serve(
    settings: Settings,
    *,
    ready_file: Path | None = None,
    make_runner: RunnerFactory = default_runner,
) -> None:
    """Serve until SIGTERM or SIGINT; then put down what runs and return.

    `ready_file` is written with `url` and `token` (JSON, for its owner only) once the service
    answers.

    Raises:
        AddressInUse: the port is taken.
        DatabaseInUse: another service owns the SQLite file.
        DiskFull: no room is left below the data directory.
        InvalidSettings: address, data directory or TLS files cannot be used.
        ServiceError: the database does not answer.
    """
    with contextlib.ExitStack() as stack:
        with _translated(settings):
            settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            database = stack.enter_context(contextlib.closing(_open(settings)))
            listener = stack.enter_context(contextlib.closing(_listen(settings)))
            context = _make_context(settings, database, make_runner)
            token = local_token(context.repository, settings.token_file)
        url = _url(settings, listener)
        stack.callback(_withdraw, settings.service_file)
        server = _Server(
            _configuration(context),
            on_ready=lambda: _announce(settings, url, token, ready_file),
            on_stop=context.broadcast.close,
        )
        try:
            asyncio.run(server.serve(sockets=[listener]))
        except SystemExit as error:  # uvicorn's way to say that the life span did not begin
            raise ServiceError("the service could not start; the lines above say why") from error
        with _translated(settings):
            if server.not_announced is not None:
                raise server.not_announced
        say("stopped")


def _make_context(
    settings: Settings, database: Database, make_runner: RunnerFactory
) -> ServiceContext:
    broadcast = Broadcast()
    repository = Repository(database, notify=broadcast.publish)
    artifacts = ArtifactStore(settings.artifacts_dir)
    # Half-received uploads of a service that was killed.
    shutil.rmtree(uploads.incoming(settings), ignore_errors=True)
    return ServiceContext(
        settings=settings,
        repository=repository,
        artifacts=artifacts,
        broadcast=broadcast,
        runner=make_runner(repository, artifacts, settings),
    )


class _Server(uvicorn.Server):
    """uvicorn, told when it is ready, and ending by return and not by the signal itself."""

    def __init__(
        self, config: uvicorn.Config, *, on_ready: Callable[[], None], on_stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.not_announced: OSError | None = None
        self._on_ready = on_ready
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.should_exit:
            return
        try:
            self._on_ready()
        except OSError as error:
            self.not_announced, self.should_exit = error, True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if not self.should_exit:
            say("stopping; jobs go on after the next start")
            self._on_stop()  # whoever waits is answered, so that connections can close
        self.should_exit = True


def _configuration(context: ServiceContext) -> uvicorn.Config:
    settings = context.settings
    try:
        config = uvicorn.Config(
            create_app(context),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(GRACE_S),
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise InvalidSettings(
            f"the TLS files {settings.tls_cert} and {settings.tls_key} cannot be used: {error}"
        ) from error
    return config


def _open(settings: Settings) -> Database:
    try:
        return open_database(settings.database)
    except DatabaseLocked as error:
        raise DatabaseInUse(str(error)) from error


def _listen(settings: Settings) -> socket.socket:
    """The listening socket, bound here so that a free port's number is known."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        # IPv4 first where a name has both: it is what `localhost` in a URL means to most.
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        # On Linux reuse does not let two listeners share a port; it only keeps a restart from
        # waiting until the last one's connections have faded.
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"{where} is taken by another program; choose another port with --port, or 0 "
                "for a free one"
            ) from error
        raise InvalidSettings(f"cannot listen on {where}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def _url(settings: Settings, listener: socket.socket) -> str:
    """The address for clients on this machine."""
    scheme = "https" if settings.uses_tls else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104  # compared, not bound
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _announce(settings: Settings, url: str, token: LocalToken, ready_file: Path | None) -> None:
    """Tell programs and people where the service is."""
    place = json.dumps({"url": url, "pid": os.getpid()})
    write_private(settings.service_file, place + "\n")
    say(f"edge-autotune serves {url}")
    say(f"  data directory  {settings.data_dir}")
    say(f"  user token      {settings.token_file}")
    if token.is_new:
        say(f"  shown once      {token.token}")
    if ready_file is not None:
        write_private(ready_file, json.dumps({"url": url, "token": token.token}) + "\n")


def _withdraw(service_file: Path) -> None:
    """Remove the file that tells where this service is, unless it is another's by now."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(service_file.read_text(encoding="utf-8"))["pid"] == os.getpid():
            service_file.unlink()


@contextlib.contextmanager
def _translated(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (DatabaseFull, ArtifactStoreFull) as error:
        raise DiskFull(str(error)) from error
    except StorageError as error:
        raise ServiceError(str(error)) from error
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(
                f"no room is left below {settings.data_dir}; free some space and start again"
            ) from error
        raise InvalidSettings(
            f"the data directory {settings.data_dir} cannot be used: {error}"
        ) from error
