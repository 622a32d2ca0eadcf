"""Sensitivity: what one group's precision does to the outputs while all others stay FP32.

Owns the measurement; what follows from it for the next candidate is `autotune.search`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autotune.compression.accuracy import AccuracyEvaluator
from autotune.compression.compressor import Compressor
from search_spaces import Candidate, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The damage of one choice alone, on `n_samples` samples; smaller is better.

    `mean_kl` is in nats against FP32's outputs; `drop` is the loss of top-1 as a fraction
    (negative: better than FP32).
    """

    group: str
    precision: str
    mean_kl: float
    drop: float
    n_samples: int

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Sensitivity:
        """The entry that `to_json` wrote."""
        return cls(**document)


def measure_sensitivity(
    compressor: Compressor,
    evaluator: AccuracyEvaluator,
    choices: Iterable[tuple[str, Precision]],
) -> list[Sensitivity]:
    """One entry per (group, precision): an artifact that is FP32 but for that group.

    Raises:
        CompressionError: a group does not exist or cannot take the precision.
    """
    return [_measure(compressor, evaluator, group, precision) for group, precision in choices]


def _measure(
    compressor: Compressor, evaluator: AccuracyEvaluator, group: str, precision: Precision
) -> Sensitivity:
    report = evaluator.evaluate(compressor.emit(Candidate(precisions={group: precision})))
    return Sensitivity(
        group=group,
        precision=precision.name,
        mean_kl=report.mean_kl,
        drop=report.drop,
        n_samples=report.n_samples,
    )
