"""A tiny real job: scikit-learn's digits at 16x16 and a small residual network.

Trains in a few seconds, once per test run, so that integration tests tune something real.
Named in job files as `python:tests.tiny:Residual`, which also exercises the consent to run
job code.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

SIDE = 16


class Residual(nn.Module):
    """Stem, one residual block with a downsampling sibling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.left = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.right = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.short = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2), nn.BatchNorm2d(32))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.right(self.left(x)) + self.short(x))
        return self.head(torch.flatten(self.pool(x), 1))


@cache
def _digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    raw = load_digits()
    rng = np.random.default_rng(0)
    images = np.kron(raw.images / 16.0, np.ones((SIDE // 8, SIDE // 8)))[:, None]
    noisy = images + rng.normal(0, 0.15, images.shape)
    return noisy.astype(np.float32), raw.target.astype(np.int64)


def arrays(split: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`training` (first 900 images) or `evaluation` (the other 897)."""
    x, y = _digits()
    return (x[:900], y[:900]) if split == "training" else (x[900:], y[900:])


@cache
def model() -> nn.Module:
    """The network, trained for a few epochs with a fixed seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Residual()
    x, y = (torch.from_numpy(a) for a in arrays("training"))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return network.eval()


def write_job(folder: Path, **changes: Any) -> Path:
    """The job file, its weights and its data beside it; `changes` replace top-level keys."""
    save_file(model().state_dict(), folder / "tiny.safetensors")
    for split in ("training", "evaluation"):
        x, y = arrays(split)
        np.savez(folder / f"{split}.npz", x=x, y=y)
    job: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"source": "python:tests.tiny:Residual", "weights": "tiny.safetensors"},
        "data": {"training": "npz:training.npz", "evaluation": "npz:evaluation.npz"},
        "latency_budget": "0.9x",
        "max_accuracy_drop": 0.05,
        "search": {"trials": 8, "prune_ratios": [0, 0.5]},
        "recovery": {"epochs": 2},
        "measurement": {"time_cap_s": 1.0, "confirmation_time_cap_s": 1.0},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**job, **changes}), encoding="utf-8")
    return path
