"""The one door to Ray: worker processes that keep a job's model and data warm.

Each worker is an actor with one thread, so that as many workers as cores use all of them and
oversubscribe none. A worker holds the FP32 graph, its calibration and the evaluation data;
the data travels once, through Ray's object store. An artifact that is kept does not travel:
workers of this host read its file, where sending 2.5 MB takes 5 ms of processor time. A worker
that dies costs one retry on a fresh one; what kills two workers in a row is reported as that
call's failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from autotune.errors import AutotuneError
from autotune.search.compression_worker import CompressionWorker
from autotune.search.interruption import Stopped
from autotune.spec import JobSpec
from storage.artifacts import ArtifactFile

if TYPE_CHECKING:
    from autotune.compression.data import DataSplits
    from device_agents.protocol import DeviceDescription

_POLL_S = 0.2
_BRIEF_S = 0.25
"""After a call, a worker waits 2 to 4 ms for its next, which is nothing beside a longer one: so
only calls as brief as this are sent one ahead, and never to wait behind a long one for long."""
_ADOPTION_S = 120.0
_READY_S = 60.0
_OBJECT_STORE_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One method call on any worker."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed:
    """The call killed its worker twice, or raised; `error` is for people."""

    error: str
    exception: AutotuneError | None = None


class WorkerProcess:
    """What Ray starts: a process that has spent its imports' seconds before a job comes."""

    def __init__(self) -> None:
        from autotune.compression import compressor, torchvision_repair  # noqa: F401

        with contextlib.suppress(AutotuneError):  # who needs torchvision is told on loading
            torchvision_repair.import_torchvision()
        self._worker: CompressionWorker | None = None

    def begin(self, *arguments: Any) -> None:
        """Become a worker of a job: the arguments are those of `CompressionWorker`."""
        self._worker = CompressionWorker(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """One method of the worker."""
        return getattr(self._worker, method)(*arguments)


class WorkerStarter:
    """Starts worker processes, some of them before they are asked for."""

    def __init__(self) -> None:
        self._ready: list[Any] = []

    def start_early(self, n: int) -> None:
        """Start `n` processes and return when they have imported what they need."""
        import ray

        self._ready = [self._start() for _ in range(n)]
        ray.wait([w.__ray_ready__.remote() for w in self._ready], num_returns=n, timeout=_READY_S)

    def take(self) -> Any:
        """A process that serves no job yet."""
        return self._ready.pop() if self._ready else self._start()

    @staticmethod
    def _start() -> Any:
        import ray

        return ray.remote(WorkerProcess).options(num_cpus=1, max_restarts=0).remote()


def start_ray(*, n_workers: int, address: str | None = None) -> None:
    """Start Ray in this process tree (or join the cluster at `address`); once is enough.

    Token authentication is switched on before ray is imported; local Ray listens on the
    loopback address, without a dashboard and without usage reports.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's crash handler takes SIGTERM away from the service, which has to end cleanly on it.
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    if address is None:
        # `_node_ip_address="127.0.0.1"` is replaced by an outside address; with this switch
        # off Ray takes the loopback address for the node and every server binds to it.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    # It says that SIGTERM is not handled in this thread, which is what we want.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    if address:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
        return
    ray.init(
        num_cpus=n_workers,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def stop_ray() -> None:
    """End Ray's processes, if this process started any."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


class _Asked(NamedTuple):
    """A call, its position among those of the run, and how often it has failed."""

    position: int
    call: Call
    n_failed: int = 0


@dataclass(slots=True, kw_only=True)
class _Sent:
    """A call that a worker has; `since` is when it could begin."""

    future: Any
    asked: _Asked
    since: float


@dataclass(slots=True, kw_only=True)
class _Worker:
    """A worker process and what was sent to it, in the order in which it takes it."""

    actor: Any
    sent: list[_Sent] = field(default_factory=list)
    last_done: float = 0.0


class WorkerPool:
    """The workers of one job.

    Args:
        spec: the job, its files resolved to local paths.
        splits: the data; put into the object store once.
        cache_dir: where pruned bases are kept, shared by the workers.
        n_workers: how many processes; one per core to be used.
        trust: job code may run.
        devices: what candidates are compressed for, the primary target first; none: what
            fits everywhere.
        starter: where the processes come from.
        shares_files: the workers are on this host and read files of the artifact store.
    """

    def __init__(
        self,
        spec: JobSpec,
        splits: DataSplits,
        *,
        cache_dir: Path,
        n_workers: int,
        trust: bool,
        devices: Sequence[DeviceDescription] = (),
        starter: WorkerStarter | None = None,
        shares_files: bool = True,
    ) -> None:
        import ray

        self._ray = ray
        self._starter = starter or WorkerStarter()
        self._splits = ray.put(splits)
        self._shares_files = shares_files
        self._arguments = (spec, str(cache_dir), trust, tuple(devices))
        self._source: Any = None
        self._brief: set[str] = set()  # methods whose last call took no longer than `_BRIEF_S`
        self._workers = [_Worker(actor=self._start()) for _ in range(n_workers)]

    def run(
        self, calls: Sequence[Call], *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Any]]:
        """Run the calls on the workers; yields (index of the call, result) as they finish.

        A call that failed yields a `CallFailed` in place of its result.

        Raises:
            Stopped: `should_stop` became true; unfinished calls were ended.
        """
        # Taken from the end.
        waiting = [_Asked(index, call) for index, call in reversed(list(enumerate(calls)))]
        try:
            self._occupy(waiting)
            while sent := [s.future for worker in self._workers for s in worker.sent]:
                done, _ = self._ray.wait(sent, num_returns=1, timeout=_POLL_S)
                if should_stop():
                    raise Stopped
                results = [r for w in self._workers for r in self._collected(w, done, waiting)]
                # First, since whoever takes the results may take a while over each.
                self._occupy(waiting)
                yield from results
        finally:
            # However this ends (a stop, an error, a caller who has seen enough): no worker is lost.
            for worker in self._workers:
                if worker.sent:
                    self._ray.kill(worker.actor)
                    self._replace(worker)

    def _occupy(self, waiting: list[_Asked]) -> None:
        """Give idle workers a call, and busy ones a brief one ahead while all can have one."""
        for worker in self._workers:
            if waiting and not worker.sent:
                self._send(waiting.pop(), worker)
        if len(waiting) < len(self._workers):
            return
        for worker in self._workers:
            both = (*(sent.asked for sent in worker.sent), waiting[-1])
            methods = {asked.call.method for asked in both}
            if len(worker.sent) == 1 and methods <= self._brief:
                self._send(waiting.pop(), worker)

    def _send(self, asked: _Asked, worker: _Worker) -> None:
        arguments = map(self._sendable, asked.call.arguments)
        future = worker.actor.call.remote(asked.call.method, *arguments)
        worker.sent.append(_Sent(future=future, asked=asked, since=time.monotonic()))

    def _sendable(self, argument: Any) -> Any:
        """The argument; bytes in place of a file that the workers do not see."""
        if isinstance(argument, ArtifactFile) and not self._shares_files:
            return argument.read()
        return argument

    def share_source(self) -> None:
        """Give every worker the model that the one which worked last has loaded.

        Returns when all have it: a worker that is still loading would disturb a measurement.
        """
        *others, owner = sorted(self._workers, key=lambda worker: worker.last_done)
        self._source = owner.actor.call.remote("share")
        adopted = [worker.actor.call.remote("adopt", self._source) for worker in others]
        if adopted:
            self._ray.wait(adopted, num_returns=len(adopted), timeout=_ADOPTION_S)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []

    def _collected(
        self, worker: _Worker, done: Sequence[Any], waiting: list[_Asked]
    ) -> list[tuple[int, Any]]:
        """What the worker has ended of its calls, which it takes in the order they were sent."""
        results = []
        while any(sent.future in done for sent in worker.sent):
            sent = worker.sent.pop(0)
            asked, result = sent.asked, self._result(sent, worker, waiting)
            if isinstance(result, CallFailed) and result.exception is None and not asked.n_failed:
                waiting.append(asked._replace(n_failed=1))
            else:
                results.append((asked.position, result))
        return results

    def _result(self, sent: _Sent, worker: _Worker, waiting: list[_Asked]) -> Any:
        """The call's result. A worker that died on it gives way to a fresh one."""
        from ray.exceptions import RayError, RayTaskError

        try:
            result = self._ray.get(sent.future)
        except RayTaskError as error:
            cause = error.cause
            known = cause if isinstance(cause, AutotuneError) else None
            # An error of ours is an answer; anything else may be the worker's bad luck.
            result = CallFailed(error=str(cause), exception=known)
        except RayError as error:  # it died, was ended for memory, or cannot be reached
            # What was sent ahead has not begun, and waits for its first attempt again.
            waiting.extend(ahead.asked for ahead in reversed(worker.sent))
            self._replace(worker)
            return CallFailed(error=f"a worker process died: {str(error).splitlines()[0]}")
        worker.last_done = time.monotonic()
        if worker.last_done - sent.since < _BRIEF_S:
            self._brief.add(sent.asked.call.method)
        else:
            self._brief.discard(sent.asked.call.method)
        if worker.sent:
            worker.sent[0].since = worker.last_done
        return result

    def _replace(self, worker: _Worker) -> None:
        """A fresh process in the place of one that is gone, with nothing to do."""
        worker.actor, worker.sent = self._start(), []

    def _start(self) -> Any:
        spec, cache_dir, trust, devices = self._arguments
        actor = self._starter.take()
        actor.begin.remote(spec, self._splits, cache_dir, trust, devices)
        if self._source is not None:
            actor.call.remote("adopt", self._source)
        return actor
