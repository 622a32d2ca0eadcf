"""Pruning of ONNX graphs: what is sliced is what went, and nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from sklearn.datasets import load_digits
from torch import nn

from autotune.compression.cleanup import clean_up
from autotune.compression.compressor import Compressor
from autotune.compression.graph import GraphView, attribute
from autotune.compression.inventory import build_inventory
from autotune.compression.onnx_coupling import ChannelCouplings, couple_channels
from autotune.compression.onnx_pruning import (
    choose_channels,
    describe_graph_pruning,
    prune_graph,
    score_graph_channels,
    slice_channels,
)
from autotune.compression.pruning import describe_pruning, prune_module
from autotune.compression.source import SourceModel, export_module, load_source_model
from autotune.errors import CompressionError, InvalidJob
from autotune.search.conclusion import limits
from autotune.spec import JobSpec, ModelSpec, RecoverySpec, parse_job
from search_spaces import INT8, Candidate
from tests.unit.compression_models import (
    run,
    samples,
    save,
    tiny_source,
    tiny_splits,
    torchvision_source,
)

NONE = np.zeros((0, 1), dtype=np.float32)
"""No samples: statistics stay as they are."""

CHAINS = {
    "conv, norm, relu, gemm": (
        """a = Conv <pads = [1,1,1,1]> (x, w1)
        n = BatchNormalization (a, s1, b1, m1, v1)
        r = Relu (n)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        h = Gemm <transB = 1> (f, w2, b2)
        g = Relu (h)
        y = Gemm (g, w3)""",
        {"w1": (32, 3, 3, 3), "s1": 32, "b1": 32, "m1": 32, "v1": 32}
        | {"w2": (24, 32), "b2": 24, "w3": (24, 5)},
        {"w1": 32, "w2": 24},
    ),
    "norms that cannot be folded": (
        """a = Conv (x, w1)
        r = Relu (a)
        n = BatchNormalization (r, s1, b1, m1, v1)
        c = Conv (n, w2)
        d = Add (n, c)
        o = BatchNormalization (d, s2, b2, m2, v2)
        p = GlobalAveragePool (o)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w3)""",
        {"w1": (32, 3, 1, 1), "w2": (32, 32, 1, 1), "w3": (5, 32)}
        | {f"{kind}{i}": 32 for kind in "sbmv" for i in (1, 2)},
        {"w1": 32},
    ),
    "pixels flattened with their channels": (
        """a = Conv <strides = [4,4]> (x, w1)
        r = Relu (a)
        f = Flatten (r)
        y = MatMul (f, w2)""",
        {"w1": (16, 3, 4, 4), "w2": (256, 5)},
        {"w1": 16},
    ),
    "a target shape that is computed": (
        """a = Conv <strides = [4,4]> (x, w1)
        s = Shape (a)
        n = Gather (s, i0)
        u = Unsqueeze (n, a0)
        t = Concat <axis = 0> (u, c256)
        f = Reshape (a, t)
        y = MatMul (f, w2)""",
        {"w1": (16, 3, 4, 4), "w2": (256, 5), "i0": 0, "a0": [0], "c256": [256]},
        {"w1": 16},
    ),
    "concatenated channels and a scale per channel": (
        """a = Conv (x, w1)
        b = Conv (x, w2)
        c = Concat <axis = 1> (a, x, b)
        m = Mul (c, k)
        d = Conv (m, w3)
        e = PRelu (d, q)
        p = ReduceMean <keepdims = 0> (e, axes)
        y = MatMul (p, w4)""",
        {"w1": (16, 3, 1, 1), "w2": (24, 3, 1, 1), "k": (1, 43, 1, 1), "w3": (32, 43, 1, 1)}
        | {"q": (32, 1, 1), "axes": [2, 3], "w4": (32, 5)},
        {"w1": 16, "w2": 24, "w3": 32},
    ),
    "groups that go as a whole": (
        """a = Conv (x, w1)
        b = Conv <group = 4> (a, w2)
        c = Relu (b)
        d = Conv <group = 32> (c, w3)
        p = GlobalMaxPool (d)
        f = Squeeze (p, axes)
        y = Gemm (f, w4)""",
        {"w1": (32, 3, 1, 1), "w2": (32, 8, 1, 1), "w3": (32, 1, 1, 1), "w4": (32, 5)}
        | {"axes": [2, 3]},
        {"w1": 32},
    ),
    "channels that move to the last axis": (
        """a = Conv (x, w1)
        t = Transpose <perm = [0, 2, 3, 1]> (a)
        h = MatMul (t, w2)
        b = Add (h, c)
        g = Sigmoid (b)
        s = Mul (b, g)
        m = MatMul (s, w3)
        u = Transpose <perm = [0, 3, 1, 2]> (m)
        p = GlobalAveragePool (u)
        r = Reshape (p, to16)
        y = MatMul (r, w4)""",
        {"w1": (16, 3, 1, 1), "w2": (16, 32), "c": 32, "w3": (32, 16), "to16": [-1, 16]}
        | {"w4": (16, 5)},
        {"w1": 16, "w2": 32, "w3": 16},
    ),
    "one constant for two groups": (
        """a = Conv (x, w1)
        b = Mul (a, k)
        c = Conv (b, w2)
        d = Mul (c, k)
        p = GlobalAveragePool (d)
        f = Flatten (p)
        y = MatMul (f, w3)""",
        {"w1": (32, 3, 1, 1), "k": (32, 1, 1), "w2": (32, 32, 1, 1), "w3": (32, 5)},
        {"w1": 32, "w2": 32},
    ),
}

STOPS = {
    "Softmax": "s = Softmax <axis = 1> (a)  z = Conv (s, w2)",
    "Split": "s, t = Split <axis = 1, num_outputs = 2> (a)  z = Concat <axis = 1> (t, s)",
    "LayerNormalization": """t = Transpose <perm = [0, 2, 3, 1]> (a)
        l = LayerNormalization (t, k)  z = Transpose <perm = [0, 3, 1, 2]> (l)""",
    "Reshape": """s = Reshape (a, split)  t = Transpose <perm = [0, 2, 1, 3, 4]> (s)
        z = Reshape (t, merged)""",
    "MatMul": """t = Transpose <perm = [0, 1, 3, 2]> (a)  z = MatMul (a, t)""",
}


def graph_of(body: str, weights: Mapping[str, object]) -> onnx.ModelProto:
    """The nodes as a graph in normal form; shapes become random weights, lists constants."""
    header = '<ir_version: 10, opset_import: ["": 20]> g (float[N,3,16,16] x) => (float[N,5] y)'
    model = parser.parse_model(f"{header} {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, what in weights.items():
        if isinstance(what, list) or name == "i0":
            array = np.array(what, dtype=np.int64)
        else:
            array = rng.standard_normal(what).astype(np.float32)
            array = np.abs(array) + 0.5 if name.startswith("v") else array
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return clean_up(model)


@functools.cache
def chain(name: str) -> onnx.ModelProto:
    body, weights, _ = CHAINS[name]
    return graph_of(body, weights)


def model_of(name: str) -> onnx.ModelProto:
    if name in CHAINS:
        return chain(name)
    return (tiny_source() if name == "tiny" else torchvision_source(name)).graph


def input_shape(graph: onnx.ModelProto) -> tuple[int, ...]:
    return GraphView(graph).shape(graph.graph.input[0].name)


def follow(graph: onnx.ModelProto) -> tuple[GraphView, ChannelCouplings]:
    view = GraphView(graph)
    return view, couple_channels(view, min_channels=16)


def half_of_all(graph: onnx.ModelProto) -> dict[str, float]:
    return {group.name: 0.5 for group in describe_graph_pruning(graph).groups}


def replaced(graph: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return copy


def masked(
    view: GraphView, found: ChannelCouplings, kept: np.ndarray, *, makers: bool
) -> onnx.ModelProto:
    """The whole graph with zeros where layers read (or make) the channels not kept."""
    arrays: dict[str, np.ndarray] = {}
    for node in view.nodes:
        if node.op_type not in ("Conv", "Gemm", "MatMul", "BatchNormalization"):
            continue
        for place in range(1, len(node.input)):
            for axis, labels in found.constants.get((node.name, place), {}).items():
                is_product = node.op_type == "MatMul" or not attribute(node, "transB", 0)
                made = int(node.op_type in ("Gemm", "MatMul") and is_product and place == 1)
                if (axis == made) == makers:
                    name = node.input[place]
                    array = arrays.get(name, view.array(name))
                    shape = [-1 if a == axis else 1 for a in range(array.ndim)]
                    arrays[name] = array * kept[labels].reshape(shape).astype(np.float32)
    return replaced(view.model, arrays)


def distance(left: onnx.ModelProto, right: onnx.ModelProto, shape: tuple[int, ...]) -> float:
    """The largest difference of the outputs, as a fraction of their spread."""
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype(np.float32)
    a, b = (run(model.SerializeToString(), x) for model in (left, right))
    assert np.ptp(a) > 0
    return float(np.abs(a - b).max() / np.ptp(a))


@pytest.mark.parametrize(
    "name", [*CHAINS, "tiny", "resnet18", "mobilenet_v2", "mobilenet_v3_small"]
)
def test_slicing_a_channel_is_the_same_as_no_layer_reading_it(name: str) -> None:
    graph = model_of(name)
    view, found = follow(graph)
    scores = score_graph_channels(graph, "l2")
    kept = choose_channels(found, half_of_all(graph), scores)
    assert not kept.all()
    sliced = slice_channels(view, found, kept)
    onnx.checker.check_model(sliced)
    silent = masked(view, found, kept, makers=False)
    assert distance(silent, sliced, input_shape(graph)) < 1e-5
    assert len(sliced.SerializeToString()) < len(graph.SerializeToString())


@pytest.mark.parametrize(
    "name", ["conv, norm, relu, gemm", "resnet18", "mobilenet_v2", "mobilenet_v3_small"]
)
def test_channels_that_are_always_zero_are_chosen_and_not_missed(name: str) -> None:
    graph = model_of(name)
    view, found = follow(graph)
    alive = np.ones(found.n_labels, dtype=bool)
    for coupling in found.couplings:
        alive[coupling.labels[::2]] = False
    dead = masked(view, found, alive, makers=True)
    shape = input_shape(graph)
    ratios = {c.group.name: 0.5 for c in found.couplings if c.group.channels % 16 == 0}
    pruned = prune_graph(dead, ratios, samples=samples(4, shape))
    assert ratios
    assert distance(dead, pruned, shape) < 1e-4


@pytest.mark.parametrize("name", CHAINS)
def test_the_groups_of_a_chain_are_found_with_their_channels(name: str) -> None:
    found = describe_graph_pruning(chain(name))
    assert {group.name: group.channels for group in found.groups} == CHAINS[name][2]


@pytest.mark.parametrize("operator", STOPS)
def test_channels_that_reach_an_operator_without_a_rule_stay(operator: str) -> None:
    body = f"a = Conv (x, w1)  {STOPS[operator]}  p = GlobalAveragePool (z)  f = Flatten (p)"
    weights = {"w1": (16, 3, 1, 1), "w2": (16, 16, 1, 1), "k": 16, "wy": (16, 5)}
    shapes = {"split": [-1, 4, 4, 16, 16], "merged": [-1, 16, 16, 16]}
    found = describe_graph_pruning(graph_of(f"{body}  y = Gemm (f, wy)", weights | shapes))
    assert "w1" not in [group.name for group in found.groups]
    reason = dict(found.left_out)["w1"]
    assert operator in reason
    assert "cannot be followed" in reason


def test_the_outputs_of_the_model_are_never_pruned() -> None:
    found = describe_graph_pruning(torchvision_source("resnet18").graph)
    assert dict(found.left_out)["fc"] == "its channels are an output of the model"


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_groups_are_those_of_the_torch_module(name: str) -> None:
    source = torchvision_source(name)
    assert source.module is not None
    torch_groups = describe_pruning(source.module, source.input_shape).groups
    groups = describe_graph_pruning(source.graph).groups
    assert {(g.name, g.channels, g.block, frozenset(g.layers)) for g in groups} == {
        (g.name, g.channels, g.block, frozenset(g.layers)) for g in torch_groups
    }


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_equal_ratios_give_the_shapes_of_torch_pruning(name: str) -> None:
    source = torchvision_source(name)
    assert source.module is not None
    names = sorted(half_of_all(source.graph))
    ratios = {group: (0.25, 0.5, 0.75)[i % 3] for i, group in enumerate(names)}
    module = prune_module(source.module, source.input_shape, ratios)
    shapes = {k: tuple(v.shape) for k, v in module.state_dict().items() if v.ndim in (2, 4)}
    view = GraphView(prune_graph(source.graph, ratios, samples=NONE))
    assert {key: view.array(key).shape for key in shapes} == shapes


def test_every_remaining_channel_keeps_its_mean_and_variance() -> None:
    graph = chain("norms that cannot be folded")
    x = samples(8, input_shape(graph))
    pruned = prune_graph(graph, {"w1": 0.5}, samples=x)
    view, found = follow(graph)
    kept = choose_channels(found, {"w1": 0.5}, score_graph_channels(graph, "l2"))
    for node in view.nodes:
        if node.op_type not in ("Conv", "BatchNormalization"):
            continue
        name = node.output[0]
        before, after = (values_of(model, name, x) for model in (graph, pruned))
        before = before[:, kept[found.tensors[name].labels]]
        np.testing.assert_allclose(after.mean((0, 2, 3)), before.mean((0, 2, 3)), atol=1e-3)
        np.testing.assert_allclose(after.std((0, 2, 3)), before.std((0, 2, 3)), rtol=1e-2)


def values_of(graph: onnx.ModelProto, tensor: str, x: np.ndarray) -> np.ndarray:
    copy = replaced(graph, {})
    copy.graph.output[0].CopyFrom(onnx.ValueInfoProto(name=tensor))
    return run(copy.SerializeToString(), x)


@pytest.mark.parametrize("x", [samples(1), np.ones((4, 3, 16, 16), dtype=np.float32)])
def test_one_sample_or_constant_ones_leave_a_model_that_answers(x: np.ndarray) -> None:
    graph = tiny_source().graph
    pruned = prune_graph(graph, half_of_all(graph), samples=x)
    assert np.isfinite(run(pruned.SerializeToString(), samples(4))).all()


def test_samples_on_which_a_layer_overflows_are_refused() -> None:
    graph = tiny_source().graph
    x = np.full((2, 3, 16, 16), np.inf, dtype=np.float32)
    with pytest.raises(CompressionError, match=r"'stem\.0' becomes NaN or infinite"):
        prune_graph(graph, half_of_all(graph), samples=x)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"nobody": 0.5}, "no prunable group is called 'nobody'; there are: w1, w2"),
        ({"w1": 1.0}, "prune ratio 1.0 of group 'w1' is not a fraction"),
    ],
)
def test_ratios_that_cannot_be_are_refused(ratios: dict[str, float], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        prune_graph(chain("conv, norm, relu, gemm"), ratios, samples=NONE)


def test_importance_is_a_norm_of_the_weights_or_what_they_make_on_samples() -> None:
    graph = chain("conv, norm, relu, gemm")
    one, two = (score_graph_channels(graph, p).by_group["w1"] for p in ("l1", "l2"))
    assert not np.array_equal(np.argsort(one), np.argsort(two))
    np.testing.assert_array_equal(score_graph_channels(graph, "taylor").by_group["w1"], two)
    x = samples(8, input_shape(graph))
    measured = score_graph_channels(graph, "taylor", samples=x).by_group["w1"]
    variance = values_of(graph, "n", x).var((0, 2, 3), dtype=np.float64)
    readers = np.square(GraphView(graph).array("w2").astype(np.float64)).sum(0)
    np.testing.assert_allclose(measured, np.log(variance) + np.log(readers), rtol=1e-4)


class DigitsNet(nn.Module):
    """Two convolutions, a residual one and a classifier for 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.b = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64))
        self.c = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(x + self.c(x)).mean((2, 3)))


@functools.cache
def trained_digits() -> tuple[onnx.ModelProto, np.ndarray, np.ndarray, np.ndarray]:
    """A trained graph, its calibration samples, and images with labels that it never saw."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images.reshape(-1, 1, 8, 8) / 8 - 1, dtype=torch.float32)
    y = torch.tensor(labels)
    torch.manual_seed(0)
    net = DigitsNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(4):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    graph = export_module(net.eval(), (1, 8, 8))
    return graph, x[:128].numpy(), x[1200:].numpy(), labels[1200:]


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_reestimation_brings_back_what_slicing_alone_loses(ratio: float) -> None:
    graph, calibration, x, y = trained_digits()
    ratios = dict.fromkeys(half_of_all(graph), ratio)
    reference = log_probabilities(graph, x)
    kl, right = {}, {}
    for name, kept in (("sliced", NONE), ("reestimated", calibration)):
        found = log_probabilities(prune_graph(graph, ratios, samples=kept), x)
        kl[name] = float((np.exp(reference) * (reference - found)).sum(1).mean())
        right[name] = float((found.argmax(1) == y).mean())
    assert (reference.argmax(1) == y).mean() > 0.9
    assert kl["reestimated"] < 0.5 * kl["sliced"]
    assert right["reestimated"] > right["sliced"] + 0.1


def log_probabilities(graph: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    logits = run(graph.SerializeToString(), x).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def test_a_job_with_an_onnx_file_gets_smaller_models_of_fewer_macs(tmp_path: Path) -> None:
    reference = save(tiny_source().graph, tmp_path / "model.onnx")
    source = load_source_model(ModelSpec(source=reference), input_shape=(3, 16, 16))
    compressor = Compressor(
        source, tiny_splits(), recovery=RecoverySpec(epochs=1), cache_dir=tmp_path
    )
    names = [group.name for group in compressor.inventory.prunable_groups]
    ratios = dict.fromkeys(names, 0.5)
    plain = compressor.build(Candidate(precisions={"head": INT8}))
    pruned = compressor.build(Candidate(precisions={"head": INT8}, prune_ratios=ratios))
    assert names
    assert pruned.size_bytes < 0.8 * plain.size_bytes
    assert pruned.base.macs < 0.6 * plain.base.macs
    assert [g.group for g in pruned.groups] == [g.group for g in plain.groups]
    assert run(pruned.data, samples(2)).shape == (2, 5)


def test_the_same_graph_with_its_module_has_another_base(tmp_path: Path) -> None:
    sources = [tiny_source(), onnx_only()]
    with_module, without = (
        Compressor(s, tiny_splits(), recovery=RecoverySpec(epochs=1), cache_dir=tmp_path)
        for s in sources
    )
    ratios = {"block1.expand.0": 0.5}
    assert with_module._base_digest(ratios) != without._base_digest(ratios)
    assert with_module._base_digest({}) == without._base_digest({})


def onnx_only() -> SourceModel:
    return dataclasses.replace(tiny_source(), module=None)


def job(**search: object) -> JobSpec:
    return parse_job(
        {"model": {"source": "onnx:m.onnx"}, "data": {"evaluation": "npz:e.npz"}, "search": search}
    )


def test_a_job_is_told_that_nothing_trains_and_what_ranks_the_channels() -> None:
    inventory = build_inventory(onnx_only())
    told = "\n".join(limits(job(), inventory, has_training=True))
    assert "no recovery training: the source is an ONNX graph" in told
    assert "ranked by the variance of their outputs" in told
    quiet = "\n".join(limits(job(prune_importance="l1"), inventory, has_training=True))
    assert "ranked by" not in quiet
    assert "recovery" not in "\n".join(limits(job(prune_ratios=[0]), inventory, has_training=True))


def test_a_graph_without_a_prunable_channel_is_refused_where_pruning_must_be() -> None:
    graph = graph_of("f = Flatten (x)  y = Gemm (f, w)", {"w": (768, 5)})
    inventory = build_inventory(dataclasses.replace(onnx_only(), graph=graph))
    with pytest.raises(InvalidJob, match="no channel of this model can be removed"):
        limits(job(allow_without_pruning=False), inventory, has_training=True)
    told = limits(job(), inventory, has_training=True)
    assert any("going on without pruning: no channel" in notice for notice in told)
