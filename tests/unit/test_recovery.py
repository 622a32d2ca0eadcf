"""Recovery: a pruned net gets its accuracy back, the same way every time."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from autotune.compression.data import LabelledData
from autotune.compression.pruning import prune_module
from autotune.compression.recovery import (
    MOST_PASSES,
    count_macs,
    hold_back,
    logits,
    passes,
    recover,
    reestimate_batch_norm,
)
from autotune.errors import CompressionError
from autotune.spec import RecoverySpec

SHAPE = (1, 8, 8)
SPEC = RecoverySpec(epochs=3, learning_rate=0.05, batch_size=32)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32, momentum=0.01),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 10),
    )


@pytest.fixture(scope="module")
def digits() -> LabelledData:
    bunch = load_digits()
    x = (bunch.images[:, None] / 8.0 - 1.0).astype(np.float32)
    return LabelledData(x=x, y=bunch.target.astype(np.int64))


@pytest.fixture(scope="module")
def training(digits: LabelledData) -> LabelledData:
    part = digits.take(np.arange(800))
    part.x.setflags(write=False)
    part.y.setflags(write=False)
    return part


@pytest.fixture(scope="module")
def teacher(training: LabelledData) -> nn.Module:
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    for _ in range(8):
        for batch in np.array_split(rng.permutation(800), 25):
            output = net(torch.from_numpy(training.x[batch]))
            loss = nn.functional.cross_entropy(output, torch.from_numpy(training.y[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture
def pruned(teacher: nn.Module) -> nn.Module:
    return prune_module(teacher, SHAPE, {"0": 0.5, "3": 0.5})


def accuracy(module: nn.Module, data: LabelledData) -> float:
    return float((logits(module, data.x).argmax(axis=1) == data.y).mean())


def test_a_pruned_net_comes_back_near_its_teacher(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData, digits: LabelledData
) -> None:
    unseen = digits.take(np.arange(800, 1797))
    broken = accuracy(pruned, unseen)
    report = recover(pruned, teacher, training, spec=SPEC, seed=0, threads=1)
    assert accuracy(teacher, unseen) > 0.9
    assert broken < accuracy(teacher, unseen) - 0.1
    assert accuracy(pruned, unseen) > accuracy(teacher, unseen) - 0.03
    assert report.epochs == passes(pruned, teacher, training.x[:1], 3) > 3
    assert report.samples + report.validation_samples == 800
    assert report.recovered_accuracy is not None
    assert report.recovered_accuracy > 0.9
    assert report.wall_s > 0.0


def test_macs_are_those_of_the_convolutions_and_the_classifier(training: LabelledData) -> None:
    expected = 64 * 32 * 9 + 16 * 32 * 32 * 9 + 128 * 10
    assert count_macs(small_net(), training.x[:1]) == expected
    assert count_macs(small_net(), training.x[:3]) == 3 * expected


def test_a_smaller_student_passes_over_the_data_more_often_at_no_more_cost(
    teacher: nn.Module, training: LabelledData
) -> None:
    x = training.x[:1]
    for ratio in (0.25, 0.5, 0.75):
        student = prune_module(teacher, SHAPE, {"0": ratio, "3": ratio})
        n = passes(student, teacher, x, 10)
        assert 10 < n <= 10 * MOST_PASSES
        assert n * count_macs(student, x) <= 1.05 * 10 * count_macs(teacher, x)
    assert passes(teacher, student, x, 10) == 10
    assert passes(student, teacher, x, 0) == 0


def test_the_same_seed_gives_the_same_weights(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    twin = copy.deepcopy(pruned)
    torch.manual_seed(1)
    recover(pruned, teacher, training, spec=SPEC, seed=3, threads=1)
    torch.manual_seed(2)
    recover(twin, teacher, training, spec=SPEC, seed=3, threads=1)
    assert all(torch.equal(v, twin.state_dict()[n]) for n, v in pruned.state_dict().items())


def test_known_teacher_logits_replace_the_teacher(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    twin = copy.deepcopy(pruned)
    known = logits(teacher, training.x)
    recover(pruned, teacher, training, spec=SPEC, seed=0, threads=1)
    untrained = small_net()
    recover(twin, untrained, training, spec=SPEC, seed=0, threads=1, teacher_logits=known)
    for name, value in pruned.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


def test_threads_random_state_and_flags_are_restored(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    recover(pruned, teacher, training, spec=SPEC, seed=0, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not pruned.training
    assert [pruned[1].momentum, pruned[4].momentum] == [0.1, 0.01]
    assert pruned[3].weight.is_contiguous()


def test_slow_batch_norm_learns_its_statistics_all_the_same(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    recover(pruned, teacher, training, spec=SPEC, seed=0, threads=1)
    learned = pruned[4].running_mean.clone()
    reestimate_batch_norm(pruned, training.x)
    spread = pruned[4].running_var.sqrt()
    assert float(((learned - pruned[4].running_mean).abs() / spread).max()) < 0.3


@pytest.mark.parametrize("samples", [2, 3, 5, 33, 65])
def test_no_batch_is_left_with_one_sample(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData, samples: int
) -> None:
    spec = RecoverySpec(epochs=1, learning_rate=0.01, batch_size=2)
    few = training.take(np.arange(samples))
    report = recover(pruned, teacher, few, spec=spec, seed=0, threads=1)
    assert report.validation_samples == 0
    assert report.recovered_accuracy is None
    assert report.kept_epoch == report.epochs
    assert np.isfinite(logits(pruned, few.x)).all()


def test_one_sample_is_refused(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    with pytest.raises(CompressionError, match="2 samples or more"):
        recover(pruned, teacher, training.take(np.arange(1)), spec=SPEC, seed=0, threads=1)


def test_a_teacher_of_another_width_is_refused(pruned: nn.Module, training: LabelledData) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(CompressionError, match=r"\(.*10\), the teacher with \(.*7\)"):
        recover(pruned, other, training, spec=SPEC, seed=0, threads=1)


def test_no_epochs_only_reestimates_batch_norm(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    weight, mean = pruned[3].weight.clone(), pruned[4].running_mean.clone()
    report = recover(pruned, teacher, training, spec=RecoverySpec(epochs=0), seed=0, threads=1)
    assert (report.epochs, report.final_loss) == (0, None)
    assert torch.equal(pruned[3].weight, weight)
    assert not torch.equal(pruned[4].running_mean, mean)


def test_a_diverging_training_keeps_the_weights_from_before(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    wild = RecoverySpec(epochs=6, learning_rate=1e9, batch_size=32)
    report = recover(pruned, teacher, training, spec=wild, seed=0, threads=1)
    assert report.kept_epoch == 0
    assert report.epochs < 6
    assert report.final_loss is None or math.isfinite(report.final_loss)
    assert report.recovered_accuracy == report.reestimated_accuracy
    assert np.isfinite(logits(pruned, training.x)).all()


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_when_so_many_epochs_bring_nothing(
    teacher: nn.Module, training: LabelledData, patience: int
) -> None:
    spec = RecoverySpec(epochs=30, learning_rate=0.5, batch_size=32, patience=patience)
    report = recover(copy.deepcopy(teacher), teacher, training, spec=spec, seed=0, threads=1)
    # At 18 of 30 epochs the learning rate has come down to half of its peak.
    assert report.epochs == max(report.kept_epoch, 18) + patience < 30
    assert report.stopped_because.startswith(f"{patience} epochs in a row")


class Spoiling(nn.Module):
    """Answers like `net` after so many training steps, and the opposite before and later."""

    def __init__(self, net: nn.Module, *, right_after: int) -> None:
        super().__init__()
        self.net, self.right_after = copy.deepcopy(net), right_after
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        return self.net(x) if int(self.steps) == self.right_after else -self.net(x)


def test_what_is_kept_is_the_best_epoch_and_its_accuracy_is_the_one_reported(
    teacher: nn.Module, training: LabelledData
) -> None:
    train, validation = hold_back(len(training.x), seed=0)
    spec = RecoverySpec(epochs=9, learning_rate=1e-6, batch_size=48, patience=2)
    student = Spoiling(teacher, right_after=2 * len(train) // spec.batch_size)
    report = recover(student, teacher, training, spec=spec, seed=0, threads=1)
    assert (report.kept_epoch, report.epochs) == (2, 8)
    judged = training.take(validation)
    assert accuracy(student, judged) == report.recovered_accuracy == report.teacher_accuracy
    assert report.reestimated_accuracy == 0.0
    assert report.validation_samples == len(validation) == 80


def test_a_training_says_why_there_was_no_further_epoch(
    teacher: nn.Module, pruned: nn.Module, training: LabelledData
) -> None:
    few = training.take(np.arange(64))
    reasons = [
        recover(
            copy.deepcopy(pruned),
            teacher,
            few,
            spec=RecoverySpec(epochs=epochs, learning_rate=rate),
            seed=0,
            threads=1,
        ).stopped_because
        for epochs, rate in ((2, 0.01), (0, 0.01), (2, 1e30))
    ]
    assert reasons[0] == f"all {passes(pruned, teacher, few.x[:1], 2)} epochs were run"
    assert "recovery.epochs is 0" in reasons[1]
    assert "no longer finite" in reasons[2]


@pytest.mark.parametrize(
    ("samples", "held"), [(2, 0), (319, 0), (320, 32), (1000, 100), (9000, 256)]
)
def test_a_tenth_is_held_back_but_not_too_few_or_too_many(samples: int, held: int) -> None:
    train, validation = hold_back(samples, seed=4)
    assert len(validation) == held
    assert sorted([*train, *validation]) == list(range(samples))
    assert np.array_equal(hold_back(samples, seed=4)[0], train)


def test_reestimation_gives_the_mean_and_variance_of_the_data() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    x = np.random.default_rng(0).normal(4.0, 3.0, (256, 3, 5, 5)).astype(np.float32)
    x.setflags(write=False)
    net[0].running_mean.fill_(-100.0)
    reestimate_batch_norm(net, x)
    np.testing.assert_allclose(net[0].running_mean, x.mean(axis=(0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(net[0].running_var, x.var(axis=(0, 2, 3)), rtol=0.02)


def test_reestimation_does_not_depend_on_the_momentum_or_leave_traces() -> None:
    net = small_net().train()
    net[0].eval()
    x = np.random.default_rng(0).normal(size=(65, *SHAPE)).astype(np.float32)
    reestimate_batch_norm(net, x)
    assert (net[1].momentum, net[4].momentum) == (0.1, 0.01)
    assert net[1].training
    assert not net[0].training


def test_reestimation_leaves_a_net_without_batch_norm_alone() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    before = net[0].weight.clone()
    reestimate_batch_norm(net, np.zeros((4, *SHAPE), np.float32))
    assert torch.equal(net[0].weight, before)
