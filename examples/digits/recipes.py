"""The recipes of the demo: how its images are made and how its models are trained.

Owns figures only and imports no torch, so that a cached demo is recognized at once. A change
here makes the files again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecipe:
    """How the images are made; shifts in pixels of the 64x64 image, noise as its spread.

    Pixels lie in [-1, 1] before contrast (a factor from `contrast`) and noise. The noise was
    chosen so that mobilenet_v2 and resnet18 reach about 95 % in FP32.
    """

    size: int = 64
    evaluation_originals: int = 1000
    variants: int = 3
    max_shift: float = 6.0
    contrast: tuple[float, float] = (0.6, 1.2)
    coarse_noise: float = 0.35
    fine_noise: float = 0.5
    seed: int = 2026


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """SGD with Nesterov momentum on a one-cycle schedule whose peak is `learning_rate`."""

    model: str
    epochs: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    seed: int = 2026


RECIPES = {
    "mobilenet_v2": TrainingRecipe(model="mobilenet_v2", epochs=6, learning_rate=0.05),
    "resnet18": TrainingRecipe(model="resnet18", epochs=3, learning_rate=0.03),
}
