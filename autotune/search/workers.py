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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.errors import AutotuneError, CompressionError
from autotune.search.interruption import Stopped
from autotune.spec import JobSpec
from device_agents.protocol import ArtifactReference
from search_spaces import Candidate, LayerInventory, Precision
from storage.artifacts import ArtifactFile
from storage.records import AccuracyReport
from storage.sensitivity import Sensitivity

if TYPE_CHECKING:
    from autotune.compression.accuracy import AccuracyEvaluator
    from autotune.compression.compressor import Compressor
    from autotune.compression.data import DataSplits
    from autotune.compression.racing import Race
    from autotune.compression.sensitivity import SensitivityMeter
    from autotune.compression.source import SourceModel
    from device_agents.protocol import DeviceDescription

_POLL_S = 0.2
_ADOPTION_S = 120.0
_READY_S = 60.0
_SENSITIVITY_SAMPLES = 200
"""Mean KL changes with every sample where top-1 moves with a few, so it needs fewer of them."""
_OBJECT_STORE_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a worker found in the source model."""

    inventory: LayerInventory
    source_digest: str
    fp32: bytes
    input_name: str
    input_shape: tuple[int, ...]
    output_name: str
    num_classes: int
    notices: tuple[str, ...] = ()

    def source(self, stored: ArtifactReference) -> dict[str, Any]:
        """What a job keeps of its source model; `stored` is the FP32 graph."""
        return {
            "digest": self.source_digest,
            "artifact_sha256": stored.sha256,
            "artifact_size_bytes": stored.size_bytes,
            "input_name": self.input_name,
            "input_shape": list(self.input_shape),
            "output_name": self.output_name,
            "num_classes": self.num_classes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A candidate's artifact with its accuracy; `failure` says why there is none."""

    artifact: bytes | None = None
    sha256: str | None = None
    compression: Mapping[str, Any] | None = None
    accuracy: AccuracyReport | None = None
    failed_at: str | None = None
    failure: str | None = None


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


class CompressionWorker:
    """What runs in a worker process."""

    def __init__(
        self,
        spec: JobSpec,
        splits: DataSplits,
        cache_dir: str,
        trust: bool,
        devices: Sequence[DeviceDescription] = (),
    ) -> None:
        # Loading waits for the first call, so that a wrong model is that call's error and
        # not a worker that cannot start.
        self._spec, self._cache_dir, self._trust = spec, Path(cache_dir), trust
        self._devices = devices
        self.splits = splits
        self._evaluators: dict[str, AccuracyEvaluator] = {}

    @cached_property
    def source(self) -> SourceModel:
        """The source model, loaded once and held against the data."""
        from autotune.compression.data import require_fit
        from autotune.compression.source import load_source_model

        source = load_source_model(
            self._spec.model,
            input_shape=self.splits.search.x.shape[1:],
            trust_job_code=self._trust,
        )
        require_fit(source, self.splits)
        return source

    @cached_property
    def compressor(self) -> Compressor:
        """The compressor, with its graph and calibration warm."""
        from autotune.compression.channels import channel_multiple
        from autotune.compression.compressor import Compressor
        from autotune.compression.kernels import kernels_of

        return Compressor(
            self.source,
            self.splits,
            recovery=self._spec.recovery,
            cache_dir=self._cache_dir,
            importance=self._spec.search.prune_importance,
            # A pruned base is trained once for all targets: channels that suit each of them.
            channel_multiple=max(
                (channel_multiple(device.cpu_flags) for device in self._devices),
                default=channel_multiple(()),
            ),
            seed=self._spec.seed,
            threads=1,
            kernels=kernels_of(self._devices[0] if self._devices else None),
            adaround_iterations=self._spec.rounding.iterations,
        )

    def share(self) -> SourceModel:
        """The source model, for the other workers: an export costs seconds, a copy nothing."""
        return self.source

    def adopt(self, source: SourceModel) -> None:
        """Take the source model that another worker loaded and held against the data."""
        self.__dict__["source"] = source  # where cached_property looks first

    def inspect(self) -> Inspection:
        """The source model's facts."""
        return Inspection(
            inventory=self.compressor.inventory,
            source_digest=self.source.digest,
            fp32=self.source.fp32_bytes,
            input_name=self.source.input_name,
            input_shape=tuple(self.source.input_shape),
            output_name=self.source.output_name,
            num_classes=self.source.num_classes,
            notices=self.source.notices,
        )

    def prepare_base(self, prune_ratios: Mapping[str, float]) -> Mapping[str, Any]:
        """Prune, recover, export and calibrate one base; kept on disk for all workers.

        The base's facts, and under `accuracy` what it keeps of it on the search data in FP32.
        """
        facts = self.compressor.prepare_base(prune_ratios)
        base = self.compressor.emit(Candidate(prune_ratios=prune_ratios))
        accuracy = self._evaluator("search").evaluate(base)
        return {**facts.to_json(), "accuracy": accuracy.to_json()}

    def build(
        self, candidate: Candidate, race: Race | None = None, kernels: str | None = None
    ) -> Built:
        """The candidate's artifact and its accuracy on the search data, as far as it races.

        `kernels` names the kernel class to write for; the primary target's where it is None.
        """
        from autotune.compression.kernels import KERNEL_CLASSES

        try:
            written_for = None if kernels is None else KERNEL_CLASSES[kernels]
            artifact = self.compressor.build(candidate, kernels=written_for)
        except CompressionError as error:
            return Built(failed_at="compression", failure=str(error))
        try:
            accuracy = self._evaluator("search").evaluate(
                artifact.data, race=race, runtime=candidate.runtime.runtime
            )
        except AutotuneError as error:
            return Built(failed_at="accuracy", failure=str(error))
        return Built(
            artifact=artifact.data,
            sha256=artifact.sha256,
            compression=artifact.compression,
            accuracy=accuracy,
        )

    def noise(self, group: str, precisions: Sequence[Precision]) -> list[Sensitivity]:
        """What each precision loses at the group's own output; cheap."""
        return self._meter.noise(group, precisions)

    def divergence(self, group: str, precision: Precision) -> list[Sensitivity]:
        """What one precision of one group does to the model's outputs."""
        return [self._meter.divergence(group, precision)]

    def removal(self, choices: Sequence[tuple[str, float]]) -> list[Sensitivity]:
        """What each (prunable group, ratio) removes; cheap."""
        return [self._meter.removal(group, ratio) for group, ratio in choices]

    def pruning(self, group: str, ratio: float) -> list[Sensitivity]:
        """What pruning one group alone does to the model's outputs."""
        return [self._meter.pruning(group, ratio)]

    @cached_property
    def _meter(self) -> SensitivityMeter:
        from autotune.compression.sensitivity import SensitivityMeter

        n = min(len(self.splits.search), _SENSITIVITY_SAMPLES)
        data = self.splits.search.take(np.arange(n))
        return SensitivityMeter(self.compressor, data, calibration=self.splits.calibration)

    def search_accuracy(self, artifact: ArtifactFile | bytes, runtime: str) -> AccuracyReport:
        """The artifact's accuracy in the runtime on all of the search data."""
        return self._evaluator("search").evaluate(_bytes_of(artifact), runtime=runtime)

    def held_out(self, artifact: ArtifactFile | bytes, runtime: str) -> AccuracyReport:
        """The artifact's accuracy in the runtime on data that the search never saw."""
        return self._evaluator("held_out").evaluate(_bytes_of(artifact), runtime=runtime)

    def _evaluator(self, split: str) -> AccuracyEvaluator:
        from autotune.compression.accuracy import AccuracyEvaluator

        if split not in self._evaluators:
            data = self.splits.held_out if split == "held_out" else self.splits.search
            self._evaluators[split] = AccuracyEvaluator(
                self.source.fp32_bytes, data, split=split, threads=1
            )
        return self._evaluators[split]


def _bytes_of(artifact: ArtifactFile | bytes) -> bytes:
    return artifact.read() if isinstance(artifact, ArtifactFile) else artifact


class WorkerProcess:
    """What Ray starts: a process that has spent its imports' seconds before a job comes."""

    def __init__(self) -> None:
        from autotune.compression import compressor, torchvision_repair  # noqa: F401

        with contextlib.suppress(AutotuneError):  # who needs torchvision is told on loading
            torchvision_repair.import_torchvision()
        self._worker: CompressionWorker | None = None

    def begin(
        self,
        spec: JobSpec,
        splits: DataSplits,
        cache_dir: str,
        trust: bool,
        devices: Sequence[DeviceDescription] = (),
    ) -> None:
        """Become a worker of this job."""
        self._worker = CompressionWorker(spec, splits, cache_dir, trust, devices)

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
        self._idle: list[Any] = [self._new_worker() for _ in range(n_workers)]

    def run(
        self, calls: Sequence[Call], *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Any]]:
        """Run the calls on the workers; yields (index of the call, result) as they finish.

        A call that failed yields a `CallFailed` in place of its result.

        Raises:
            Stopped: `should_stop` became true; unfinished calls were ended.
        """
        waiting = [(index, call, 0) for index, call in reversed(list(enumerate(calls)))]
        running: dict[Any, tuple[int, Call, int, Any]] = {}
        try:
            while waiting or running:
                self._occupy(waiting, running)
                done, _ = self._ray.wait(list(running), num_returns=1, timeout=_POLL_S)
                if should_stop():
                    raise Stopped
                results = []
                for future in done:
                    index, call, attempt, worker = running.pop(future)
                    result = self._collect(future, worker)
                    if isinstance(result, CallFailed) and result.exception is None and not attempt:
                        waiting.append((index, call, attempt + 1))
                    else:
                        results.append((index, result))
                # First, since whoever takes the results may take a while over each.
                self._occupy(waiting, running)
                yield from results
        finally:
            # However this ends (a stop, an error, a caller who has seen enough): no worker is lost.
            self._end([worker for *_, worker in running.values()])

    def _occupy(
        self, waiting: list[tuple[int, Call, int]], running: dict[Any, tuple[int, Call, int, Any]]
    ) -> None:
        """Give every idle worker the next call."""
        while waiting and self._idle:
            index, call, attempt = waiting.pop()
            worker = self._idle.pop()
            arguments = [self._sendable(argument) for argument in call.arguments]
            running[worker.call.remote(call.method, *arguments)] = (index, call, attempt, worker)

    def _sendable(self, argument: Any) -> Any:
        """The argument; bytes in place of a file that the workers do not see."""
        if isinstance(argument, ArtifactFile) and not self._shares_files:
            return argument.read()
        return argument

    def share_source(self) -> None:
        """Give every worker the model that the one which worked last has loaded.

        Returns when all have it: a worker that is still loading would disturb a measurement.
        """
        *others, owner = self._idle
        self._source = owner.call.remote("share")
        adopted = [worker.call.remote("adopt", self._source) for worker in others]
        if adopted:
            self._ray.wait(adopted, num_returns=len(adopted), timeout=_ADOPTION_S)

    def close(self) -> None:
        """End the workers."""
        for worker in self._idle:
            self._ray.kill(worker)
        self._idle = []

    def _collect(self, future: Any, worker: Any) -> Any:
        """The call's result; puts the worker back, or a fresh one in its place."""
        from ray.exceptions import RayError, RayTaskError

        try:
            result = self._ray.get(future)
        except RayTaskError as error:
            self._idle.append(worker)
            cause = error.cause
            known = cause if isinstance(cause, AutotuneError) else None
            # An error of ours is an answer; anything else may be the worker's bad luck.
            return CallFailed(error=str(cause), exception=known)
        except RayError as error:  # it died, was ended for memory, or cannot be reached
            self._idle.append(self._new_worker())
            return CallFailed(error=f"a worker process died: {str(error).splitlines()[0]}")
        self._idle.append(worker)
        return result

    def _end(self, workers: Sequence[Any]) -> None:
        for worker in workers:
            self._ray.kill(worker)
            self._idle.append(self._new_worker())

    def _new_worker(self) -> Any:
        spec, cache_dir, trust, devices = self._arguments
        worker = self._starter.take()
        worker.begin.remote(spec, self._splits, cache_dir, trust, devices)
        if self._source is not None:
            worker.call.remote("adopt", self._source)
        return worker
