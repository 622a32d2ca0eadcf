"""Which channels of a torch module must go together: the one door to torch-pruning.

Owns the dependency graph (Fang et al. 2023, arXiv:2301.12900), with what it lacks for real
models: grouped convolutions that lose whole groups, and reshapes that mix channels. Says of
every layer that cannot be pruned why. Which channels go is `importance`'s knowledge; their
removal is `pruning`'s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch_pruning.pruner.function import ConvPruner

from autotune.compression.channels import MIN_PRUNABLE_CHANNELS
from autotune.errors import CompressionError
from search_spaces.layers import PrunableGroup

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_GLOBAL_POOLS = ("MeanBackward", "AdaptiveAvgPool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """A prunable group together with torch-pruning's view of it, over all its channels."""

    group: PrunableGroup
    dependencies: torch_pruning.Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Couplings:
    """All of a module: what can be pruned, and why each other layer cannot (name, reason)."""

    graph: ChannelGraph
    offered: tuple[Coupling, ...]
    left_out: tuple[tuple[str, str], ...]


class ChannelGraph(torch_pruning.DependencyGraph):
    """torch-pruning's graph; grouped convolutions lose whole groups, mixed channels stay.

    A reshape that splits or merges the channel axis (the channel shuffle of Zhang et al.
    2018, arXiv:1707.01083) has no index mapping in torch-pruning, which fails on it. Here it
    is the end of the way and listed in `mixing`: channels that reach one are not offered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixing: set[Any] = set()
        self._whole_groups = _WholeGroupPruner()
        self._out_channel_pruning_fn.add(self._whole_groups.prune_out_channels)
        self._in_channel_pruning_fn.add(self._whole_groups.prune_in_channels)

    def get_pruner_of_module(self, module: nn.Module) -> Any:
        """torch-pruning's, but for grouped convolutions."""
        if group_width(module) > 1:
            return self._whole_groups
        return super().get_pruner_of_module(module)

    def _trace(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        nodes: dict[Any, Any] = super()._trace(*arguments, **named)
        kinds = torch_pruning.ops.OPTYPE
        if self._2d_4d:  # with 3-d tokens torch-pruning maps no reshape: their axis comes last
            for node in nodes.values():
                if node.type == kinds.RESHAPE and _mixes_channels(node.grad_fn):
                    node.type = kinds.ELEMENTWISE
                    self.mixing.add(node)
        return nodes

    def _build_dependency(self, module2node: dict[Any, Any]) -> None:
        super()._build_dependency(module2node)
        for node in self.mixing:
            node.dependencies.clear()  # reached, but nothing is followed through it

    def name_of(self, module: nn.Module) -> str:
        """The module's name in the model."""
        return str(self._module2name[module])


class _WholeGroupPruner(ConvPruner):
    """Removes groups of a grouped convolution, their inputs and outputs together.

    torch-pruning itself takes channels out of every group and leaves their number alone,
    which keeps the many small products that make a grouped convolution slow.
    """

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        kept = sorted(set(range(layer.out_channels)) - set(idxs))
        layer.groups -= len(idxs) // group_width(layer)
        layer.in_channels -= len(idxs)
        layer.out_channels -= len(idxs)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        return layer

    prune_in_channels = prune_out_channels


@dataclass(slots=True)
class _Trail:
    """The layer that a forward pass reached last, to be named when the pass fails."""

    last: str = ""
    hooks: list[Any] = field(default_factory=list)

    def run(self, module: nn.Module, sample: torch.Tensor) -> Any:
        for name, layer in module.named_modules():
            self.hooks.append(layer.register_forward_pre_hook(self._reach(name)))
        try:
            return module(sample)
        finally:
            for hook in self.hooks:
                hook.remove()

    def _reach(self, name: str) -> Any:
        def reached(*_: Any) -> None:
            self.last = name

        return reached


def group_width(layer: nn.Module) -> int:
    """Channels per group of a convolution that can lose whole groups; 1 of any other layer.

    Such a one has as many outputs as inputs per group, and more than one of each.
    """
    if not isinstance(layer, _CONVOLUTIONS) or layer.groups == 1:
        return 1
    return layer.in_channels // layer.groups if layer.in_channels == layer.out_channels else 1


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy whose every parameter has a gradient: torch-pruning traces through autograd."""
    duplicate = copy.deepcopy(module).cpu().eval()
    for parameter in duplicate.parameters():
        parameter.requires_grad_(True)
    return duplicate


def find_couplings(module: nn.Module, input_shape: tuple[int, ...]) -> Couplings:
    """The couplings of a module that `trainable_copy` made, in the module's own order.

    Raises:
        CompressionError: it cannot be traced; the message names the layer reached last.
    """
    graph = _trace(module, input_shape)
    offered: list[Coupling] = []
    left_out: list[tuple[str, str]] = []
    for found in _examine(graph):
        if isinstance(found, Coupling):
            offered.append(found)
        else:
            left_out += found
    return Couplings(graph=graph, offered=tuple(offered), left_out=tuple(left_out))


def _trace(module: nn.Module, input_shape: tuple[int, ...]) -> ChannelGraph:
    trail = _Trail()
    graph = ChannelGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(
                module,
                example_inputs=torch.zeros(1, *input_shape),
                forward_fn=trail.run,
                verbose=False,
            )
    except Exception as error:  # torch-pruning and the module may raise anything
        reached = f", at layer {trail.last!r}" if trail.last else ""
        raise CompressionError(
            f"{type(module).__name__} cannot be pruned: torch-pruning fails to trace it with "
            f"an input of shape {input_shape}{reached}: {type(error).__name__}: {error}"
        ) from error
    return graph


def _examine(graph: ChannelGraph) -> Iterator[Coupling | list[tuple[str, str]]]:
    """Each set of layers that are pruned together, as a coupling or with the reason against."""
    order = {layer: rank for rank, layer in enumerate(graph.model.modules())}
    seen: set[nn.Module] = set()
    roots = [m for m in graph.model.modules() if m in graph.module2node and _is_root(m)]
    for root in roots:
        if root in seen:
            continue
        try:
            dependencies = _all_channels(graph, root)
        except CompressionError as error:
            seen.add(root)
            yield [(graph.name_of(root), str(error))]
            continue
        layers = [d.target.module for d, _ in dependencies if _removes_outputs(graph, d)]
        seen.update(layers)
        layers.sort(key=order.__getitem__)
        names = tuple(graph.name_of(layer) for layer in layers)
        obstacle = _obstacle(graph, root, dependencies, layers)
        if obstacle is not None:
            yield [(name, obstacle) for name in names]
            continue
        norms = [d.target.module for d, _ in dependencies]
        norms = sorted({m for m in norms if isinstance(m, _BATCH_NORMS)}, key=order.__getitem__)
        group = PrunableGroup(
            name=names[0],
            channels=graph.get_out_channels(root),
            layers=names,
            block=_block(dependencies),
            batch_norms=tuple(graph.name_of(norm) for norm in norms),
        )
        yield Coupling(group=group, dependencies=dependencies)


def _all_channels(graph: ChannelGraph, root: nn.Module) -> torch_pruning.Group:
    try:
        pruner = graph.get_pruner_of_module(root)
        return graph.get_pruning_group(
            root, pruner.prune_out_channels, list(range(graph.get_out_channels(root)))
        )
    except Exception as error:  # torch-pruning has no error type of its own
        raise CompressionError(
            f"torch-pruning cannot follow its channels: {type(error).__name__}: {error}"
        ) from error


def _is_root(layer: nn.Module) -> bool:
    """It makes channels of its own, rather than carry those it reads."""
    return isinstance(layer, WEIGHTED) and not _is_depthwise(layer) and group_width(layer) == 1


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _CONVOLUTIONS) and 1 < layer.groups == layer.out_channels


def _removes_outputs(graph: ChannelGraph, dependency: Any) -> bool:
    removes = graph.is_out_channel_pruning_fn(dependency.handler)
    return isinstance(dependency.target.module, WEIGHTED) and removes


def _block(dependencies: torch_pruning.Group) -> int:
    """Neighbouring channels that only go together: the widths of the grouped convolutions."""
    return math.lcm(*(group_width(d.target.module) for d, _ in dependencies))


def _obstacle(
    graph: ChannelGraph,
    root: nn.Module,
    dependencies: torch_pruning.Group,
    layers: list[nn.Module],
) -> str | None:
    """Why the group is not offered, None where it is."""
    channels = graph.get_out_channels(root)
    targets = [d.target for d, _ in dependencies]
    for target in targets:
        if isinstance(target.module, nn.MultiheadAttention):
            return (
                f"its channels are those of the attention {graph.name_of(target.module)!r}, "
                "whose heads share them in equal parts"
            )
        if _is_indivisible(target.module):
            return (
                f"its channels are tied to {graph.name_of(target.module)!r}, a grouped "
                "convolution with different numbers of inputs and outputs per group"
            )
    if any(_is_output(graph, d) for d, _ in dependencies):
        return "its channels are an output of the model"
    if any(target in graph.mixing for target in targets):
        return "its channels pass a reshape that mixes them, such as a channel shuffle"
    if not _blocks_are_whole(dependencies, channels):
        return "its channels are only a part of what a grouped convolution reads"
    if channels < max(MIN_PRUNABLE_CHANNELS, 2 * _block(dependencies)):
        return f"it has only {channels} channels"
    if _is_squeeze(graph, root, layers):
        return "it squeezes a global average pool, whose 1x1 maps cost next to nothing"
    return None


def _is_indivisible(layer: nn.Module) -> bool:
    """A grouped convolution whose groups cannot be removed one by one."""
    grouped = isinstance(layer, _CONVOLUTIONS) and layer.groups > 1
    return grouped and not _is_depthwise(layer) and group_width(layer) == 1


def _blocks_are_whole(dependencies: torch_pruning.Group, channels: int) -> bool:
    """Every grouped convolution carries the group's channels, all of them and in order."""
    every = list(range(channels))
    items = [dependencies[i] for i in range(len(dependencies))]
    grouped = [item for item in items if group_width(item.dep.target.module) > 1]
    return all(
        sorted(zip(i.root_idxs, i.idxs, strict=True)) == [(c, c) for c in every] for i in grouped
    )


def _is_output(graph: ChannelGraph, dependency: Any) -> bool:
    """Nothing reads what this dependency changes, so it is an output of the model."""
    target = dependency.target
    if target.type == torch_pruning.ops.OPTYPE.OUTPUT:
        return True
    if target.type == torch_pruning.ops.OPTYPE.PARAMETER or target.outputs:
        return False
    weighted = isinstance(target.module, WEIGHTED)
    return not weighted or _removes_outputs(graph, dependency)


def _is_squeeze(graph: ChannelGraph, root: nn.Module, layers: list[nn.Module]) -> bool:
    """A convolution alone in its group that reads a global average pool."""
    if len(layers) != 1 or not isinstance(root, _CONVOLUTIONS):
        return False
    return any(
        pool in str(node.name) for node in graph.module2node[root].inputs for pool in _GLOBAL_POOLS
    )


def _mixes_channels(grad_fn: Any) -> bool:
    """A reshape after which axis 1 of its input is no axis of its own.

    Not so: a flattening of all axes but the batch, its inverse, and reshapes of the maps.
    """
    before = getattr(grad_fn, "_saved_self_sym_sizes", None)
    metadata = getattr(grad_fn, "_input_metadata", None)  # of the gradient: the result's shape
    if before is None or not metadata or len(before) < 3:
        return False
    after = tuple(metadata[0].shape)
    if len(after) == 2:
        return False
    stride = math.prod(before[2:])
    return not any(
        extent == before[1] and math.prod(after[axis + 1 :]) == stride
        for axis, extent in enumerate(after)
        if axis > 0
    )
