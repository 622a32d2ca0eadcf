"""The compressor: from a candidate to the file that would ship.

Owns the order of the work: prune, re-estimate BatchNorm, recover, export and calibrate once
per base; then write each candidate of that base in milliseconds. One per worker process,
which keeps everything warm. Judging the artifact is `accuracy.py`'s work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from autotune.compression.bases import Base, BaseFacts, BaseStore
from autotune.compression.channels import kept_channels
from autotune.compression.data import DataSplits, LabelledData
from autotune.compression.effective import GroupPrecision, effective_precisions
from autotune.compression.graph import GraphView, model_bytes
from autotune.compression.inventory import build_inventory, count_cost
from autotune.compression.kernels import (
    REDUCED_RANGE,
    X86_VNNI,
    KernelClass,
    as_checked_here,
)
from autotune.compression.post_training import (
    POST_TRAINING_VERSION,
    post_training,
    reduced_rounding,
)
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.shipped_runtime import (
    BY_ONNXRUNTIME,
    executed_precisions,
    unseen_precisions,
)
from autotune.compression.source import SourceModel, export_module
from autotune.compression.units import find_units
from autotune.errors import CompressionError, InvalidModel
from autotune.spec import Importance, RecoverySpec, RoundingSpec
from search_spaces import USUAL_PROVIDER, Candidate, PrunableGroup

if TYPE_CHECKING:
    from autotune.compression.adaround import LearnedRounding
    from autotune.compression.importance import ChannelScores
    from autotune.compression.rounding import Rounding

__all__ = ["Artifact", "BaseFacts", "Compressor", "GroupPrecision"]

_WARM_BASES = 4
GRAPH_PRUNING_VERSION = 1
# Version 1 (2026-11-21): slices of coupled channels, scale and shift re-estimated. It is part of
# the digest of a base without a torch module: the same graph with one is pruned differently.
_NO_TRAINING = (
    "no training data: BatchNorm was re-estimated on the calibration samples, without recovery "
    "training"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A compressed model file with what is known of how it came to be.

    `candidate_digest` is the digest of the candidate asked for; candidates that share an
    `artifact_digest` have the same `data`, where `kernels` is the same too: the kernel class
    that the file is written for. `groups` has one entry per layer group, `rounding` what was
    learned for this candidate alone.
    """

    data: bytes
    sha256: str
    size_bytes: int
    candidate_digest: str
    groups: tuple[GroupPrecision, ...]
    base: BaseFacts
    kernels: str
    rounding: LearnedRounding | None = None

    @property
    def compression(self) -> dict[str, Any]:
        """How the file came to be, as a plain dictionary: a trial's `compression`."""
        facts = {
            "base": self.base.to_json(),
            "groups": [group.to_json() for group in self.groups],
            "kernels": self.kernels,
        }
        return facts if self.rounding is None else {**facts, "rounding": self.rounding.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _WarmBase:
    facts: BaseFacts
    graph: QuantizableGraph


class Compressor:
    """Builds artifacts of one source model; everything it has made once stays warm.

    `importance` and `channel_multiple` say how pruning ranks channels and what it rounds their
    number to; `adaround_iterations` how long a candidate's rounding is learned. Not
    thread-safe; several processes may share `cache_dir`.
    """

    def __init__(
        self,
        source: SourceModel,
        splits: DataSplits,
        *,
        recovery: RecoverySpec,
        cache_dir: Path,
        importance: Importance = "taylor",
        channel_multiple: int = 8,
        seed: int = 0,
        threads: int = 1,
        kernels: KernelClass = X86_VNNI,
        adaround_iterations: int = RoundingSpec().iterations,
    ) -> None:
        self.kernels = kernels
        self.source = source
        self.inventory = build_inventory(source)
        self._splits = splits
        self._recovery = recovery
        self._importance: Importance = importance
        self.channel_multiple = channel_multiple
        self._seed = seed
        self._threads = threads
        self._store = BaseStore(cache_dir)
        self._warm: OrderedDict[str, _WarmBase] = OrderedDict()
        self._data_digests: dict[str, str] = {}
        self._teacher_logits: np.ndarray | None = None
        self._scores: ChannelScores | None = None
        self._adaround_iterations = adaround_iterations
        self._learned: dict[str, LearnedRounding] = {}

    def prepare_base(self, prune_ratios: Mapping[str, float]) -> BaseFacts:
        """Make the base with those ratios ready; seconds to minutes where it is new.

        Raises:
            CompressionError: a ratio that this model cannot take, or pruning, recovery or
                export failed; the message names the group.
            DiskFull: there is no room for it.
        """
        return self._base(prune_ratios).facts

    def build(self, candidate: Candidate, *, kernels: KernelClass | None = None) -> Artifact:
        """The candidate's file, checked in the runtime; identical candidates, identical bytes.

        `kernels` stands in for the compressor's own class: a base serves any of them.

        Raises:
            CompressionError: the message names the group and the cause.
            DiskFull: there is no room for a new base.
        """
        kernels = kernels or self.kernels
        base = self._base(candidate.prune_ratios, kernels)
        learned, rounding = self._learn(base.graph, candidate)
        data = base.graph.emit(candidate.precisions, kernels=kernels, rounding=rounding)
        return Artifact(
            data=data,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            candidate_digest=candidate.digest,
            groups=self._executed(candidate, base.graph, data, kernels, rounding),
            base=base.facts,
            kernels=kernels.name,
            rounding=learned,
        )

    def _learn(
        self, graph: QuantizableGraph, candidate: Candidate
    ) -> tuple[LearnedRounding | None, Rounding | None]:
        """The candidate's own rounding, if any; learned once, the same for every kernel class.

        Beside what was learned comes what to write: codes of reduced range stay the base's.
        """
        if candidate.rounding is None:
            return None, None
        from autotune.compression.adaround import SAMPLES, adaround

        digest = candidate.artifact_digest
        if digest not in self._learned:
            training = self._splits.training
            samples = self._splits.calibration if training is None else training.x[:SAMPLES]
            self._learned[digest] = adaround(
                graph,
                candidate.precisions,
                samples,
                judged_by=self._splits.search.x,
                iterations=self._adaround_iterations,
                threads=self._threads,
            )
        learned = self._learned[digest]
        if not learned.is_better:
            raise CompressionError(
                f"AdaRound found no better rounding: {learned.mean_kl:.3g} nats from FP32 against "
                f"{learned.earlier_kl:.3g} on {learned.n_judged} search samples, with new codes "
                f"for {len(learned.improved)} of {learned.n_layers} layers"
            )
        rounding = dataclasses.replace(learned.rounding, reduced=graph.rounding.reduced)
        return learned, rounding

    def emit(self, candidate: Candidate) -> bytes:
        """The bytes of `build` without the check: milliseconds on a warm base.

        Raises:
            CompressionError: the message names the group and the cause.
            DiskFull: there is no room for a new base.
        """
        graph = self._base(candidate.prune_ratios, self.kernels).graph
        _, rounding = self._learn(graph, candidate)
        return graph.emit(candidate.precisions, rounding=rounding)

    def _executed(
        self,
        candidate: Candidate,
        graph: QuantizableGraph,
        data: bytes,
        kernels: KernelClass,
        rounding: Rounding | None,
    ) -> tuple[GroupPrecision, ...]:
        """What the candidate's runtime makes of `data`, or here of what stands in for it."""
        units, runtime = graph.units.values(), candidate.runtime.runtime
        planned = candidate.precisions
        provider = candidate.runtime.provider
        if provider != USUAL_PROVIDER:
            why = f"it runs in the device's {provider}, which is not here to look"
            return unseen_precisions(units, planned, why=why)
        if runtime not in BY_ONNXRUNTIME:
            return executed_precisions(data, units, planned, runtime=runtime)
        checked, fused_here = data, as_checked_here(kernels)
        if fused_here != kernels:
            checked = graph.emit(planned, kernels=fused_here, rounding=rounding)
        return effective_precisions(
            checked,
            units,
            planned=planned,
            kernels=kernels,
            graph_level=candidate.runtime.graph_level,
            stands_in=None if checked == data else fused_here,
        )

    def channel_scores(self) -> ChannelScores:
        """How much each prunable channel matters; judged once, good for every base.

        Raises:
            CompressionError: the torch module cannot be traced.
        """
        if self._scores is None:
            self._scores = self._score()
        return self._scores

    def _score(self) -> ChannelScores:
        from autotune.compression.importance import TAYLOR_SAMPLES, score_channels
        from autotune.compression.onnx_pruning import score_graph_channels
        from autotune.compression.recovery import hold_back, torch_settings

        module = self.source.module
        if module is None:
            return score_graph_channels(
                self.source.graph,
                self._importance,
                samples=self._splits.calibration,
                threads=self._threads,
            )
        x, y, training = self._splits.calibration, None, self._splits.training
        if training is not None:
            # Not the samples by which the recovery judges its epochs.
            chosen, _ = hold_back(len(training.x), seed=self._seed)
            chosen = chosen[:TAYLOR_SAMPLES]
            x, y = training.x[chosen], training.y[chosen]
        with torch_settings(seed=self._seed, threads=self._threads):
            return score_channels(module, self.source.input_shape, self._importance, x=x, y=y)

    def _base(
        self, prune_ratios: Mapping[str, float], kernels: KernelClass = X86_VNNI
    ) -> _WarmBase:
        """The base, with rounded weights for those kernels."""
        ratios = self._felt(Candidate(prune_ratios=prune_ratios).prune_ratios)
        digest = self._base_digest(ratios)
        if digest not in self._warm:
            base = self._store.get_or_make(digest, lambda: self._make(digest, ratios))
            graph = QuantizableGraph(
                base.file, base.calibration, kernels=self.kernels, rounding=base.rounding
            )
            self._warm[digest] = _WarmBase(facts=base.facts, graph=graph)
            if len(self._warm) > _WARM_BASES:
                self._warm.popitem(last=False)
        self._warm.move_to_end(digest)
        warm = self._warm[digest]
        if kernels.largest_weight_code == REDUCED_RANGE and warm.graph.rounding.reduced is None:
            warm.graph.rounding = dataclasses.replace(
                warm.graph.rounding, reduced=self._reduced(digest, warm.graph)
            )
        return warm

    def _reduced(self, digest: str, graph: QuantizableGraph) -> Rounding:
        def make() -> Rounding:
            samples = self._splits.calibration
            return reduced_rounding(graph.fp32, graph.calibration, samples, threads=self._threads)

        return self._store.reduced_rounding(digest, make)

    def _felt(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """The ratios that rounding leaves an effect: those without one share a base."""
        groups = {group.name: group for group in self.inventory.prunable_groups}
        return {
            name: ratio
            for name, ratio in ratios.items()
            if name not in groups  # refused where the base is made
            or self._kept(groups[name], ratio) < groups[name].channels
        }

    def _kept(self, group: PrunableGroup, ratio: float) -> int:
        return kept_channels(
            group.channels, ratio, round_to=self.channel_multiple, block=group.block
        )

    def _base_digest(self, ratios: Mapping[str, float]) -> str:
        """sha256 over everything that shapes a base; training counts only where it happens."""
        identity: dict[str, Any] = {
            "source": self.source.digest,
            "calibration": self._digest_of("calibration", self._splits.calibration),
            "post_training": POST_TRAINING_VERSION,
        }
        if ratios:
            from autotune.compression.recovery import RECOVERY_VERSION

            training = self._splits.training
            identity |= {
                "recovery_version": RECOVERY_VERSION,
                "prune_ratios": dict(ratios),
                "importance": self._importance,
                "channel_multiple": self.channel_multiple,
                "recovery": self._recovery.model_dump(mode="json"),
                "seed": self._seed,
                "training": training and self._digest_of("training", training.x, training.y),
                "torch": torch.__version__,
            }
            if self.source.module is None:
                identity["sliced"] = GRAPH_PRUNING_VERSION
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _digest_of(self, role: str, *arrays: np.ndarray) -> str:
        if role not in self._data_digests:
            digest = hashlib.sha256()
            for array in arrays:
                digest.update(repr((array.shape, array.dtype.str)).encode())
                digest.update(np.ascontiguousarray(array).data)
            self._data_digests[role] = digest.hexdigest()
        return self._data_digests[role]

    def _make(self, digest: str, ratios: Mapping[str, float]) -> Base:
        if ratios:
            return self._make_pruned(digest, ratios)
        return self._calibrated(self.source.graph, digest=digest)

    def _make_pruned(self, digest: str, ratios: Mapping[str, float]) -> Base:
        from autotune.compression.onnx_pruning import graph_importance
        from autotune.compression.pruning import PruningReport

        if self.inventory.pruning_unavailable:
            raise CompressionError(
                f"prune ratios for {', '.join(ratios)} cannot be applied: "
                f"{self.inventory.pruning_unavailable}"
            )
        scores = self.channel_scores()
        importance: str = self._importance
        if self.source.module is None:
            model, facts = self._slice(ratios, scores)
            importance = graph_importance(self._importance)
        else:
            model, facts = self._prune_module(self.source.module, ratios, scores)
        report = PruningReport.of(
            self.inventory.prunable_groups,
            ratios,
            importance=importance,
            channel_multiple=self.channel_multiple,
            without_batch_norm=scores.without_batch_norm,
        )
        facts |= {"prune_ratios": dict(ratios), "pruning": report.to_json()}
        return self._calibrated(model, digest=digest, **facts)

    def _slice(
        self, ratios: Mapping[str, float], scores: ChannelScores
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        """The pruned graph of a source without a torch module, and what is to be said of it."""
        from autotune.compression.onnx_pruning import NO_MODULE, prune_graph

        model = prune_graph(
            self.source.graph,
            ratios,
            samples=self._splits.calibration,
            round_to=self.channel_multiple,
            scores=scores,
            threads=self._threads,
        )
        return model, {"note": NO_MODULE}

    def _prune_module(
        self, teacher: torch.nn.Module, ratios: Mapping[str, float], scores: ChannelScores
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        """The pruned and recovered module as a graph, and what the recovery cost."""
        from autotune.compression.pruning import prune_module
        from autotune.compression.recovery import reestimate_batch_norm

        student = prune_module(
            teacher,
            self.source.input_shape,
            ratios,
            round_to=self.channel_multiple,
            scores=scores,
        )
        facts: dict[str, Any] = {}
        if self._splits.training is None:
            reestimate_batch_norm(student, self._splits.calibration)
            facts["note"] = _NO_TRAINING
        else:
            facts |= self._recover(student, teacher, self._splits.training)
        student.eval()
        try:
            return export_module(student, self.source.input_shape), facts
        except InvalidModel as error:
            raise CompressionError(f"the pruned model cannot be exported: {error}") from error

    def _recover(
        self, student: torch.nn.Module, teacher: torch.nn.Module, training: LabelledData
    ) -> dict[str, Any]:
        from autotune.compression.recovery import logits, recover

        if self._teacher_logits is None:
            self._teacher_logits = logits(teacher, training.x)
        report = recover(
            student,
            teacher,
            training,
            spec=self._recovery,
            seed=self._seed,
            threads=self._threads,
            teacher_logits=self._teacher_logits,
        )
        return {
            "recovery_epochs": report.epochs,
            "recovery_s": report.wall_s,
            "recovery": dataclasses.asdict(report),
        }

    def _calibrated(self, model: onnx.ModelProto, *, digest: str, **facts: Any) -> Base:
        view = GraphView(model)
        macs, parameters = count_cost(view)
        names = {unit.name for unit in find_units(view)}
        missing = [g.name for g in self.inventory.groups if g.name not in names]
        if missing:
            raise CompressionError(f"the pruned model has lost layer group {missing[0]!r}")
        found = post_training(model, self._splits.calibration, threads=self._threads)
        facts["post_training"] = {"mean_kl": found.mean_kl, "plain_kl": found.plain_kl}
        return Base(
            facts=BaseFacts(digest=digest, macs=macs, parameters=parameters, **facts),
            file=model_bytes(model),
            calibration=found.calibration,
            rounding=found.rounding,
        )
