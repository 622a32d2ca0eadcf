"""Pruning on real architectures: every group at half of its channels, all in one copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from autotune.compression.channels import MIN_CHANNELS, kept_channels
from autotune.compression.pruning import Prunability, describe_pruning, prune_module
from autotune.compression.source import export_module
from autotune.compression.torchvision_repair import import_torchvision

SHAPE = (3, 64, 64)
RATIO = 0.5

LARGEST_SHARE = {
    "resnet18": 0.26,
    "resnet50": 0.26,
    "mobilenet_v2": 0.3,
    "mobilenet_v3_small": 0.4,
    "efficientnet_b0": 0.35,
    "regnet_y_400mf": 0.4,
    "convnext_tiny": 0.26,
    "squeezenet1_1": 0.3,
    "densenet121": 0.3,
    "vit_b_16": 0.7,
    "shufflenet_v2_x0_5": 0.6,
}
"""Of the parameters, what may be left: half of the channels on both sides is a quarter."""

EXPORTED = ("regnet_y_400mf", "shufflenet_v2_x0_5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    name: str
    module: nn.Module
    found: Prunability
    pruned: nn.Module


def make_model(name: str) -> nn.Module:
    size = {"image_size": SHAPE[1]} if name.startswith("vit") else {}
    torch.manual_seed(0)
    models = import_torchvision().models
    module: nn.Module = models.get_model(name, weights=None, num_classes=10, **size)
    return module.eval()


@pytest.fixture(scope="module", params=LARGEST_SHARE)
def case(request: pytest.FixtureRequest) -> Iterator[Pruned]:
    module = make_model(request.param)
    found = describe_pruning(module, SHAPE)
    pruned = prune_module(module, SHAPE, {group.name: RATIO for group in found.groups})
    yield Pruned(name=request.param, module=module, found=found, pruned=pruned)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def widths(module: nn.Module) -> dict[str, int]:
    return {
        name: layer.weight.shape[0]
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


def test_half_of_every_group_goes_and_the_model_still_runs(case: Pruned) -> None:
    assert len(case.found.groups) >= 12
    assert parameters(case.pruned) < LARGEST_SHARE[case.name] * parameters(case.module)
    with torch.no_grad():
        answer = case.pruned(torch.randn(2, *SHAPE))
    assert answer.shape == (2, 10)
    assert torch.isfinite(answer).all()


def test_every_layer_of_a_group_keeps_what_was_promised(case: Pruned) -> None:
    after = widths(case.pruned)
    for group in case.found.groups:
        kept = kept_channels(group.channels, RATIO, block=group.block)
        assert {after[layer] for layer in group.layers} == {kept}
        assert kept >= MIN_CHANNELS
        assert kept % group.block == 0
        assert abs(kept - group.channels / 2) <= max(4, group.block / 2)


def test_every_layer_is_prunable_follows_or_has_a_reason(case: Pruned) -> None:
    offered = {layer for group in case.found.groups for layer in group.layers}
    left_out = dict(case.found.left_out)
    before, after = widths(case.module), widths(case.pruned)
    for name in before.keys() - offered - left_out.keys():
        # What is in neither list carries channels of others: depthwise and attention's output.
        layer = case.module.get_submodule(name)
        assert getattr(layer, "groups", 1) > 1 or name.endswith("out_proj")
    assert all(before[name] == after[name] for name in left_out if name in before)


def test_attention_widths_are_left_out_by_name() -> None:
    layer = nn.TransformerEncoderLayer(
        32, 4, dim_feedforward=64, batch_first=True, dropout=0.0
    ).eval()
    net = nn.Sequential(nn.Linear(12, 32), layer, nn.Flatten(), nn.Linear(160, 3))
    found = describe_pruning(net, (5, 12))
    assert [group.name for group in found.groups] == ["1.linear1"]
    assert "attention '1.self_attn'" in dict(found.left_out)["0"]


@pytest.mark.parametrize("case", EXPORTED, indirect=True)
def test_a_pruned_model_exports_and_answers_alike(case: Pruned) -> None:
    data = export_module(case.pruned, SHAPE).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    (answer,) = session.run(None, {session.get_inputs()[0].name: x})
    with torch.no_grad():
        expected = case.pruned(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4)
