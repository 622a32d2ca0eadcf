"""Training of the demo's FP32 models from scratch, on every core.

Owns the training loop. A user brings a trained model of their own; this file only makes
the demo independent of any download.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from autotune.compression.torchvision_repair import import_torchvision
from examples.digits.images import Images
from examples.digits.recipes import RECIPES, TrainingRecipe

__all__ = ["CLASSES", "RECIPES", "accuracy", "train"]

CLASSES = 10


def train(
    recipe: TrainingRecipe,
    images: Images,
    *,
    threads: int,
    on_epoch: Callable[[int, float], None],
    batch_norm_momentum: float | None = None,
) -> nn.Module:
    """The trained model in evaluation mode; `on_epoch` gets the epochs done and their loss.

    `batch_norm_momentum` replaces the model's own: mobilenet_v3 has 0.01, whose statistics a
    short training does not fill.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    models = import_torchvision().models
    model: nn.Module = models.get_model(recipe.model, weights=None, num_classes=CLASSES)
    for layer in model.modules():
        if batch_norm_momentum is not None and isinstance(layer, nn.BatchNorm2d):
            layer.momentum = batch_norm_momentum
    # Channels-last halves the time of depthwise convolutions on a CPU.
    model = model.to(memory_format=torch.channels_last).train()
    rng = np.random.default_rng(recipe.seed)
    batches = len(images.y) // recipe.batch_size
    optimizer, schedule = _optimizer(recipe, model, steps=recipe.epochs * batches)
    for epoch in range(1, recipe.epochs + 1):
        order = np.array_split(rng.permutation(len(images.y)), batches)
        loss = sum(_step(recipe, model, images, batch, optimizer, schedule) for batch in order)
        on_epoch(epoch, loss / batches)
    return model.to(memory_format=torch.contiguous_format).eval()


def accuracy(model: nn.Module, images: Images) -> float:
    """Fraction of the images whose digit is told right."""
    right = 0
    with torch.inference_mode():
        for batch in np.array_split(np.arange(len(images.y)), max(1, len(images.y) // 100)):
            answers = model(_tensor(images.x[batch])).argmax(dim=1).numpy()
            right += int((answers == images.y[batch]).sum())
    return right / len(images.y)


def _optimizer(
    recipe: TrainingRecipe, model: nn.Module, *, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=steps,
        pct_start=0.25,
        cycle_momentum=False,
    )
    return optimizer, schedule


def _step(
    recipe: TrainingRecipe,
    model: nn.Module,
    images: Images,
    batch: np.ndarray,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    loss = functional.cross_entropy(
        model(_tensor(images.x[batch])),
        torch.from_numpy(images.y[batch]),
        label_smoothing=recipe.label_smoothing,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()
    return float(loss.detach())


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
