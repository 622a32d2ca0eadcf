"""Layer groups: what is tied, what it costs, what can be chosen."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autotune.cli.views.models import LAYER_GROUPS
from autotune.compression.cleanup import clean_up
from autotune.compression.graph import GraphView
from autotune.compression.inventory import build_inventory, count_cost
from autotune.compression.source import export_module
from autotune.compression.units import find_units
from search_spaces import INT8, LayerInventory, LayerKind, LayerPattern, SearchSpace
from tests.unit.compression_models import SHAPE, tiny_module, tiny_source, torchvision_source


def layers_of(inventory: LayerInventory, group: str) -> list[str]:
    return [layer.name for layer in inventory.group(group).layers]


def test_a_residual_add_ties_its_producers_through_a_pool() -> None:
    inventory = build_inventory(tiny_source())
    assert layers_of(inventory, "stem.0") == ["stem.0", "block1.project.0"]
    assert layers_of(inventory, "mix.0") == ["mix.0", "block2.project.0"]


def test_everything_else_is_a_group_of_its_own() -> None:
    inventory = build_inventory(tiny_source())
    names = [group.name for group in inventory.groups]
    assert names[:4] == ["stem.0", "block1.expand.0", "block1.depthwise", "block1.fc1"]
    assert names[-2:] == ["hidden", "head"]
    tied = ("stem.0", "mix.0", "block1.fc1", "block2.fc1")
    assert all(len(g.layers) == 1 for g in inventory.groups if g.name not in tied)


def test_every_group_says_what_it_is() -> None:
    patterns = {g.name: g.pattern for g in build_inventory(tiny_source()).groups}
    assert patterns["stem.0"] == LayerPattern.RESIDUAL
    assert patterns["block1.fc1"] == LayerPattern.SQUEEZE_EXCITE
    assert patterns["block1.depthwise"] == LayerPattern.CONV
    assert (patterns["hidden"], patterns["head"]) == (LayerPattern.LINEAR, LayerPattern.CLASSIFIER)


def test_every_weight_is_in_exactly_one_group() -> None:
    inventory = build_inventory(tiny_source())
    names = [layer.name for group in inventory.groups for layer in group.layers]
    weighted = [n.name for n in tiny_source().graph.graph.node if n.op_type in ("Conv", "Gemm")]
    assert sorted(names) == sorted(weighted)


def test_activations_and_adds_belong_to_the_unit() -> None:
    nodes = build_inventory(tiny_source()).group("stem.0").nodes
    assert [name.split(":")[0] for name in nodes] == ["stem.0", "Relu", "block1.project.0", "Add"]


def test_inspecting_a_model_shows_the_pattern_of_each_group() -> None:
    head = build_inventory(tiny_source()).group("head")
    shown = {column.title: column.text(head) for column in LAYER_GROUPS.columns}
    assert shown["pattern"] == "classifier"
    assert {field.name: field.value(head) for field in LAYER_GROUPS.fields}[
        "pattern"
    ] == "classifier"


def test_a_squeeze_and_excite_block_is_one_unit_with_its_mean_and_its_product() -> None:
    nodes = build_inventory(tiny_source()).group("block1.fc1").nodes
    assert [name.split(":")[0] for name in nodes] == [
        "GlobalAveragePool", "block1.fc1", "Relu", "block1.fc2", "HardSigmoid", "Mul",
    ]  # fmt: skip


def test_costs_are_those_of_the_textbook() -> None:
    inventory = build_inventory(tiny_source())
    (depthwise,) = inventory.group("block1.depthwise").layers
    assert depthwise.kind is LayerKind.DEPTHWISE_CONV
    assert depthwise.macs == 32 * 8 * 8 * 3 * 3
    assert depthwise.parameters == 32 * 9 + 32
    (head,) = inventory.group("head").layers
    assert (head.kind, head.macs, head.parameters) == (LayerKind.GEMM, 64 * 5, 64 * 5 + 5)
    assert (head.input_shape, head.output_shape) == ((64,), (5,))


def test_parameters_are_the_modules_own_with_batch_norm_folded() -> None:
    _, parameters = count_cost(GraphView(tiny_source().graph))
    module = tiny_module()
    own = sum(p.numel() for p in module.parameters())
    # A folded BatchNorm leaves one bias where it had a scale and a shift.
    folded = sum(m.weight.numel() for m in module.modules() if hasattr(m, "running_mean"))
    assert parameters == own - folded


def test_a_group_can_take_every_precision_in_order_of_falling_bits() -> None:
    inventory = build_inventory(tiny_source())
    every = ("fp32", "w8", "w4", "w2", "w1", "fp16", "w8a16", "w8a8")
    assert {group.precisions for group in inventory.groups} == {every}


def test_the_inventory_survives_json() -> None:
    inventory = build_inventory(tiny_source())
    assert LayerInventory.from_json(json.loads(json.dumps(inventory.to_json()))) == inventory


def test_an_onnx_source_has_the_prunable_groups_of_its_module_but_no_training() -> None:
    import dataclasses

    with_module = build_inventory(tiny_source())
    onnx_only = build_inventory(dataclasses.replace(tiny_source(), module=None))
    named = [(g.name, g.channels, set(g.layers)) for g in with_module.prunable_groups]
    found = [(g.name, g.channels, set(g.layers)) for g in onnx_only.prunable_groups]
    assert found == named
    assert with_module.recovery_unavailable is None
    assert onnx_only.recovery_unavailable is not None
    assert "torch module" in onnx_only.recovery_unavailable


def test_a_module_exported_again_has_the_same_groups() -> None:
    again = find_units(GraphView(export_module(tiny_module(), SHAPE)))
    assert [unit.name for unit in again] == [g.name for g in build_inventory(tiny_source()).groups]


@pytest.mark.parametrize(
    ("name", "groups", "largest"),
    [
        ("resnet18", 13, 3),
        ("mobilenet_v2", 43, 4),
        ("mobilenet_v3_small", 39, 3),
        ("efficientnet_b0", 57, 4),
    ],
)
def test_the_groups_of_known_models(name: str, groups: int, largest: int) -> None:
    inventory = build_inventory(torchvision_source(name))
    assert len(inventory.groups) == groups
    assert max(len(group.layers) for group in inventory.groups) == largest
    assert inventory.float_operators == ()
    space = SearchSpace.build(inventory, precisions=[INT8])
    assert len(space.uniform_int8().precisions) == groups


def test_unknown_operators_are_counted_and_stay_float() -> None:
    source = _with_unknown_operators()
    view = GraphView(source)
    assert [unit.name for unit in find_units(view)] == ["a"]
    import dataclasses

    inventory = build_inventory(
        dataclasses.replace(tiny_source(), graph=source, module=None, digest="0" * 64)
    )
    assert [str(operator) for operator in inventory.float_operators] == [
        "1 Conv (its weights are computed, not constant)",
        "2 Erf (onnxruntime's CPU provider has no 8-bit kernel for it)",
        "1 ReduceMax (nothing is known about quantizing it)",
    ]


def _with_unknown_operators() -> onnx.ModelProto:
    """Erf twice, and a Conv whose weights depend on the sample."""
    weight = np.zeros((3, 3, 1, 1), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["c"]),
        helper.make_node("Erf", ["c"], ["d"]),
        helper.make_node("Erf", ["x"], ["e"]),
        helper.make_node("ReduceMax", ["e"], ["s"], keepdims=0),
        helper.make_node("Mul", ["b.weight", "s"], ["w"]),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *SHAPE]) for n in "xy"]
    constants = [numpy_helper.from_array(weight, n) for n in ("a.weight", "b.weight")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], constants)
    return clean_up(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
