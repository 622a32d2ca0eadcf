"""What a worker process does for a job: it keeps the job's model, calibration and data warm.

Each call builds, evaluates or weighs something and returns it; the pool of such processes is in
`workers.py`. Nothing is measured for latency here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.errors import AutotuneError, CompressionError
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
    from autotune.compression.racing import Race, Shown
    from autotune.compression.sensitivity import SensitivityMeter
    from autotune.compression.source import SourceModel
    from device_agents.protocol import DeviceDescription

_SENSITIVITY_SAMPLES = 200
"""Mean KL changes with every sample where top-1 moves with a few, so it needs fewer of them."""


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
    """A candidate's artifact with its accuracy; `failure` says why there is none.

    `shown` is what a candidate that did not race does to each sample.
    """

    artifact: bytes | None = None
    sha256: str | None = None
    compression: Mapping[str, Any] | None = None
    accuracy: AccuracyReport | None = None
    shown: Shown | None = None
    failed_at: str | None = None
    failure: str | None = None


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
        self._bases: dict[str, tuple[AccuracyReport, Shown]] = {}

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
        accuracy, _ = self._base(prune_ratios)
        return {**facts.to_json(), "accuracy": accuracy.to_json()}

    def _base(self, prune_ratios: Mapping[str, float]) -> tuple[AccuracyReport, Shown]:
        """The accuracy of a base in FP32 on the search data, and what it does to each sample."""
        base = Candidate(prune_ratios=prune_ratios)
        if base.digest not in self._bases:
            artifact = self.compressor.emit(base)
            self._bases[base.digest] = self._evaluator("search").complete(artifact)
        return self._bases[base.digest]

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
        runtime, shown = candidate.runtime.runtime, None
        try:
            evaluator = self._evaluator("search")
            if race is None:
                accuracy, shown = evaluator.complete(artifact.data, runtime=runtime)
            else:
                own = self._by_base(race, candidate)
                accuracy = evaluator.evaluate(artifact.data, race=own, runtime=runtime)
        except AutotuneError as error:
            return Built(failed_at="accuracy", failure=str(error))
        return Built(
            artifact=artifact.data,
            sha256=artifact.sha256,
            compression=artifact.compression,
            accuracy=accuracy,
            shown=shown,
        )

    def _by_base(self, race: Race, candidate: Candidate) -> Race:
        """The race of a pruned candidate: by its base, which tells more than uniform INT8."""
        from autotune.compression.racing import LIKE_BASE

        if not candidate.prune_ratios:
            return race
        _, base = self._base(candidate.prune_ratios)
        return replace(race, auxiliary=base, likeness=LIKE_BASE)

    def noise(
        self, group: str, precisions: Sequence[Precision]
    ) -> list[Sensitivity | CompressionError]:
        """What each precision loses at the group's own output, or why it cannot be; cheap."""
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

    def shown(self, artifact: ArtifactFile | bytes, runtime: str) -> Shown:
        """What the artifact in the runtime does to each sample of the search data."""
        return self._evaluator("search").complete(_bytes_of(artifact), runtime=runtime)[1]

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
