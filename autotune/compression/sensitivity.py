"""Sensitivity: what one choice for one group does to the outputs while all else stays FP32.

Owns the measurements: the noise at a group's own output (cheap), the divergence of the model's
outputs, of a precision through the artifact's own operators, of a prune ratio through the
pruned model. Which of them are worth measuring is `search/screening.py`'s to say, what
follows for the next candidate `search/planner.py`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from autotune.compression.accuracy import log_probabilities, mean_kl_divergence
from autotune.compression.compressor import Compressor
from autotune.compression.data import LabelledData
from autotune.compression.graph import GraphView
from autotune.compression.prefix import MEMORY_BYTES, PrefixActivations
from autotune.compression.prune_alone import pruned_outputs, removed_share
from autotune.compression.session import BATCH
from autotune.compression.slices import Difference, FileGraph, counterparts, difference
from autotune.compression.units import Unit, find_units
from autotune.errors import CompressionError
from search_spaces import Candidate, Precision
from storage.sensitivity import Sensitivity

SQNR_SAMPLES = BATCH
"""One batch: every sample has thousands of values per output, and what the SQNR decides takes
steps of several dB. A choice; how far it moves between batches was not measured."""

PRUNING_SAMPLES = 100
"""Half of what a precision gets: a prune ratio's divergence is a thousand times larger (0.01
against 1e-5 nats on resnet18 and mobilenet_v2, digits) and each entry costs a model."""

SQNR_LIMIT_DB = 144.0
"""24 bits of float32 at 6.02 dB each: noise below that is rounding. Also the value for no
noise at all, and its negative for noise where there is no signal."""


class SensitivityMeter:
    """Measures entries of one source model; FP32 runs once, groups come in graph order.

    Any order gives the same figures; out of order the FP32 prefix is run again. Arrays may
    be read-only. Not thread-safe.
    """

    def __init__(
        self,
        compressor: Compressor,
        data: LabelledData,
        *,
        calibration: np.ndarray,
        threads: int = 1,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._compressor = compressor
        self._data = data
        self._calibration = calibration
        fp32 = FileGraph.read(compressor.emit(Candidate()))
        self.prefix = PrefixActivations(fp32, data.x, threads=threads, memory_bytes=memory_bytes)
        self._few = PrefixActivations(fp32, data.x[:SQNR_SAMPLES], threads=threads)
        self._threads = threads

    def noise(
        self, group: str, precisions: Sequence[Precision]
    ) -> list[Sensitivity | CompressionError]:
        """The SQNR of each precision of a group, from `SQNR_SAMPLES` samples.

        The group gets its FP32 input; what its weights and activations lose is seen where
        its output leaves it. Where it leaves at several places their powers are added. What
        the group cannot take has an error in its place, which names both.

        Raises:
            CompressionError: the group does not exist.
        """
        unit = self._units.get(group)
        if unit is None:
            raise CompressionError(f"the model has no layer group {group!r}")
        leaving = _leaving(self._few.fp32, unit)
        found: list[Sensitivity | CompressionError] = []
        for precision in precisions:
            try:
                found.append(self._noise(group, precision, leaving))
            except CompressionError as error:
                what = f"the noise of group {group!r} at {precision}"
                found.append(CompressionError(f"{what} could not be measured: {error}"))
        return found

    def _noise(self, group: str, precision: Precision, leaving: Sequence[str]) -> Sensitivity:
        started = time.monotonic()
        fp32, artifact = self._few.fp32, self._emit(group, precision)
        pairs = counterparts(fp32, artifact, leaving)
        found = difference(fp32, artifact)
        exact = self._few.outputs(fp32, _all_behind(fp32, found.cut), list(pairs))
        noisy = self._few.outputs(artifact, found, list(pairs.values()))
        return Sensitivity(
            group=group,
            precision=precision.name,
            sqnr_db=sqnr_db(exact, noisy),
            wall_s=time.monotonic() - started,
        )

    def divergence(self, group: str, precision: Precision) -> Sensitivity:
        """The mean KL and drop of an artifact that is FP32 but for that group.

        Only what differs from FP32 and what follows it runs; the figures are those of the
        whole file.

        Raises:
            CompressionError: the group does not exist or cannot take the precision.
        """
        started = time.monotonic()
        artifact = self._emit(group, precision)
        found = difference(self.prefix.fp32, artifact)
        (outputs,) = self.prefix.outputs(artifact, found, [artifact.output])
        entry = Sensitivity(group=group, precision=precision.name)
        return self._judged(entry, outputs, self._fp32_outputs, started)

    def pruning(self, group: str, ratio: float) -> Sensitivity:
        """The mean KL and drop with that group alone pruned, without recovery training.

        BatchNorm statistics are re-estimated on the calibration samples.

        Raises:
            CompressionError: the model cannot be pruned there.
        """
        started = time.monotonic()
        entry = self.removal(group, ratio)
        # A ratio that rounds to no channel at all does no damage.
        ratios = {} if entry.removed_share == 0.0 else {group: ratio}
        outputs = self._pruned(ratios) if ratios else self._unpruned_outputs
        return self._judged(entry, outputs, self._unpruned_outputs, started)

    def removal(self, group: str, ratio: float) -> Sensitivity:
        """The cheap figure of a prune ratio: the share of squared weights that goes.

        Raises:
            CompressionError: there is no such prunable group.
        """
        inventory = self._compressor.inventory
        known = {g.name: g for g in inventory.prunable_groups}
        if group not in known:
            raise CompressionError(f"the model has no prunable group {group!r}")
        multiple = self._compressor.channel_multiple
        share = removed_share(self._view, known[group], ratio, round_to=multiple)
        return Sensitivity(group=group, prune_ratio=ratio, removed_share=share)

    def _judged(
        self, entry: Sensitivity, outputs: np.ndarray, reference: np.ndarray, started: float
    ) -> Sensitivity:
        if not np.isfinite(outputs).all():
            raise CompressionError(
                f"with group {entry.group!r} at {entry.choice} the output is NaN or infinite"
            )
        divergence = mean_kl_divergence(log_probabilities(reference), log_probabilities(outputs))
        labels = self._data.y[: len(outputs)]
        right = (reference.argmax(axis=1) == labels).mean()
        still_right = (outputs.argmax(axis=1) == labels).mean()
        return replace(
            entry,
            mean_kl=divergence,
            drop=float(right - still_right),
            n_samples=len(outputs),
            wall_s=time.monotonic() - started,
        )

    def _emit(self, group: str, precision: Precision) -> FileGraph:
        return FileGraph.read(self._compressor.emit(Candidate(precisions={group: precision})))

    @cached_property
    def _view(self) -> GraphView:
        return GraphView(self._compressor.source.graph)

    @cached_property
    def _units(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in find_units(self._view)}

    @cached_property
    def _fp32_outputs(self) -> np.ndarray:
        """Of the FP32 file; the prefix stays where it is."""
        alone = PrefixActivations(self.prefix.fp32, self._data.x, threads=self._threads)
        whole = _all_behind(self.prefix.fp32, 0)
        (outputs,) = alone.outputs(self.prefix.fp32, whole, [self.prefix.fp32.output])
        return outputs

    @cached_property
    def _unpruned_outputs(self) -> np.ndarray:
        """From the same implementation as the pruned ones: rounding is no damage."""
        return self._pruned({})

    def _pruned(self, ratios: Mapping[str, float]) -> np.ndarray:
        x = self._data.x[:PRUNING_SAMPLES]
        return pruned_outputs(self._compressor, ratios, calibration=self._calibration, x=x)


def sqnr_db(exact: Sequence[np.ndarray], noisy: Sequence[np.ndarray]) -> float:
    """10 log10(signal power / noise power) over all tensors; larger is better.

    Limited to plus and minus `SQNR_LIMIT_DB`.

    >>> round(sqnr_db([np.array([3.0, 4.0])], [np.array([3.0, 4.5])]), 6)
    20.0
    """
    signal = sum(float(np.square(a, dtype=np.float64).sum()) for a in exact)
    noise = sum(
        float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(exact, noisy, strict=True)
    )
    if noise == 0.0:
        return SQNR_LIMIT_DB
    if signal == 0.0 or not math.isfinite(noise):
        return -SQNR_LIMIT_DB
    return min(SQNR_LIMIT_DB, max(-SQNR_LIMIT_DB, 10 * math.log10(signal / noise)))


def _all_behind(fp32: FileGraph, cut: int) -> Difference:
    return Difference(cut=cut, nodes=fp32.nodes[cut:], changed=frozenset())


def _leaving(fp32: FileGraph, unit: Unit) -> list[str]:
    """The tensors of the unit that something outside it takes, or that are the output."""
    members = set(unit.nodes)
    made = {o: node for node in fp32.nodes if node.name in members for o in node.outputs}
    taken = {name for node in fp32.nodes if node.name not in members for name in node.taken}
    return [name for name in made if name in taken or name == fp32.output]
