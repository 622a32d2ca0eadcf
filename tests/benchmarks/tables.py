"""The measured tables that the search benchmark replays: what a file holds, read and written.

A table has every combination of the choices of ten groups of one model: replicates of each
point's latency ratio, and which images each point gets right. `search_tables.py` measures them,
`oracles.py` replays them.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

TABLE_VERSION = 2
# Version 1 (2026-11-21): ratios by point, images by point, kernel times of the uniform files.
# Version 2 (2026-11-21): margins by point.

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One model's points, in the order of `itertools.product` over the columns' options.

    Attributes:
        options: per group the names of its choices; the first leaves it in FP32.
        ratios: replicates of latency over FP32's, all points' in one row, in order of points.
        counts: replicates per point, `(n_points,)`.
        right: `(n_points, n_images)`; the first point is FP32.
        margins: by how much the label's log-probability exceeds the largest other one's, in nats,
            like `right`; positive exactly where that is true. Apart from FP32's a tenth of a nat
            off where shifts are small, half of one where they are large.
        kl: mean KL divergence from FP32's answers in nats, `(n_points,)`.
        nll: mean negative log-likelihood of the labels in nats, `(n_points,)`.
        early_kl: `kl` on the first `conditions["early_images"]` images alone.
        kernel_ns: per uniform file its kernels' time in each group, `(n_options, n_groups)`; NaN
            where a uniform file is no point of the table.
        tensor_bytes: of the float tensor that leads on from each group, `(n_groups - 1,)`.
        conditions: machine, versions, when and how it was measured.
    """

    name: str
    options: tuple[tuple[str, ...], ...]
    ratios: np.ndarray
    counts: np.ndarray
    right: np.ndarray
    margins: np.ndarray
    kl: np.ndarray
    nll: np.ndarray
    early_kl: np.ndarray
    kernel_ns: np.ndarray
    tensor_bytes: np.ndarray
    conditions: dict[str, Any]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per group."""
        return tuple(len(names) for names in self.options)

    @cached_property
    def points(self) -> np.ndarray:
        """`(n_points, n_groups)`."""
        return np.array(list(itertools.product(*(range(size) for size in self.sizes))))

    @cached_property
    def replicates(self) -> list[np.ndarray]:
        """Each point's own ratios."""
        return np.split(self.ratios, np.cumsum(self.counts)[:-1])

    @cached_property
    def latency(self) -> np.ndarray:
        """The geometric mean of each point's replicates, `(n_points,)`; FP32 is 1 by definition."""
        found = np.array([np.exp(np.log(own).mean()) for own in self.replicates])
        found[0] = 1.0
        return found

    @cached_property
    def drop(self) -> np.ndarray:
        """Accuracy lost against FP32, a fraction; below 0 where a point happens to be better."""
        found: np.ndarray = self.right[0].mean() - self.right.mean(axis=1)
        return found

    def index(self, points: np.ndarray) -> np.ndarray:
        """Where points `(n, n_groups)` stand, `(n,)`."""
        found: np.ndarray = np.ravel_multi_index(tuple(points.T), self.sizes)
        return found

    def save(self, folder: Path = FOLDER) -> Path:
        """Write it; some 100 kB."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.npz"
        about = {
            "version": TABLE_VERSION,
            "name": self.name,
            "options": self.options,
            "n_images": self.right.shape[1],
            "conditions": self.conditions,
        }
        np.savez_compressed(
            path,
            about=json.dumps(about),
            ratios=self.ratios.astype(np.float32),
            counts=self.counts.astype(np.uint16),
            # Nearly all points agree with FP32 on nearly all images: the differences are few.
            differs=np.packbits(self.right ^ self.right[0], axis=1),
            fp32_right=np.packbits(self.right[0]),
            fp32_margins=self.margins[0].astype(np.float32),
            shifts=_packed(self.margins - self.margins[0]),
            kl=self.kl.astype(np.float32),
            nll=self.nll.astype(np.float32),
            early_kl=self.early_kl.astype(np.float32),
            kernel_ns=self.kernel_ns,
            tensor_bytes=self.tensor_bytes,
        )
        return path

    @classmethod
    def load(cls, name: str, folder: Path = FOLDER) -> Table:
        """The table of that name.

        Raises:
            ValueError: its version is not this one's.
        """
        with np.load(folder / f"{name}.npz") as held:
            about = json.loads(str(held["about"]))
            if about["version"] != TABLE_VERSION:
                raise ValueError(
                    f"table {name} has version {about['version']}; this reads {TABLE_VERSION}: "
                    f"measure it anew with `python -m tests.benchmarks.search_tables {name}`"
                )
            n = about["n_images"]
            fp32_right = np.unpackbits(held["fp32_right"], count=n).astype(bool)
            differs = np.unpackbits(held["differs"], axis=1, count=n).astype(bool)
            return cls(
                name=about["name"],
                options=tuple(tuple(names) for names in about["options"]),
                ratios=held["ratios"].astype(float),
                counts=held["counts"].astype(int),
                right=differs ^ fp32_right,
                margins=_on_side(
                    held["fp32_margins"] + _unpacked(held["shifts"]), differs ^ fp32_right
                ),
                kl=held["kl"].astype(float),
                nll=held["nll"].astype(float),
                early_kl=held["early_kl"].astype(float),
                kernel_ns=held["kernel_ns"],
                tensor_bytes=held["tensor_bytes"],
                conditions=about["conditions"],
            )


_LARGEST_SHIFT, _SHIFT_LEVELS = 30.0, 63
"""Shifts are kept as one byte each, square roots, so that small ones are finer: other bytes than
these make a table several times as large."""


def _packed(shifts: np.ndarray) -> np.ndarray:
    roots = np.sign(shifts) * np.sqrt(np.minimum(np.abs(shifts) / _LARGEST_SHIFT, 1.0))
    found: np.ndarray = np.round(_SHIFT_LEVELS * roots).astype(np.int8)
    return found


def _unpacked(packed: np.ndarray) -> np.ndarray:
    roots = packed.astype(float) / _SHIFT_LEVELS
    found: np.ndarray = np.sign(roots) * roots**2 * _LARGEST_SHIFT
    return found


def _on_side(margins: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Margins positive where right and only there, whatever packing did to those close to 0."""
    found: np.ndarray = np.where(right, np.maximum(margins, 1e-6), np.minimum(margins, 0.0))
    return found


def distance_to_front(latency: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """How much faster each point would have to be to join the front, a fraction, `(n,)`; 0 on it.

    The front is that of the points themselves; drops below 0 count as 0.
    """
    drop = np.maximum(drop, 0.0)
    order = np.argsort(drop, kind="stable")
    found = np.empty(len(latency))
    for index in range(len(latency)):
        rivals = latency[order[: np.searchsorted(drop[order], drop[index], side="right")]]
        found[index] = 1 - rivals.min() / latency[index]
    return found
