"""How much a channel matters: the four measures by which pruning ranks channels.

Owns the scores of every prunable group's channels, larger is more important; they compare
within a group only. Refuses to decide how many go (`pruning`). Scores are judged on the
unpruned module, so that they serve every ratio of every group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from autotune.compression.coupling import (
    WEIGHTED,
    ChannelGraph,
    Coupling,
    find_couplings,
    trainable_copy,
)
from autotune.errors import CompressionError
from autotune.spec import Importance

TAYLOR_SAMPLES = 256
TAYLOR_BATCH = 4
"""Gradients of so many samples, in mini-batches of so many, rank the channels: squared before
they are averaged, the gradients of different samples must not cancel (Molchanov et al. 2019,
section 3.1). Every group at half of its channels, BatchNorm re-estimated, top-1 of 1,000 digits
images: mobilenet_v2 60.9 %, mobilenet_v3_small 47.3 %, resnet18 68.4 %; in mini-batches of 16
58.7, 34.7, 68.6 %; with 512 samples 61.3, 48.9, 69.6 % at twice the cost."""

_DEAD = 1e-30
"""Norms below this count as equally dead; keeps the logarithm finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelScores:
    """Scores by group name, float64 of shape `(channels,)`; larger is more important.

    `without_batch_norm` names the groups that BatchNorm's scale was asked for and that have
    none: theirs are L2 norms.
    """

    by_group: Mapping[str, np.ndarray]
    without_batch_norm: tuple[str, ...] = ()


def score_channels(
    module: nn.Module,
    input_shape: tuple[int, ...],
    importance: Importance,
    *,
    x: np.ndarray | None = None,
    y: np.ndarray | None = None,
) -> ChannelScores:
    """The importance of every channel of every prunable group of `module`.

    - `l1`, `l2`: norms of the weights that make and read the channel (Li et al. 2017,
      arXiv:1608.08710, for one layer), as a geometric mean over the coupled layers.
    - `batch_norm`: the absolute scale of its BatchNorm layers (Liu et al. 2017, network
      slimming, arXiv:1708.06519, section 3), likewise; L2 in a group that has none.
    - `taylor`: first-order Taylor expansion of the loss (Molchanov et al. 2019,
      arXiv:1906.10771, section 3): the squared derivative by a gate on the channel, averaged
      over mini-batches of `x`, shape `(n, ...)` float32, with labels `y`, shape `(n,)`.
      Without labels the module's own answers stand for them. At most `TAYLOR_SAMPLES` are
      used, from the first on.

    `module` is not changed. Same arguments, same scores.

    Raises:
        CompressionError: the module cannot be traced, or `taylor` has no samples.
    """
    working = trainable_copy(module)
    couplings = find_couplings(working, input_shape)
    if importance == "taylor":
        if x is None or not len(x):
            raise CompressionError(
                "importance taylor needs samples to take gradients of; there are none: name "
                "data.training, or set search.prune_importance to l2"
            )
        return _taylor(working, couplings.graph, couplings.offered, x, y)
    return score_weights(couplings.offered, importance)


def score_weights(couplings: Sequence[Coupling], importance: Importance) -> ChannelScores:
    """`score_channels` for the three measures that need no samples, on couplings at hand."""
    p = 2 if importance == "l2" else 1
    norms = importance == "batch_norm"
    scores: dict[str, np.ndarray] = {}
    missing = []
    for coupling in couplings:
        name = coupling.group.name
        found = _Magnitude(p=p, only_batch_norm=norms).of(coupling)
        if found is None and norms:
            missing.append(name)
            found = _Magnitude(p=2).of(coupling)
        if found is None:
            raise CompressionError(f"the channels of group {name!r} cannot be ranked")
        scores[name] = found
    return ChannelScores(by_group=scores, without_batch_norm=tuple(missing))


class _Magnitude(torch_pruning.importance.GroupMagnitudeImportance):
    """p-norms (to the power p) of each member's slice, as a geometric mean over the group.

    A logarithm, so only its order means anything. torch-pruning's arithmetic mean lets the
    member with the largest weights decide alone; on mobilenet_v2 (digits, every group at
    0.5, BatchNorm re-estimated) this keeps 40 % accuracy, the arithmetic mean 22 to 27 %.
    Its `group_reduction="prod"` is the same order but underflows in long residual streams.
    """

    def __init__(self, *, p: int, only_batch_norm: bool = False) -> None:
        norms = {"target_types": [nn.modules.batchnorm._BatchNorm]} if only_batch_norm else {}
        super().__init__(p=p, normalizer=None, **norms)

    def of(self, coupling: Coupling) -> np.ndarray | None:
        """The scores of all channels; None where some channel has no such weight."""
        scores = self(coupling.dependencies)
        if scores is None or scores.numel() != coupling.group.channels:
            return None
        return np.asarray(scores.numpy(), dtype=np.float64)

    def _reduce(
        self, group_imp: Sequence[torch.Tensor], group_idxs: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        total = torch.zeros(max(max(channels) for channels in group_idxs) + 1, dtype=torch.float64)
        for norms, channels in zip(group_imp, group_idxs, strict=True):
            logarithms = norms.double().clamp_min(_DEAD).log()
            total.scatter_add_(0, torch.tensor(channels), logarithms)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gate:
    """A gate on each channel of a group, in front of every layer that reads it.

    The derivative by the gate is the sum of weight times gradient over all weights that read
    the channel (Molchanov et al. 2019, section 3.1): exact also where several layers make
    the channel and an Add joins them, because all that it does, it does through its readers.
    """

    name: str
    readers: tuple[tuple[Any, torch.Tensor, torch.Tensor], ...]
    """Layer, its input channels, and the group's channels that they are."""
    squares: torch.Tensor = field(repr=False)

    @classmethod
    def on(cls, coupling: Coupling, graph: ChannelGraph) -> _Gate:
        dependencies = coupling.dependencies
        items = [dependencies[index] for index in range(len(dependencies))]
        readers = tuple(
            (item.dep.target.module, torch.tensor(item.idxs), torch.tensor(item.root_idxs))
            for item in items
            if _reads(graph, item.dep)
        )
        squares = torch.zeros(coupling.group.channels, dtype=torch.float64)
        return cls(name=coupling.group.name, readers=readers, squares=squares)

    def accumulate(self) -> None:
        """Add the square of the derivative that the last backward pass has left."""
        derivative = torch.zeros_like(self.squares)
        for layer, inputs, channels in self.readers:
            product = (layer.weight * layer.weight.grad).double()
            axis = 0 if getattr(layer, "transposed", False) else 1
            per_input = product.transpose(0, axis).flatten(1).sum(1)
            derivative.scatter_add_(0, channels, per_input[inputs])
        self.squares.add_(derivative.square())


def _reads(graph: ChannelGraph, dependency: Any) -> bool:
    """It takes the channels in and makes others (a depthwise convolution hands them on)."""
    handler = dependency.handler
    takes_in = graph.is_in_channel_pruning_fn(handler)
    return (
        isinstance(dependency.target.module, WEIGHTED)
        and takes_in
        and not graph.is_out_channel_pruning_fn(handler)
    )


def _taylor(
    module: nn.Module,
    graph: ChannelGraph,
    couplings: Sequence[Coupling],
    x: np.ndarray,
    y: np.ndarray | None,
) -> ChannelScores:
    gates = [_Gate.on(coupling, graph) for coupling in couplings]
    module.eval()  # the gradients of the module that would ship: no dropout, fixed statistics
    batches = list(_batches(min(len(x), TAYLOR_SAMPLES)))
    for batch in batches:
        module.zero_grad(set_to_none=True)
        with torch.enable_grad():
            output = module(torch.from_numpy(np.array(x[batch], dtype=np.float32)))
            labels = output.argmax(dim=1) if y is None else torch.from_numpy(np.array(y[batch]))
            functional.cross_entropy(output, labels).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for gate in gates:
                gate.accumulate()
    return ChannelScores(
        by_group={gate.name: (gate.squares / len(batches)).numpy() for gate in gates}
    )


def _batches(samples: int) -> Iterator[slice]:
    for start in range(0, samples, TAYLOR_BATCH):
        yield slice(start, min(start + TAYLOR_BATCH, samples))
