"""The demo's labelled images, made from scikit-learn's 1,797 real 8x8 digits.

Owns how they are made: resize, random shift and contrast, coarse and fine noise, three equal
channels, values around zero. Everything is drawn from one seed, so every machine gets the
same images. Training images and evaluation images come from different originals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from examples.digits.recipes import ImageRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images `x`, float32 `(n, 3, size, size)`, and their digits `y`, int64 `(n,)`."""

    x: np.ndarray
    y: np.ndarray


def make_images(recipe: ImageRecipe) -> tuple[Images, Images]:
    """Training images (`variants` of each original) and evaluation images (one of each)."""
    digits = load_digits()
    pixels = digits.images.astype(np.float32) / 8.0 - 1.0
    labels = digits.target.astype(np.int64)
    rng = np.random.default_rng(recipe.seed)
    order = rng.permutation(len(labels))
    evaluation = order[: recipe.evaluation_originals]
    training = np.tile(order[recipe.evaluation_originals :], recipe.variants)
    return (
        Images(x=_disturb(pixels[training], recipe, rng), y=labels[training]),
        Images(x=_disturb(pixels[evaluation], recipe, rng), y=labels[evaluation]),
    )


def _disturb(pixels: np.ndarray, recipe: ImageRecipe, rng: np.random.Generator) -> np.ndarray:
    n = len(pixels)
    images = _resize(pixels, recipe.size)
    images = _shift(images, rng.uniform(-recipe.max_shift, recipe.max_shift, (n, 2)))
    images *= rng.uniform(*recipe.contrast, (n, 1, 1)).astype(np.float32)
    coarse = rng.standard_normal((n, 8, 8), dtype=np.float32)
    images += recipe.coarse_noise * _resize(coarse, recipe.size)
    images += recipe.fine_noise * rng.standard_normal(images.shape, dtype=np.float32)
    return np.repeat(images[:, None], 3, axis=1)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    batch = torch.from_numpy(images)[:, None]
    resized = functional.interpolate(batch, size=(size, size), mode="bilinear")
    return resized[:, 0].numpy()


def _shift(images: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Each image moved by its `(x, y)` pixels; what comes in is background (-1)."""
    n, size = len(images), images.shape[-1]
    transform = torch.zeros(n, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = 1.0
    transform[:, :, 2] = torch.from_numpy(pixels.astype(np.float32) * (2.0 / size))
    grid = functional.affine_grid(transform, [n, 1, size, size], align_corners=False)
    above_background = torch.from_numpy(images + 1.0)[:, None]
    moved = functional.grid_sample(above_background, grid, align_corners=False)
    return (moved[:, 0] - 1.0).numpy()
