"""Torchvision models with random weights that benchmarks compress: exported once and kept.

Nothing is downloaded. Weights come from a fixed seed; what torchvision initializes to a value
that switches parts of a model off (a classifier of zeros, layer scales of 1e-6, BatchNorm
statistics that fit no layer) gets live values, so that every layer counts in the output.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx

from tests.benchmarks.harness import CACHE

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "squeezenet1_1",
    "densenet121",
    "vit_b_16",
)
_SEED = 0
_STATISTICS_IMAGES = 8
_LAYER_SCALE = 0.2


def fp32_model(name: str, size: int) -> Path:
    """The FP32 ONNX file of a model for square images; exported where it is not kept yet."""
    path = CACHE / "onnx" / f"{name}_{size}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(_exported(name, size).SerializeToString(deterministic=True))
        part.replace(path)
    return path


def images(n: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Smooth random images, `(n, 3, size, size)`: neighbouring pixels agree, as in pictures."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((n, 3, size // 8, size // 8), dtype=np.float32)
    fine = rng.standard_normal((n, 3, size, size), dtype=np.float32)
    return coarse.repeat(8, axis=2).repeat(8, axis=3) + 0.2 * fine


def _exported(name: str, size: int) -> onnx.ModelProto:
    import torch

    from autotune.compression.recovery import reestimate_batch_norm
    from autotune.compression.source import export_module
    from autotune.compression.torchvision_repair import import_torchvision

    options = {"image_size": size} if name.startswith("vit") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        module = import_torchvision().models.get_model(name, weights=None, **options)
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if key.endswith("layer_scale"):
                    parameter.fill_(_LAYER_SCALE)
                elif parameter.ndim == 2 and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    if any(isinstance(layer, torch.nn.BatchNorm2d) for layer in module.modules()):
        reestimate_batch_norm(module, images(_STATISTICS_IMAGES, size, seed=_SEED))
    return export_module(module.eval(), (3, size, size))
