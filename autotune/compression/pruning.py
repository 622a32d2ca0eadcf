"""Structured pruning: which channels must go together, and their physical removal.

Owns the prunable groups of a torch module and the choice of the channels that stay;
torch-pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900) tells what is coupled.
Refuses to train: `recovery` brings the accuracy back. A source without a torch module has
no dependency graph and cannot be pruned here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch_pruning
from torch import nn

from autotune.errors import CompressionError
from search_spaces.layers import PrunableGroup

MIN_CHANNELS = 8
"""No group is pruned below this: one vector of 8 floats, the narrowest AVX2 kernel."""

MIN_PRUNABLE_CHANNELS = 16
"""Narrower groups are not offered: half of 15 channels rounds to the floor of 8 or to nothing."""

_DEAD_NORM = 1e-30
"""Squared norms below this count as equally dead; keeps the logarithm finite."""

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_GLOBAL_POOLS = ("MeanBackward", "AdaptiveAvgPool")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coupling:
    """A prunable group together with torch-pruning's view of it, over all its channels."""

    group: PrunableGroup
    dependencies: torch_pruning.Group


def find_prunable_groups(
    module: nn.Module, input_shape: tuple[int, ...]
) -> tuple[PrunableGroup, ...]:
    """The groups of output channels that can be removed together, in the module's own order.

    `input_shape` has no batch axis. The answer depends on the architecture alone, never on
    the weights. A group is named after its first layer and lists every convolution and
    linear layer whose output channels it removes. Left out: the model's outputs, groups of
    fewer than `MIN_PRUNABLE_CHANNELS`, channels tied to a grouped convolution that is not
    depthwise, or to attention (the heads must divide them), and squeeze layers behind a
    global average pool, whose 1x1 maps cost next to nothing. `module` is not changed.

    Raises:
        CompressionError: the module cannot be traced.
    """
    return tuple(c.group for c in _couplings(_trace(_trainable_copy(module), input_shape)))


def prune_module(
    module: nn.Module,
    input_shape: tuple[int, ...],
    ratios: Mapping[str, float],
    *,
    round_to: int = 8,
) -> nn.Module:
    """A copy of `module` from which each named group has lost its least important channels.

    `ratios` are fractions of the channels in [0, 1) by group name; groups not named stay as
    they are. How many channels stay is `kept_channels`. Importance is judged on the
    unpruned weights, so neither the order of the groups nor their number matters, and equal
    ratios always keep equal channels. The model's outputs are never pruned; depthwise
    convolutions, BatchNorm and every reader of the channels follow.

    Raises:
        CompressionError: no group has that name, a ratio is not a fraction, or the module
            cannot be traced or no longer runs afterwards.
    """
    pruned = _trainable_copy(module)
    graph = _trace(pruned, input_shape)
    couplings = {c.group.name: c for c in _couplings(graph)}
    _require_known(ratios, couplings)
    removals = {
        name: _least_important(couplings[name], ratio, round_to)
        for name, ratio in sorted(ratios.items())
    }
    for name, channels in removals.items():
        if channels:
            _remove(graph, pruned, name, channels)
    _require_running(pruned, module, input_shape, removals)
    _restore_flags(pruned, module)
    return pruned


def kept_channels(channels: int, ratio: float, *, round_to: int = 8) -> int:
    """How many of `channels` stay at a prune ratio: the nearest multiple of `round_to`.

    Halves round up (the larger model). A group narrower than twice `round_to` is rounded to
    half of it, and so on. Never below `MIN_CHANNELS` or `round_to`, never above `channels`.
    Multiples of 8 keep onnxruntime's blocked convolution kernels in use.

    >>> kept_channels(96, 0.25), kept_channels(64, 0.3), kept_channels(24, 0.9)
    (72, 48, 8)
    """
    if ratio <= 0.0:
        return channels
    unit = round_to
    while unit > 1 and channels < 2 * unit:
        unit //= 2
    rounded = math.floor(channels * (1.0 - ratio) / unit + 0.5) * unit
    floor = max(MIN_CHANNELS, round_to)
    return min(channels, max(floor, rounded))


def _trainable_copy(module: nn.Module) -> nn.Module:
    """A copy whose every parameter has a gradient: torch-pruning traces through autograd."""
    duplicate = copy.deepcopy(module).cpu().eval()
    for parameter in duplicate.parameters():
        parameter.requires_grad_(True)
    return duplicate


def _trace(module: nn.Module, input_shape: tuple[int, ...]) -> torch_pruning.DependencyGraph:
    try:
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                module, example_inputs=torch.zeros(1, *input_shape), verbose=False
            )
    except Exception as error:  # torch-pruning and the module may raise anything
        raise CompressionError(
            f"{type(module).__name__} cannot be pruned: torch-pruning fails to trace it with "
            f"an input of shape {input_shape}: {type(error).__name__}: {error}"
        ) from error


def _couplings(graph: torch_pruning.DependencyGraph) -> Iterator[_Coupling]:
    """The prunable groups in the order in which the module declares their first layers."""
    order = {layer: rank for rank, layer in enumerate(graph.model.modules())}
    seen: set[nn.Module] = set()
    roots = [m for m in graph.model.modules() if m in graph.module2node and _is_root(m)]
    for root in roots:
        if root in seen:
            continue
        dependencies = _all_channels(graph, root)
        layers = [d.target.module for d, _ in dependencies if _removes_outputs(graph, d)]
        seen.update(layers)
        if _is_offered(graph, root, dependencies, layers):
            layers.sort(key=order.__getitem__)
            names = tuple(graph._module2name[layer] for layer in layers)
            channels = graph.get_out_channels(root)
            group = PrunableGroup(name=names[0], channels=channels, layers=names)
            yield _Coupling(group=group, dependencies=dependencies)


def _all_channels(graph: torch_pruning.DependencyGraph, root: nn.Module) -> torch_pruning.Group:
    name = graph._module2name[root]
    try:
        pruner = graph.get_pruner_of_module(root)
        return graph.get_pruning_group(
            root, pruner.prune_out_channels, list(range(graph.get_out_channels(root)))
        )
    except Exception as error:  # torch-pruning has no error type of its own
        raise CompressionError(
            f"{type(graph.model).__name__} cannot be pruned: the channels coupled with layer "
            f"{name!r} cannot be followed: {type(error).__name__}: {error}"
        ) from error


def _is_root(layer: nn.Module) -> bool:
    return isinstance(layer, _WEIGHTED) and not _is_depthwise(layer)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _CONVOLUTIONS) and 1 < layer.groups == layer.out_channels


def _is_indivisible(layer: nn.Module) -> bool:
    """Its channels come in equal parts (groups, heads) that a ratio would break."""
    if isinstance(layer, nn.MultiheadAttention):
        return True
    return isinstance(layer, _CONVOLUTIONS) and layer.groups > 1 and not _is_depthwise(layer)


def _removes_outputs(graph: torch_pruning.DependencyGraph, dependency: object) -> bool:
    layer = dependency.target.module  # type: ignore[attr-defined]
    handler = dependency.handler  # type: ignore[attr-defined]
    return isinstance(layer, _WEIGHTED) and graph.is_out_channel_pruning_fn(handler)


def _is_offered(
    graph: torch_pruning.DependencyGraph,
    root: nn.Module,
    dependencies: torch_pruning.Group,
    layers: list[nn.Module],
) -> bool:
    if graph.get_out_channels(root) < MIN_PRUNABLE_CHANNELS:
        return False
    if any(_is_indivisible(d.target.module) for d, _ in dependencies):
        return False
    if any(_is_output(graph, d) for d, _ in dependencies):
        return False
    return not _is_squeeze(graph, root, layers)


def _is_output(graph: torch_pruning.DependencyGraph, dependency: object) -> bool:
    """Nothing reads what this dependency changes, so it is an output of the model."""
    target = dependency.target  # type: ignore[attr-defined]
    if target.type == torch_pruning.ops.OPTYPE.OUTPUT:
        return True
    if target.type == torch_pruning.ops.OPTYPE.PARAMETER or target.outputs:
        return False
    weighted = isinstance(target.module, _WEIGHTED)
    return not weighted or _removes_outputs(graph, dependency)


def _is_squeeze(
    graph: torch_pruning.DependencyGraph, root: nn.Module, layers: list[nn.Module]
) -> bool:
    """A convolution alone in its group that reads a global average pool."""
    if len(layers) != 1 or not isinstance(root, _CONVOLUTIONS):
        return False
    return any(
        pool in str(node.name) for node in graph.module2node[root].inputs for pool in _GLOBAL_POOLS
    )


def _require_known(ratios: Mapping[str, float], couplings: Mapping[str, _Coupling]) -> None:
    for name, ratio in ratios.items():
        if name not in couplings:
            raise CompressionError(
                f"no prunable group is called {name!r}; there are: "
                + (", ".join(couplings) or "none")
            )
        if not 0.0 <= ratio < 1.0:
            raise CompressionError(
                f"prune ratio {ratio} of group {name!r} is not a fraction in [0, 1)"
            )


def _least_important(coupling: _Coupling, ratio: float, round_to: int) -> list[int]:
    """The channels to remove, least important first; ties fall to the lower index."""
    channels = coupling.group.channels
    removed = channels - kept_channels(channels, ratio, round_to=round_to)
    if removed == 0:
        return []
    importance = _CoupledMagnitude(p=2, normalizer=None)(coupling.dependencies)
    if importance is None or importance.numel() != channels:
        raise CompressionError(f"the channels of group {coupling.group.name!r} cannot be ranked")
    order = torch.argsort(importance, stable=True)
    return [int(channel) for channel in order[:removed]]


class _CoupledMagnitude(torch_pruning.importance.GroupMagnitudeImportance):
    """Squared L2 norm of each member's slice, as a geometric mean over the coupled group.

    A logarithm, so only its order means anything. torch-pruning's arithmetic mean lets the
    member with the largest weights decide alone; on mobilenet_v2 (digits, every group at
    0.5, BatchNorm re-estimated) this keeps 40 % accuracy, the arithmetic mean 22 to 27 %.
    Its `group_reduction="prod"` is the same order but underflows in long residual streams.
    """

    def _reduce(
        self, group_imp: Sequence[torch.Tensor], group_idxs: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        total = torch.zeros(max(max(channels) for channels in group_idxs) + 1, dtype=torch.float64)
        for norms, channels in zip(group_imp, group_idxs, strict=True):
            logarithms = norms.double().clamp_min(_DEAD_NORM).log()
            total.scatter_add_(0, torch.tensor(channels), logarithms)
        return total


def _remove(
    graph: torch_pruning.DependencyGraph, module: nn.Module, name: str, channels: list[int]
) -> None:
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
