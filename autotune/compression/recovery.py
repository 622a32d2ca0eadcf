"""Accuracy back after pruning: BatchNorm re-estimation, then distillation from the teacher.

Owns the short training of a pruned module: soft targets of the unpruned model (Hinton et al.
2015, arXiv:1503.02531) beside the labels, SGD with momentum on a one-cycle schedule (Smith
2018, arXiv:1708.07120). Refuses to choose what is pruned (`pruning`) and to cache what it
trained (`compressor`). Same module, data, spec, seed and threads: same weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from autotune.compression.data import LabelledData
from autotune.errors import CompressionError
from autotune.spec import RecoverySpec

RECOVERY_VERSION = 3
# Version 1 (2026-11-21): every base was trained for `spec.epochs` passes.
# Version 2 (2026-11-21): for `passes`, more of them where a pass costs less. It is part of a
# pruned base's digest.
# Version 3 (2026-11-21): patience counts from `_PATIENT_FROM` on; before it, from the beginning.

MOST_PASSES = 4.0
"""Times as many passes as asked for, at most. What a strongly pruned model has lost takes more
passes, which cost it less: an eighth of resnet18's channels (digits, top-1 of 1,000 images) lose
0.5 points against FP32 after 10 passes and win 0.1 after 20; a quarter of mobilenet_v2's win 0.5
and 2.2."""

_MOMENTUM = 0.9
_WEIGHT_DECAY = 1e-4
_WARM_UP_FRACTION = 0.2
_PATIENT_FROM = 0.6
"""Of the schedule, where its cosine has come down to half of the peak. While the learning rate
is high a loss that does not fall says nothing: half of mobilenet_v3_small's channels were given
up after 4 of 20 epochs, whose first was the best so far."""
_SOFT_WEIGHT = 0.9
"""Share of the soft targets in the loss; Hinton et al. 2015 find a small hard share best."""
_MIN_BN_MOMENTUM = 0.1
"""torch's default. torchvision's mobilenet_v3 has 0.01, which forgets its old statistics only
after some 400 steps, more than a whole recovery takes."""
_REESTIMATION_SAMPLES = 512
_BATCH = 64  # where nothing is trained
_VALIDATION_FRACTION = 0.1
_VALIDATION_SAMPLES = (32, 256)
"""Fewest and most validation samples; a smaller training set gives none away."""
_STOPPED = {
    "complete": "all {epochs} epochs were run",
    "no_epochs": "recovery.epochs is 0: BatchNorm was re-estimated, nothing was trained",
    "patience": "{patience} epochs in a row brought no smaller loss on the held-back samples",
    "diverged": "the training loss was no longer finite",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What a recovery did.

    Accuracies are fractions of the validation part of the training data (None where there
    was none): of the teacher, of the student after BatchNorm re-estimation, and of the
    weights that were kept. `final_loss` is the mean training loss of the last epoch, None
    where none was run. `epochs` counts those run, `kept_epoch` the one whose weights were
    kept (0: those before training), `samples` those trained on per epoch. `stopped_because`
    says why there was no further epoch. `wall_s` is all of it in seconds, the teacher's
    answers only where they were not known before.
    """

    epochs: int
    kept_epoch: int
    wall_s: float
    final_loss: float | None
    stopped_because: str
    samples: int
    validation_samples: int
    teacher_accuracy: float | None
    reestimated_accuracy: float | None
    recovered_accuracy: float | None


def recover(
    student: nn.Module,
    teacher: nn.Module,
    training: LabelledData,
    *,
    spec: RecoverySpec,
    seed: int,
    threads: int,
    teacher_logits: np.ndarray | None = None,
) -> RecoveryReport:
    """Train `student` in place to answer like `teacher`, and leave it in evaluation mode.

    The teacher answers once, before the training; pass its `logits` over `training.x`,
    shape `(n, classes)`, to spare even that. A tenth of the data (at most 256 samples) is
    held back: the weights with the smallest loss there are kept, and `spec.patience` epochs
    without a smaller one end the training once the learning rate has come down; `passes` says
    how many there are at most. Where nothing can be held back (`hold_back`), all epochs are run
    and the last weights kept. Arrays may be read-only. The number of torch's threads and its
    random state are restored.
    `spec.epochs == 0` only re-estimates BatchNorm.

    Raises:
        CompressionError: fewer than two samples, or the two modules' outputs differ in shape.
    """
    if len(training.x) < 2:
        raise CompressionError(
            f"recovery training needs 2 samples or more, the training data has {len(training.x)}"
        )
    started = time.monotonic()
    with torch_settings(seed=seed, threads=threads):
        soft = logits(teacher, training.x) if teacher_logits is None else teacher_logits
        course = _Course.plan(training, soft, seed=seed)
        reestimate_batch_norm(student, training.x[course.train[:_REESTIMATION_SAMPLES]])
        epochs = passes(student, teacher, training.x[:1], spec.epochs)
        return course.run(student, spec.model_copy(update={"epochs": epochs}), started)


def reestimate_batch_norm(module: nn.Module, x: np.ndarray) -> None:
    """Replace every BatchNorm's running statistics by their average over `x`, in place.

    `x` has shape `(n, ...)`, float32. Cumulative average over equal batches, the rest of
    the module in evaluation mode (no dropout). A module without BatchNorm is left alone.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    layers = [layer for layer in layers if layer.track_running_stats]
    if not layers or len(x) < 2:
        return
    flags = {m: m.training for m in module.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    module.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        with torch.no_grad():
            for batch in _batches(np.arange(len(x)), _BATCH):
                module(_tensor(x[batch]))
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for member, training in flags.items():
            member.training = training


def passes(student: nn.Module, teacher: nn.Module, x: np.ndarray, epochs: int) -> int:
    """How often the student goes over the data in what `epochs` would cost at the teacher's size.

    By multiply-accumulates on `x`, one sample with its batch axis; `MOST_PASSES` bounds it, and
    it is never fewer than `epochs`.
    """
    saved = count_macs(teacher, x) / max(count_macs(student, x), 1)
    return round(epochs * min(max(saved, 1.0), MOST_PASSES))


def count_macs(module: nn.Module, x: np.ndarray) -> int:
    """Multiply-accumulates of the convolutions and linear layers on `x`, `(n, ...)` float32."""
    found = []

    def note(
        layer: nn.Linear | nn.modules.conv._ConvNd,
        inputs: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> None:
        values = inputs[0] if getattr(layer, "transposed", False) else output
        found.append(values.numel() * layer.weight[0].numel())

    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        logits(module, x)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found)


def hold_back(n_samples: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training samples to train on, and of those that judge every epoch.

    A tenth is held back, at most 256; none where that would be fewer than 32, on which one
    sample is 3 points of accuracy. Same number and seed, same parts, both shuffled.
    """
    order = np.random.default_rng(seed).permutation(n_samples)
    fewest, most = _VALIDATION_SAMPLES
    held_back = min(most, int(n_samples * _VALIDATION_FRACTION))
    if held_back < fewest:
        held_back = 0
    return order[held_back:], order[:held_back]


def logits(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """The module's outputs over `x` in evaluation mode, float32 of shape `(n, classes)`."""
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            parts = [module(_tensor(x[b])) for b in _batches(np.arange(len(x)), _BATCH)]
    finally:
        module.train(was_training)
    return torch.cat(parts).float().numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """The data of one recovery: indices for training and validation, soft targets, order."""

    data: LabelledData
    soft: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    rng: np.random.Generator

    @classmethod
    def plan(cls, data: LabelledData, soft: np.ndarray, *, seed: int) -> _Course:
        train, validation = hold_back(len(data.x), seed=seed)
        rng = np.random.default_rng((seed, 1))
        return cls(data=data, soft=soft, train=train, validation=validation, rng=rng)

    def run(self, student: nn.Module, spec: RecoverySpec, started: float) -> RecoveryReport:
        before = self._validate(student, spec)
        best_loss, best_accuracy, kept = before[0], before[1], 0
        best_state = copy.deepcopy(student.state_dict())
        loss: float | None = None
        epoch = 0
        stopped = "complete" if spec.epochs else "no_epochs"
        steps = _Steps.prepare(student, spec, len(self.train))
        with _training_layout(student):
            for epoch in range(1, spec.epochs + 1):
                loss = self._epoch(student, spec, steps)
                now, accuracy = self._validate(student, spec)
                if math.isfinite(loss) and (now < best_loss or not len(self.validation)):
                    best_loss, best_accuracy, kept = now, accuracy, epoch
                    best_state = copy.deepcopy(student.state_dict())
                if not math.isfinite(loss):
                    stopped = "diverged"
                    break
                patient_from = max(kept, math.ceil(_PATIENT_FROM * spec.epochs))
                if epoch - patient_from >= spec.patience and epoch < spec.epochs:
                    stopped = "patience"
                    break
        student.load_state_dict(best_state)
        return RecoveryReport(
            epochs=epoch,
            kept_epoch=kept,
            wall_s=time.monotonic() - started,
            final_loss=loss if loss is not None and math.isfinite(loss) else None,
            stopped_because=_STOPPED[stopped].format(epochs=epoch, patience=spec.patience),
            samples=len(self.train),
            validation_samples=len(self.validation),
            teacher_accuracy=self._accuracy(self.soft[self.validation]),
            reestimated_accuracy=before[1],
            recovered_accuracy=best_accuracy,
        )

    def _epoch(self, student: nn.Module, spec: RecoverySpec, steps: _Steps) -> float:
        student.train()
        total = torch.zeros(())
        for batch in _batches(self.rng.permutation(self.train), spec.batch_size):
            loss = self._loss(student(_tensor(self.data.x[batch])), batch, spec.temperature)
            steps.take(loss)
            total += loss.detach() * len(batch)
        return float(total) / len(self.train)

    def _loss(self, output: torch.Tensor, batch: np.ndarray, temperature: float) -> torch.Tensor:
        soft = torch.from_numpy(self.soft[batch])
        if soft.shape != output.shape:
            raise CompressionError(
                f"the student answers with shape {tuple(output.shape)}, the teacher with "
                f"{tuple(soft.shape)}"
            )
        labels = torch.from_numpy(self.data.y[batch])
        # Hinton et al. 2015, section 2: soft gradients shrink by 1/T^2, so T^2 scales them back.
        divergence = functional.kl_div(
            functional.log_softmax(output / temperature, dim=1),
            functional.log_softmax(soft / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        hard = functional.cross_entropy(output, labels)
        return _SOFT_WEIGHT * temperature**2 * divergence + (1.0 - _SOFT_WEIGHT) * hard

    def _validate(self, student: nn.Module, spec: RecoverySpec) -> tuple[float, float | None]:
        """Loss and accuracy over the validation part; infinite loss where there is none."""
        if not len(self.validation):
            return math.inf, None
        output = logits(student, self.data.x[self.validation])
        loss = self._loss(torch.from_numpy(output), self.validation, spec.temperature)
        return float(loss), self._accuracy(output)

    def _accuracy(self, output: np.ndarray) -> float | None:
        if not len(output):
            return None
        return float((output.argmax(axis=1) == self.data.y[self.validation]).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """Optimizer and schedule of one recovery."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    @classmethod
    def prepare(cls, student: nn.Module, spec: RecoverySpec, samples: int) -> _Steps:
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(
            student.parameters(),
            lr=spec.learning_rate,
            momentum=_MOMENTUM,
            weight_decay=_WEIGHT_DECAY,
            nesterov=True,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=spec.learning_rate,
            total_steps=max(2, spec.epochs * _count_batches(samples, spec.batch_size)),
            pct_start=_WARM_UP_FRACTION,
            cycle_momentum=False,
        )
        return cls(optimizer=optimizer, schedule=schedule)

    def take(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()


@contextmanager
def torch_settings(*, seed: int, threads: int) -> Iterator[None]:
    """Seed and threads of torch inside the block; its random state is restored after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _training_layout(student: nn.Module) -> Iterator[None]:
    """Weights channels-last (twice as fast for depthwise convolutions), BatchNorm awake."""
    layers = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = {layer: layer.momentum for layer in layers}
    for layer in layers:
        if layer.momentum is not None:
            layer.momentum = max(layer.momentum, _MIN_BN_MOMENTUM)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        student.eval()
        student.zero_grad(set_to_none=True)
        for layer, momentum in momenta.items():
            layer.momentum = momentum


def _tensor(x: np.ndarray) -> torch.Tensor:
    """A batch for torch; indexing has already copied it out of a read-only array."""
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _count_batches(samples: int, batch_size: int) -> int:
    return max(1, min(math.ceil(samples / batch_size), samples // 2))


def _batches(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of nearly equal size, never of one sample: BatchNorm cannot train on one."""
    return np.array_split(indices, _count_batches(len(indices), batch_size))
