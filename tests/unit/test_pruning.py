"""Pruning: groups by architecture, channels by weight, nothing else touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autotune.compression.pruning import (
    MIN_PRUNABLE_CHANNELS,
    describe_pruning,
    kept_channels,
    prune_module,
)
from autotune.compression.torchvision_repair import import_torchvision
from autotune.errors import CompressionError

SHAPE = (3, 64, 64)
MODELS = ("resnet18", "mobilenet_v3_small")


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return import_torchvision().models.get_model(name, weights=None, num_classes=10).eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make_model(request.param)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


def out_channels(module: nn.Module) -> dict[str, int]:
    return {
        name: layer.weight.shape[0]
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


def test_groups_that_are_not_named_keep_their_channels(model: nn.Module) -> None:
    groups = describe_pruning(model, SHAPE).groups
    chosen = groups[len(groups) // 2]
    before = out_channels(model)
    after = out_channels(prune_module(model, SHAPE, {chosen.name: 0.5}))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(chosen.layers)


def test_no_group_holds_the_classifier_outputs_or_few_channels(model: nn.Module) -> None:
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    for group in describe_pruning(model, SHAPE).groups:
        assert last not in group.layers
        assert group.channels >= MIN_PRUNABLE_CHANNELS
        assert group.name == group.layers[0]


def test_groups_do_not_overlap_and_do_not_depend_on_weights(model: nn.Module) -> None:
    groups = describe_pruning(model, SHAPE).groups
    layers = [layer for group in groups for layer in group.layers]
    assert len(layers) == len(set(layers))
    zeroed = copy.deepcopy(model)
    for parameter in zeroed.parameters():
        parameter.data.zero_()
    assert describe_pruning(zeroed, SHAPE).groups == groups


def test_the_residual_stream_of_resnet18_is_one_group_per_stage() -> None:
    groups = {g.name: g for g in describe_pruning(make_model("resnet18"), SHAPE).groups}
    assert groups["conv1"].layers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert set(groups["layer2.0.conv2"].layers) == {
        "layer2.0.conv2",
        "layer2.0.downsample.0",
        "layer2.1.conv2",
    }


def test_a_depthwise_convolution_follows_its_expansion() -> None:
    pruned = prune_module(make_model("mobilenet_v2"), SHAPE, {"features.2.conv.0.0": 0.25})
    depthwise = pruned.get_submodule("features.2.conv.1.0")
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (72, 72, 72)
    assert pruned.get_submodule("features.2.conv.2").in_channels == 72


def test_squeeze_layers_are_not_offered() -> None:
    groups = describe_pruning(make_model("mobilenet_v3_small"), SHAPE).groups
    assert not any(layer.endswith("fc1") for group in groups for layer in group.layers)


def grouped_net(*, inputs: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, inputs, 1),
        nn.Conv2d(inputs, 32, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1),
        nn.Conv2d(64, 10, 1),
    ).eval()


def test_a_grouped_convolution_loses_whole_groups() -> None:
    net = grouped_net()
    weak = [*range(8, 16), *range(24, 32)]
    with torch.no_grad():
        net[0].weight[weak] = 0.0
    groups = describe_pruning(net, (3, 8, 8)).groups
    assert [(g.name, g.block) for g in groups] == [("0", 8), ("3", 1)]
    pruned = prune_module(net, (3, 8, 8), {"0": 0.5})
    assert (pruned[1].groups, pruned[1].in_channels, pruned[1].out_channels) == (2, 16, 16)
    strong = [channel for channel in range(32) if channel not in weak]
    assert torch.equal(pruned[1].weight, net[1].weight[strong])
    assert torch.equal(pruned[3].weight, net[3].weight[:, strong])


def test_removing_whole_groups_is_the_same_as_zeroing_what_reads_them() -> None:
    net = grouped_net()
    with torch.no_grad():
        net[3].weight[:, :16] = 0.0
    sample = torch.randn(2, 3, 8, 8)
    pruned = prune_module(net, (3, 8, 8), {"0": 0.5})
    torch.testing.assert_close(pruned(sample), net(sample), rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_of_uneven_groups_is_named_as_the_obstacle() -> None:
    found = describe_pruning(grouped_net(inputs=64), (3, 8, 8))
    assert [g.name for g in found.groups] == ["3"]
    assert "tied to '1'" in dict(found.left_out)["0"]


def test_the_weakest_channels_go_and_the_others_keep_their_weights() -> None:
    net = small_net()
    weak = [1, 5, 8, 9, 20, 21, 30, 31]
    with torch.no_grad():
        net[0].weight[weak] = 0.0
        net[1].weight[weak] = 0.0
        net[3].weight[:, weak] = 0.0
    pruned = prune_module(net, SHAPE, {"0": 0.25})
    strong = [channel for channel in range(32) if channel not in weak]
    assert torch.equal(pruned[0].weight, net[0].weight[strong])
    assert torch.equal(pruned[3].weight, net[3].weight[:, strong])


def test_the_largest_member_of_a_group_does_not_decide_alone() -> None:
    net = small_net()
    louder = copy.deepcopy(net)
    with torch.no_grad():
        louder[3].weight *= 1000.0
    kept, kept_louder = (prune_module(n, SHAPE, {"0": 0.5})[0].weight for n in (net, louder))
    assert torch.equal(kept, kept_louder)


def test_removing_dead_channels_does_not_change_the_answer() -> None:
    net = small_net()
    with torch.no_grad():
        net[3].weight[:16] = 0.0
        net[3].bias[:16] = 0.0
        net[7].weight[:, :16] = 0.0
    sample = torch.randn(4, *SHAPE)
    pruned = prune_module(net, SHAPE, {"3": 0.5})
    torch.testing.assert_close(pruned(sample), net(sample), rtol=1e-4, atol=1e-5)


def test_equal_ratios_keep_equal_channels_in_any_order() -> None:
    net = make_model("mobilenet_v3_small")
    ratios = {group.name: 0.25 for group in describe_pruning(net, SHAPE).groups}
    first = prune_module(net, SHAPE, ratios).state_dict()
    second = prune_module(net, SHAPE, dict(reversed(ratios.items()))).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_group_is_pruned_alike_whatever_else_is_pruned() -> None:
    net = make_model("resnet18")
    alone = prune_module(net, SHAPE, {"layer1.0.conv1": 0.5})
    both = prune_module(net, SHAPE, {"layer1.0.conv1": 0.5, "layer4.0.conv1": 0.5})
    assert torch.equal(alone.layer1[0].conv1.weight, both.layer1[0].conv1.weight)


def test_the_module_given_stays_as_it_was() -> None:
    net = small_net().train()
    net[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruned = prune_module(net, SHAPE, {"0": 0.5, "3": 0.5})
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert net.training
    assert pruned.training
    assert not pruned[0].weight.requires_grad
    assert pruned[3].weight.requires_grad


def test_a_ratio_of_zero_changes_nothing() -> None:
    net = small_net()
    pruned = prune_module(net, SHAPE, {"0": 0.0})
    assert all(torch.equal(v, pruned.state_dict()[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "kept"),
    [
        (64, 0.25, 8, 48),
        (64, 0.3, 8, 48),
        (24, 0.5, 8, 16),
        (16, 0.5, 8, 8),
        (16, 0.25, 8, 16),
        (16, 0.95, 8, 8),
        (960, 0.99, 8, 8),
        (64, 0.25, 16, 48),
        (24, 0.25, 16, 16),
        (64, 0.9, 16, 16),
        (20, 0.25, 1, 15),
        (20, 0.0, 8, 20),
        (20, 0.05, 8, 16),
    ],
)
def test_kept_channels(channels: int, ratio: float, round_to: int, kept: int) -> None:
    assert kept_channels(channels, ratio, round_to=round_to) == kept


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(CompressionError, match=r"'nothing'.*there are: 0, 3"):
        prune_module(small_net(), SHAPE, {"nothing": 0.5})


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(CompressionError, match=r"'0' is not a fraction in \[0, 1\)"):
        prune_module(small_net(), SHAPE, {"0": ratio})


class Refusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")


def test_a_model_that_cannot_be_traced_names_the_layer_reached() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 1), Refusing())
    with pytest.raises(CompressionError, match=r"Sequential cannot be pruned.*at layer '1'.*no"):
        describe_pruning(net, (3, 8, 8))


def test_an_input_that_does_not_fit_is_told_with_its_shape() -> None:
    with pytest.raises(CompressionError, match=r"shape \(4, 8, 8\)"):
        describe_pruning(small_net(), (4, 8, 8))


class ChannelCounter(nn.Module):
    """Its forward insists on a channel count that pruning changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.last = nn.Conv2d(32, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.shape[1] != 32:
            raise ValueError("32 channels wanted")
        return self.last(x)


def test_a_pruned_model_that_no_longer_runs_names_the_groups() -> None:
    with pytest.raises(CompressionError, match="after pruning first: 32 channels wanted"):
        prune_module(ChannelCounter(), (3, 8, 8), {"first": 0.5})
