"""Channel scores: each measure against its definition, computed the slow way."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from autotune.compression.importance import TAYLOR_BATCH, TAYLOR_SAMPLES, score_channels
from autotune.compression.pruning import prune_module
from autotune.errors import CompressionError

SHAPE = (3, 8, 8)


class Residual(nn.Module):
    """Two layers make the channels of the stream, two read them; `gate` multiplies it."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.inner = nn.Conv2d(16, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)
        if norm:
            nn.init.uniform_(self.stem_norm.weight, -1.0, 1.0)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        one = torch.ones(16) if gate is None else gate
        stream = functional.relu(self.stem_norm(self.stem(x)))
        inner = functional.relu(self.inner(stream * one[:, None, None]))
        joined = stream + self.outer(inner)
        return self.head(joined.mean(dim=(2, 3)) * one)


@pytest.fixture
def net() -> Residual:
    return Residual().eval()


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    samples = np.random.default_rng(0).normal(size=(40, *SHAPE)).astype(np.float32)
    samples.setflags(write=False)  # as they come out of Ray's object store
    return samples


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 5, 40)


def gate_derivatives(net: Residual, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The squared derivative by a gate in front of all readers, averaged over mini-batches."""
    squares = []
    for start in range(0, len(x), TAYLOR_BATCH):
        gate = torch.ones(16, requires_grad=True)
        output = net(torch.tensor(x[start : start + TAYLOR_BATCH]), gate)
        labels = torch.from_numpy(y[start : start + TAYLOR_BATCH])
        functional.cross_entropy(output, labels).backward()  # type: ignore[no-untyped-call]
        assert gate.grad is not None
        squares.append(gate.grad.numpy() ** 2)
    return np.mean(squares, axis=0)


def test_taylor_is_the_squared_derivative_by_a_gate_on_the_shared_channels(
    net: Residual, x: np.ndarray, y: np.ndarray
) -> None:
    scores = score_channels(net, SHAPE, "taylor", x=x, y=y).by_group
    assert scores.keys() == {"stem", "inner"}
    np.testing.assert_allclose(scores["stem"], gate_derivatives(net, x, y), rtol=1e-3, atol=1e-9)


def test_without_labels_the_modules_own_answers_stand_for_them(
    net: Residual, x: np.ndarray
) -> None:
    with torch.no_grad():
        own = net(torch.tensor(x)).argmax(dim=1).numpy()
    given = score_channels(net, SHAPE, "taylor", x=x, y=own).by_group["stem"]
    np.testing.assert_allclose(score_channels(net, SHAPE, "taylor", x=x).by_group["stem"], given)


def test_taylor_looks_at_so_many_samples_and_no_more(net: Residual, x: np.ndarray) -> None:
    many = np.tile(x, (8, 1, 1, 1))[: TAYLOR_SAMPLES + 30]
    some = score_channels(net, SHAPE, "taylor", x=many[:TAYLOR_SAMPLES]).by_group["inner"]
    np.testing.assert_array_equal(
        score_channels(net, SHAPE, "taylor", x=many).by_group["inner"], some
    )


@pytest.mark.parametrize(("importance", "p"), [("l1", 1), ("l2", 2)])
def test_norms_are_a_geometric_mean_over_what_makes_and_reads_the_channel(
    net: Residual, importance: str, p: int
) -> None:
    slices = [net.inner.weight, net.outer.weight.transpose(0, 1)]
    norms = [w.detach().double().flatten(1).abs().pow(p).sum(1).log().numpy() for w in slices]
    found = score_channels(net, SHAPE, importance).by_group["inner"]  # type: ignore[arg-type]
    np.testing.assert_allclose(found, norms[0] + norms[1], rtol=1e-5)


def test_batch_norm_ranks_by_its_scale_and_says_which_groups_have_none(net: Residual) -> None:
    found = score_channels(net, SHAPE, "batch_norm")
    scale = net.stem_norm.weight.detach().abs().numpy()
    assert (np.argsort(found.by_group["stem"]) == np.argsort(scale)).all()
    assert found.without_batch_norm == ("inner",)
    by_l2 = score_channels(net, SHAPE, "l2").by_group["inner"]
    np.testing.assert_array_equal(found.by_group["inner"], by_l2)


def test_a_module_without_batch_norm_is_ranked_by_l2_throughout() -> None:
    bare = Residual(norm=False).eval()
    found = score_channels(bare, SHAPE, "batch_norm")
    assert set(found.without_batch_norm) == {"stem", "inner"}


def test_the_channels_with_the_smallest_scores_go(net: Residual, x: np.ndarray) -> None:
    scores = score_channels(net, SHAPE, "taylor", x=x)
    strong = np.sort(np.argsort(scores.by_group["inner"], kind="stable")[16:])
    pruned = prune_module(net, SHAPE, {"inner": 0.5}, scores=scores)
    assert torch.equal(pruned.get_submodule("inner").weight, net.inner.weight[strong])


def test_the_measures_disagree(net: Residual, x: np.ndarray) -> None:
    measures = ("l1", "l2", "taylor", "batch_norm")
    orders = {
        tuple(np.argsort(score_channels(net, SHAPE, m, x=x).by_group["stem"])) for m in measures
    }
    assert len(orders) == len(measures)


def test_taylor_without_samples_names_the_way_out(net: Residual) -> None:
    with pytest.raises(CompressionError, match=r"set search\.prune_importance to l2"):
        score_channels(net, SHAPE, "taylor")


def test_scoring_leaves_the_module_as_it_was(net: Residual, x: np.ndarray) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    score_channels(net, SHAPE, "taylor", x=x)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert net.stem.weight.grad is None
