"""What a base's FP32 graph and its calibration samples give to every 8-bit candidate of it.

Owns the order (statistics, stretched channels, rounded weights) and the proof: uniform INT8
runs on the calibration samples as all that made it, and as plain ranges and nearest codes make
it; what diverges less from FP32 is kept. It is done once per base; emitting a candidate only
reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx

from autotune.compression.accuracy import (
    LARGEST_DIVERGENCE,
    log_probabilities,
    mean_kl_divergence,
)
from autotune.compression.calibration import Calibration, calibrate
from autotune.compression.equalization import Equalization
from autotune.compression.graph import GraphView, model_bytes
from autotune.compression.inventory import precisions_of
from autotune.compression.kernels import REDUCED_RANGE, X86
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.rounding import Rounding, round_weights
from autotune.compression.session import Session
from autotune.errors import CompressionError
from search_spaces import INT8

POST_TRAINING_VERSION = 8
# Version 8 (2026-11-22): a swish's gate is multiplied with the excite's first: ranges as before.
# Version 7 (2026-11-22): sums of a residual stream are not rounded: ranges are as they were, the
# divergence of uniform INT8 is not.
# Version 6 (2026-11-22): least divergence is a range of as many bins as codes at least, and some
# tensors take it; before, it was a range of two bins, which none took.
# Version 5 (2026-11-21): the ranges of a residual stream share its factors at the least cost;
# rounded weights have steps of their own.
# Version 4 (2026-11-21): channels are stretched through a HardSwish; weights are rounded for it.
# Version 3 (2026-11-21): ranges around a HardSwish end lower.
# Version 2 (2026-11-21): what a Relu behind a residual Add swallows is not in the ranges.
# Version 1 (2026-11-21): histograms, stretched channels, second-order rounding, corrected biases.


@dataclass(frozen=True, slots=True, kw_only=True)
class PostTraining:
    """Ranges and rounded weights, and uniform INT8's divergence that decided for them.

    `mean_kl` is what is kept, `plain_kl` that of least-to-largest ranges and nearest codes;
    both in nats, over the calibration samples. Where the latter is smaller, it is kept.
    """

    calibration: Calibration
    rounding: Rounding
    mean_kl: float
    plain_kl: float


def post_training(model: onnx.ModelProto, samples: np.ndarray, *, threads: int = 1) -> PostTraining:
    """Calibrate and round a base's graph.

    Raises:
        CompressionError: there are no samples, or a tensor becomes NaN or infinite on them.
    """
    calibration = calibrate(model, samples, threads=threads)
    view = GraphView(model)
    stretched = Equalization(view, calibration).whole
    rounding = round_weights(view, samples, stretched, threads=threads)
    plain = replace(calibration.min_max(), channels={})
    file = model_bytes(model)
    outputs = _outputs(file, samples, threads)
    if not np.isfinite(outputs).all():
        raise CompressionError(
            "the model's output becomes NaN or infinite on the calibration samples; check the "
            "model's weights and the data"
        )
    fp32 = log_probabilities(outputs)
    full_kl, plain_kl = (
        _divergence(QuantizableGraph(file, held, rounding=rounded), fp32, samples, threads)
        for held, rounded in ((calibration, rounding), (plain, Rounding()))
    )
    if plain_kl < full_kl:
        return PostTraining(
            calibration=plain, rounding=Rounding(), mean_kl=plain_kl, plain_kl=plain_kl
        )
    return PostTraining(
        calibration=calibration, rounding=rounding, mean_kl=full_kl, plain_kl=plain_kl
    )


def reduced_rounding(
    model: bytes, calibration: Calibration, samples: np.ndarray, *, threads: int = 1
) -> Rounding:
    """A base's weights rounded for kernels whose codes end at `REDUCED_RANGE`.

    Nothing where uniform INT8 diverges less from FP32 with the nearest codes.
    """
    view = GraphView(onnx.load_model_from_string(model))
    stretched = Equalization(view, calibration).whole
    rounding = round_weights(view, samples, stretched, threads=threads, largest_code=REDUCED_RANGE)
    fp32 = log_probabilities(_outputs(model, samples, threads))
    rounded_kl, nearest_kl = (
        _divergence(
            QuantizableGraph(model, calibration, kernels=X86, rounding=held), fp32, samples, threads
        )
        for held in (Rounding(reduced=rounding), Rounding())
    )
    return rounding if rounded_kl <= nearest_kl else Rounding()


def _divergence(
    graph: QuantizableGraph, fp32: np.ndarray, samples: np.ndarray, threads: int
) -> float:
    """Uniform INT8's mean divergence from FP32, in nats; the largest where it gives no numbers."""
    possible = [name for name, unit in graph.units.items() if INT8 in precisions_of(unit)]
    artifact = graph.emit(dict.fromkeys(possible, INT8))
    outputs = _outputs(artifact, samples, threads)
    if not np.isfinite(outputs).all():
        return LARGEST_DIVERGENCE
    return mean_kl_divergence(fp32, log_probabilities(outputs))


def _outputs(model: bytes, x: np.ndarray, threads: int) -> np.ndarray:
    return Session(model, threads=threads, what="uniform INT8").answers(x)
