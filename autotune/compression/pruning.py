"""Structured pruning: which channel groups a module offers, and their physical removal.

Owns the surgery. What is coupled is `coupling`'s knowledge, how many channels stay
`channels`', which ones matter `importance`'s. Refuses to train: `recovery` brings the accuracy
back. A source without a torch module is `onnx_pruning`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from autotune.compression.channels import (
    MIN_CHANNELS,
    MIN_PRUNABLE_CHANNELS,
    kept_channels,
    require_known,
)
from autotune.compression.coupling import (
    ChannelGraph,
    find_couplings,
    trainable_copy,
)
from autotune.compression.importance import ChannelScores, score_weights
from autotune.errors import CompressionError
from search_spaces.layers import PrunableGroup

__all__ = [
    "MIN_CHANNELS",
    "MIN_PRUNABLE_CHANNELS",
    "Prunability",
    "PruningReport",
    "describe_pruning",
    "kept_channels",
    "prune_module",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prunability:
    """What can be pruned in a module, and why each other layer cannot (name, reason)."""

    groups: tuple[PrunableGroup, ...]
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningReport:
    """What a pruning did.

    `channels` has, by group, how many there were and how many stayed. `importance` ranked
    them; `ranked_by_l2` names pruned groups that it could not rank. `channel_multiple` is
    what the numbers that stayed were rounded to.
    """

    importance: str
    channel_multiple: int
    channels: Mapping[str, tuple[int, int]]
    ranked_by_l2: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, the same before and after it was stored."""
        return {
            "importance": self.importance,
            "channel_multiple": self.channel_multiple,
            "channels": {name: list(pair) for name, pair in self.channels.items()},
            "ranked_by_l2": list(self.ranked_by_l2),
        }

    @classmethod
    def of(
        cls,
        groups: Iterable[PrunableGroup],
        ratios: Mapping[str, float],
        *,
        importance: str,
        channel_multiple: int,
        without_batch_norm: Collection[str] = (),
    ) -> PruningReport:
        """The report on pruning the named ones of `groups` by `ratios`."""
        pruned = {group.name: group for group in groups if ratios.get(group.name, 0.0) > 0.0}
        return cls(
            importance=importance,
            channel_multiple=channel_multiple,
            channels={
                name: (
                    group.channels,
                    kept_channels(
                        group.channels, ratios[name], round_to=channel_multiple, block=group.block
                    ),
                )
                for name, group in pruned.items()
            },
            ranked_by_l2=tuple(name for name in pruned if name in without_batch_norm),
        )


def describe_pruning(module: nn.Module, input_shape: tuple[int, ...]) -> Prunability:
    """The groups of output channels that can be removed together, in the module's own order.

    `input_shape` has no batch axis. The answer depends on the architecture alone, never on
    the weights. A group is named after its first layer and lists every convolution and
    linear layer whose output channels it removes. Grouped convolutions lose whole groups.
    Left out, each with its reason: the model's outputs, groups of fewer than
    `MIN_PRUNABLE_CHANNELS`, channels that attention heads share or a channel shuffle mixes,
    and squeeze layers behind a global average pool. `module` is not changed.

    Raises:
        CompressionError: the module cannot be traced; the message names the layer reached.
    """
    couplings = find_couplings(trainable_copy(module), input_shape)
    return Prunability(
        groups=tuple(c.group for c in couplings.offered), left_out=couplings.left_out
    )


def prune_module(
    module: nn.Module,
    input_shape: tuple[int, ...],
    ratios: Mapping[str, float],
    *,
    round_to: int = 8,
    scores: ChannelScores | None = None,
) -> nn.Module:
    """A copy of `module` from which each named group has lost its least important channels.

    `ratios` are fractions of the channels in [0, 1) by group name; groups not named stay as
    they are. How many channels stay is `kept_channels`. `scores` are those of the unpruned
    module (L2 norms where None), so neither the order of the groups nor their number
    matters, and equal ratios always keep equal channels. The model's outputs are never
    pruned; depthwise convolutions, BatchNorm and every reader of the channels follow.

    Raises:
        CompressionError: no group has that name, a ratio is not a fraction, or the module
            cannot be traced or no longer runs afterwards.
    """
    pruned = trainable_copy(module)
    found = find_couplings(pruned, input_shape)
    scores = scores or score_weights(found.offered, "l2")
    couplings = {c.group.name: c for c in found.offered}
    require_known(ratios, couplings)
    removals = {
        name: _least_important(couplings[name].group, ratio, round_to, scores)
        for name, ratio in sorted(ratios.items())
    }
    for name, channels in removals.items():
        if channels:
            _remove(found.graph, pruned, name, channels)
    _require_running(pruned, module, input_shape, removals)
    _restore_flags(pruned, module)
    return pruned


def _least_important(
    group: PrunableGroup, ratio: float, round_to: int, scores: ChannelScores
) -> list[int]:
    """The channels to remove, in whole blocks by their mean score; ties fall to the first."""
    kept = kept_channels(group.channels, ratio, round_to=round_to, block=group.block)
    by_block = scores.by_group[group.name].reshape(-1, group.block)
    order = np.argsort(by_block.mean(axis=1), kind="stable")
    removed = order[: (group.channels - kept) // group.block]
    return [int(b) * group.block + c for b in removed for c in range(group.block)]


def _remove(graph: ChannelGraph, module: nn.Module, name: str, channels: list[int]) -> None:
    root = module.get_submodule(name)
    try:
        pruner = graph.get_pruner_of_module(root)
        graph.get_pruning_group(root, pruner.prune_out_channels, channels).prune()
    except Exception as error:  # torch-pruning has no error type of its own
        raise CompressionError(
            f"group {name!r} cannot be pruned: {type(error).__name__}: {error}"
        ) from error


def _require_running(
    pruned: nn.Module,
    module: nn.Module,
    input_shape: tuple[int, ...],
    removals: Mapping[str, list[int]],
) -> None:
    sample = torch.zeros(1, *input_shape)
    names = ", ".join(name for name, channels in removals.items() if channels)
    try:
        with torch.no_grad():
            shape = pruned(sample).shape
    except Exception as error:  # a module's forward may raise anything
        raise CompressionError(
            f"{type(module).__name__} no longer runs after pruning {names}: {error}"
        ) from error
    was_training = module.training
    try:
        with torch.no_grad():
            expected = module.eval()(sample).shape
    finally:
        module.train(was_training)
    if shape != expected:
        raise CompressionError(
            f"pruning {names} changed the output's shape from {tuple(expected)} to {tuple(shape)}"
        )


def _restore_flags(pruned: nn.Module, module: nn.Module) -> None:
    wanted = {name: p.requires_grad for name, p in module.named_parameters()}
    for name, parameter in pruned.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(wanted[name])
    pruned.train(module.training)
