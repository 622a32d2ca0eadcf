"""Candidates keep one identity; a space offers what a group can take and nothing else."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from search_spaces import (
    FP16,
    FP32,
    INT8,
    W1,
    W2,
    W4,
    W8,
    W8A16,
    Candidate,
    LayerInventory,
    PerBlock,
    PerChannel,
    PerTensor,
    Precision,
    SearchSpace,
)
from search_spaces.errors import InvalidCandidate, InvalidChoice
from tests.unit.spaces import inventory, space


def test_precisions_are_read_from_the_names_they_print() -> None:
    plain = (FP32, FP16, INT8, W8A16, W8, W4, W2, W1)
    variants = [Precision(8, 8, PerTensor()), Precision(8, 8, None, True)]
    variants += [Precision(4, 32, PerBlock(64), False), Precision(2, 32, PerChannel())]
    for precision in (*plain, *variants):
        assert Precision.parse(precision.name) == precision
    assert [p.name for p in variants] == [
        "w8a8-tensor", "w8a8-symmetric", "w4-block64-asymmetric", "w2-channel",
    ]  # fmt: skip


def test_names_of_yesterday_mean_what_they_meant() -> None:
    """The digest that a candidate had before precisions took options."""
    candidate = Candidate(precisions={"a": INT8, "b": Precision.parse("w4"), "c": FP32})
    assert candidate.canonical_json() == (
        '{"precisions":{"a":"w8a8","b":"w4"},"prune_ratios":{},"runtime":{"provider":'
        '"CPUExecutionProvider","runtime":"onnxruntime","threads":1},"version":1}'
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("w8a8-channel", "w8a8"), ("w8a8-asymmetric", "w8a8"), ("w4-block32-symmetric", "w4"),
        ("float16", "fp16"), ("INT8", "w8a8"), ("w1-channel", "w1"),
    ],
)  # fmt: skip
def test_a_default_written_out_changes_nothing(written: str, meant: str) -> None:
    assert Precision.parse(written) == Precision.parse(meant)
    assert Precision.parse(written).name == meant


@pytest.mark.parametrize(
    "name",
    ["w4-block20", "w8a8-block64", "w1-tensor", "fp32-symmetric", "w4-tensor-channel", "w4a8"],
)
def test_a_precision_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InvalidChoice):
        Precision.parse(name)


def test_precisions_sort_by_their_bits() -> None:
    names = [p.name for p in sorted([FP32, INT8, W4, W1, FP16, Precision(8, 8, PerTensor())])]
    assert names == ["w1", "w4", "w8a8", "w8a8-tensor", "fp16", "fp32"]


@pytest.mark.parametrize("name", ["int7", "w8a", "", "fp8", "w3a8"])
def test_an_unknown_precision_says_what_is_allowed(name: str) -> None:
    with pytest.raises(InvalidChoice, match=r"fp32|bits"):
        Precision.parse(name)


def test_a_candidate_survives_json() -> None:
    candidate = space().sample(random.Random(3))
    again = Candidate.from_json(json.loads(candidate.canonical_json()))
    assert again == candidate
    assert again.digest == candidate.digest


def test_runtime_options_change_the_candidate_but_not_its_artifact() -> None:
    one, two = space(threads=(1, 2)).runtimes
    a, b = (
        Candidate(precisions={"body": INT8}, runtime=one),
        Candidate(precisions={"body": INT8}, runtime=two),
    )
    assert a.digest != b.digest
    assert a.artifact_digest == b.artifact_digest


def test_rounding_makes_another_artifact_of_the_same_base_and_survives_json() -> None:
    plain = Candidate(precisions={"body": INT8}, prune_ratios={"stem": 0.25})
    learned = replace(plain, rounding="adaround")
    assert Candidate.from_json(json.loads(learned.canonical_json())) == learned
    assert learned.artifact_digest != plain.artifact_digest
    assert learned.base_digest == plain.base_digest
    assert (plain.to_json()["version"], learned.to_json()["version"]) == (1, 2)


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(InvalidCandidate, match=r"'stochastic'.*adaround"):
        Candidate.from_json({**Candidate().to_json(), "version": 2, "rounding": "stochastic"})


def test_a_candidate_of_a_newer_format_is_refused() -> None:
    document = {**Candidate().to_json(), "version": 99}
    with pytest.raises(InvalidCandidate, match="99"):
        Candidate.from_json(document)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_prune_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(InvalidCandidate, match=r"\[0, 1\)"):
        Candidate(prune_ratios={"stem": ratio})


def test_a_group_is_offered_only_what_it_can_take() -> None:
    built = space()
    assert built.precisions["body"] == (FP32, INT8)
    assert built.precisions["head"] == (FP32, Precision(8, 32), W4, INT8)


def test_a_space_counts_its_candidates() -> None:
    assert space(threads=(1, 2)).n_candidates == 2 * 2 * 2 * 4 * 3 * 3 * 2


def test_without_ratios_nothing_is_prunable() -> None:
    assert space(ratios=(0.0,)).prune_ratios == {}


def test_samples_are_points_of_the_space() -> None:
    built, rng = space(), random.Random(0)
    for _ in range(50):
        built.require(built.sample(rng))


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(precisions={"nowhere": INT8}),
        Candidate(precisions={"body": W4}),
        Candidate(prune_ratios={"body": 0.3}),
    ],
)
def test_a_candidate_outside_the_space_is_refused(candidate: Candidate) -> None:
    with pytest.raises(InvalidCandidate):
        space().require(candidate)


def test_space_and_inventory_survive_json() -> None:
    built = space()
    assert SearchSpace.from_json(json.loads(json.dumps(built.to_json()))) == built
    assert LayerInventory.from_json(json.loads(json.dumps(inventory().to_json()))) == inventory()
