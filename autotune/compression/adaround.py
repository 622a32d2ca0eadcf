"""AdaRound: whether each weight of one candidate goes up or down, as an optimization finds best.

Nagel et al. 2020 (arXiv:2004.10568). Owns the optimization, layer by layer in graph order: each
layer reads what the layers before it make of their own rounded weights, and is held to FP32's
outputs behind its activation (equation 25). What second-order rounding (`rounding.py`) gives to
every candidate in one go, this improves for one, in minutes instead of seconds. A layer keeps its
codes where samples that nothing was learned from do not like the new ones better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autotune.compression.accuracy import log_probabilities, mean_kl_divergence
from autotune.compression.equalization import Stretched
from autotune.compression.layer_codes import needs_bias, offset_terms
from autotune.compression.operators import WeightedNode, clip_bounds
from autotune.compression.plan import Plan
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.recovery import torch_settings
from autotune.compression.rounding import (
    RoundedWeight,
    Rounding,
    as_rows,
    input_rows,
    int8_scales,
    per_input,
    takes_rounding,
    weight_like,
    weight_rows,
)
from autotune.compression.session import BATCH, Session
from autotune.compression.slices import FileGraph, needed_for
from autotune.compression.weight_only import output_axis
from autotune.compression.weights import INT8_MAX
from autotune.errors import CompressionError
from search_spaces import Precision

_ZETA, _GAMMA = 1.1, -0.1
"""How far the sigmoid is stretched beyond [0, 1] (equation 23; section 3.2 has these values)."""
_BETA_START, _BETA_END = 20.0, 2.0
"""The regularizer's exponent (equation 24): first only what is nearly decided feels it, in the
end everything. The range is that of the authors' AIMET."""
_WARM_UP = 0.2
"""The share of the steps before the regularizer sets in, as in AIMET."""
_WEIGHT_OF_REGULARIZER = 1.0
"""Of the mean over weights, beside an error in units of what the start loses."""
_REACH, _LARGEST_RATE = 5.0, 0.1
"""How far all steps together can carry a variable, and one at most: few steps are larger ones.
500 steps have the rate 0.01 at which `_TRUST` was measured."""
_TRUST = 0.8
"""How near second-order codes the variables begin: 0 would be on the exact step.

Measured on four layers of mobilenet_v2 trained on digits, 500 steps, second-order codes as the
start, error on other images as a fraction of the start's: from 0 1.10, 1.02, 1.01, 1.02; from
0.5 1.00, 0.99, 1.00, 1.00; from 0.8 0.98, 0.99, 0.99, 0.99 (exact weights: 0.95, 0.96, 0.98,
0.98, for the rest is what the activations' codes lose).
"""
_ROWS = 256
"""Positions per step."""
_POSITIONS, _ROWS_BYTES = 16384, 64 * 1024 * 1024
"""Positions learned from per layer, and the memory that they take at most."""
SAMPLES = 1024
"""Training samples learned from, where there are any (section 4 of the paper: as many images)."""
_JUDGES = 160
"""Samples that judge a layer: they give positions enough, where a mean divergence, which is made
of a few samples, needs as many as there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedRounding:
    """The rounding of one candidate and what it brought.

    `improved` of `n_layers` layers have new codes. `mean_kl` and `earlier_kl` are the
    divergence from FP32 with them and without, in nats over `n_judged` samples that nothing
    was learned from.
    """

    rounding: Rounding
    improved: tuple[str, ...]
    n_layers: int
    iterations: int
    n_judged: int
    mean_kl: float
    earlier_kl: float
    wall_s: float

    @property
    def is_better(self) -> bool:
        """The candidate diverges less from FP32 than with the codes that it had."""
        return self.mean_kl < self.earlier_kl

    def to_json(self) -> dict[str, Any]:
        """All but the codes, for a trial's `compression`."""
        return {
            "method": "adaround",
            "layers_improved": len(self.improved),
            "layers": self.n_layers,
            "iterations": self.iterations,
            "mean_kl": self.mean_kl,
            "earlier_kl": self.earlier_kl,
            "judged_samples": self.n_judged,
            "wall_s": self.wall_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What one layer multiplies, float32 `(positions, groups, inputs)`, at the same positions.

    `exact` is FP32's, `coded` what the candidate's earlier layers make of it.
    """

    exact: np.ndarray
    coded: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTask:
    """One layer's rounding as a problem of its own.

    `steps` are its weights in units of `scale`, `(groups, outputs, inputs)`; `offset` its bias
    `(groups, outputs)`; `low` and `high` bound its outputs (a Relu's are 0 and infinity).
    `corrects`: the layer has a bias, which takes up the outputs' mean error.
    """

    steps: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    low: float = -math.inf
    high: float = math.inf
    corrects: bool = True

    def target(self, rows: Rows) -> np.ndarray:
        """FP32's outputs behind the activation, `(positions, groups, outputs)`."""
        return self._outputs(rows.exact, self.steps, 0.0)

    def error(self, codes: np.ndarray, mean_error: np.ndarray, rows: Rows) -> float:
        """Mean square of what the codes change behind the activation; smaller is better."""
        made = self._outputs(rows.coded, codes, mean_error)
        return float(np.square(made - self.target(rows)).mean())

    def mean_error(self, codes: np.ndarray, rows: Rows) -> np.ndarray:
        """What the outputs are too large by on average, `(groups, outputs)`."""
        if not self.corrects:
            return np.zeros(self.offset.shape)
        made = np.einsum("gi,goi->go", rows.coded.mean(axis=0, dtype=np.float64), codes)
        exact = np.einsum("gi,goi->go", rows.exact.mean(axis=0, dtype=np.float64), self.steps)
        return np.asarray((made - exact) * self.scale)

    def _outputs(self, rows: np.ndarray, codes: np.ndarray, less: np.ndarray | float) -> np.ndarray:
        weight = (codes * self.scale[..., None]).astype(np.float32)
        made = rows.transpose(1, 0, 2) @ weight.transpose(0, 2, 1)
        shifted = made.transpose(1, 0, 2) + (self.offset - less).astype(np.float32)
        return np.asarray(np.clip(shifted, self.low, self.high))


def adaround(
    graph: QuantizableGraph,
    precisions: Mapping[str, Precision],
    samples: np.ndarray,
    *,
    judged_by: np.ndarray,
    iterations: int,
    threads: int = 1,
) -> LearnedRounding:
    """Learn the rounding of the 8-bit layers of the candidate with those precisions.

    `samples` are the calibration samples; `judged_by` are others, on which every layer's new
    codes must do better than its old ones. The same input gives the same codes.

    Raises:
        CompressionError: the candidate has no layer to learn, and why; it cannot be written, or
            a part of it does not run.
    """
    started = time.monotonic()
    plan = graph.plan(precisions)
    layers = [layer for layer in _in_graph_order(plan) if _is_learned(plan, layer)]
    if not layers:
        raise CompressionError(_why_none(plan))
    fp32 = FileGraph.read(graph.fp32)
    earlier = FileGraph.read(graph.emit(precisions))
    rounding, artifact = graph.rounding, earlier
    improved = []
    with torch_settings(seed=0, threads=threads):
        for layer in layers:
            there = next(node for node in artifact.nodes if node.name == layer.name).inputs[0]
            before = plan.stretched.get(layer.input)
            parts = samples, judged_by[:_JUDGES]
            exact = _rows(plan, layer, fp32, layer.input, parts, threads)
            coded = _rows(plan, layer, artifact, there, parts, threads)
            fit, held = (
                Rows(exact=_stretch(rows, before), coded=made)
                for rows, made in zip(exact, coded, strict=True)
            )
            found = _learn_layer(plan, layer, rounding, fit, held, iterations)
            if found is None:
                continue
            improved.append(layer.name)
            rounding = rounding.with_layer(layer.name, found, stretched=before is not None)
            artifact = FileGraph.read(graph.emit(precisions, rounding=rounding))
    truth, was, now = (
        log_probabilities(np.concatenate(list(_values(file, file.output, threads)(judged_by))))
        for file in (fp32, earlier, artifact)
    )
    return LearnedRounding(
        rounding=rounding,
        improved=tuple(improved),
        n_layers=len(layers),
        iterations=iterations,
        n_judged=len(judged_by),
        mean_kl=mean_kl_divergence(truth, now),
        earlier_kl=mean_kl_divergence(truth, was),
        wall_s=time.monotonic() - started,
    )


def learned_codes(
    task: LayerTask,
    start: np.ndarray,
    rows: Rows,
    *,
    iterations: int,
    trust: float = 0.0,
) -> np.ndarray:
    """Whole numbers near `task.steps`: for each weight a code of `start` or its neighbour.

    The neighbour is the one on the other side of the weight's exact step: with the nearest
    codes as a start the choice is the paper's floor or ceiling. The variables begin on the
    exact step as the paper's do, or nearer to the start: on it where `trust` is 1.
    """
    low = np.clip(start - (start > task.steps), -INT8_MAX, INT8_MAX - 1)
    begin = (1 - trust) * (task.steps - low) + trust * (start - low)
    fraction = torch.from_numpy(begin.clip(0.01, 0.99)).float()
    variables = ((fraction - _GAMMA) / (_ZETA - _GAMMA)).logit().requires_grad_(True)
    base = torch.from_numpy(low).float()
    scale = torch.from_numpy(task.scale).float()[..., None]
    mean_error = task.mean_error(start, rows)
    unit = task.error(start, mean_error, rows) or 1.0
    offset = torch.from_numpy(task.offset - mean_error).float()
    inputs, target = torch.from_numpy(rows.coded), torch.from_numpy(task.target(rows))
    optimizer = torch.optim.Adam([variables], lr=min(_LARGEST_RATE, _REACH / iterations))
    chosen = np.random.default_rng(0)
    for step in range(iterations):
        picked = torch.from_numpy(chosen.integers(0, len(inputs), min(_ROWS, len(inputs))))
        up = _rectified(variables)
        weight = (base + up) * scale
        made = torch.einsum("ngi,goi->ngo", inputs[picked], weight) + offset
        loss = (made.clamp(task.low, task.high) - target[picked]).square().mean() / unit
        progress = (step / iterations - _WARM_UP) / (1 - _WARM_UP)
        if progress >= 0:
            beta = _BETA_END + (_BETA_START - _BETA_END) * (1 - progress)
            undecided = 1 - (2 * up - 1).abs().pow(beta)
            loss = loss + _WEIGHT_OF_REGULARIZER * undecided.mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return np.asarray(low + (_rectified(variables.detach()) >= 0.5).double().numpy())


def _rectified(variables: torch.Tensor) -> torch.Tensor:
    """Equation 23: the rectified sigmoid."""
    return (variables.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)


def _learn_layer(
    plan: Plan, layer: WeightedNode, rounding: Rounding, fit: Rows, held: Rows, iterations: int
) -> RoundedWeight | None:
    """New codes for the layer; None where held-back positions like the old ones as well."""
    known = rounding.of(layer.name, stretched=layer.input in plan.stretched)
    task = _task(plan, layer, known)
    if known is None:
        start, start_error = np.rint(task.steps), np.zeros(task.offset.shape)
        trust = 0.0
    else:
        start = as_rows(known.codes, layer).astype(np.float64)
        start_error = known.mean_error.reshape(task.offset.shape) * task.corrects
        trust = _TRUST
    codes = learned_codes(task, start, fit, iterations=iterations, trust=trust)
    mean_error = task.mean_error(codes, fit)
    if not task.error(codes, mean_error, held) < task.error(start, start_error, held):
        return None
    return RoundedWeight(
        codes=weight_like(plan.view, layer, codes).astype(np.int8),
        widening=_widening(known, task.scale.shape).reshape(-1),
        mean_error=mean_error.reshape(-1).astype(np.float32),
    )


def _widening(known: RoundedWeight | None, shape: tuple[int, ...]) -> np.ndarray:
    """The steps stay those that the weights were rounded in before."""
    return np.ones(shape, np.float32) if known is None else known.widening.reshape(shape)


def _task(plan: Plan, layer: WeightedNode, known: RoundedWeight | None) -> LayerTask:
    view, before = plan.view, plan.stretched.get(layer.input)
    weights = weight_rows(view, layer, before)
    narrowest = int8_scales(weights)
    scale = (narrowest * _widening(known, narrowest.shape)).astype(np.float64)
    own = np.zeros(weights.shape[0] * weights.shape[1])
    if layer.bias is not None:
        own = own + view.array(layer.bias)
    own = own + offset_terms(layer, view.array(layer.weight), output_axis(layer), before, None)
    taker = view.only_consumer(layer.biased_output) if layer.bias_add is None else None
    low, high = (taker is not None and clip_bounds(view, taker)) or (-math.inf, math.inf)
    return LayerTask(
        steps=weights / scale[..., None],
        scale=scale,
        offset=own.reshape(scale.shape),
        low=low,
        high=high,
        corrects=needs_bias(layer, before, plan.stretched.get(layer.output)),
    )


def _in_graph_order(plan: Plan) -> list[WeightedNode]:
    return [plan.layers[node.name] for node in plan.view.nodes if node.name in plan.layers]


def _is_learned(plan: Plan, layer: WeightedNode) -> bool:
    """It has 8-bit weights with a scale per output channel and all their codes."""
    precision = plan.chosen.get(layer.name)
    return (
        precision is not None
        and precision.weight_bits == 8
        and not precision.is_weight_only
        and precision.granularity is None
        and (not precision.is_int8 or plan.kernels.largest_weight_code == INT8_MAX)
        and takes_rounding(layer)
    )


def _why_none(plan: Plan) -> str:
    """What keeps every layer from being learned, and what to do."""
    largest = plan.kernels.largest_weight_code
    if largest < INT8_MAX and any(precision.is_int8 for precision in plan.chosen.values()):
        return (
            f"AdaRound can round no layer: 8-bit kernels of a {plan.kernels.name!r} processor take "
            f"weight codes up to {largest}, and it rounds for codes up to {INT8_MAX} alone; leave "
            "rounding.adaround out for this device"
        )
    return (
        "AdaRound can round no layer: it takes those with 8-bit weights and quantized activations, "
        "a scale per output channel, and explicit padding; leave rounding.adaround out, or offer "
        "w8a8"
    )


def _rows(
    plan: Plan,
    layer: WeightedNode,
    file: FileGraph,
    tensor: str,
    parts: Sequence[np.ndarray],
    threads: int,
) -> list[np.ndarray]:
    """What the layer multiplies in that file, of each part; the same positions in every file."""
    values = _values(file, tensor, threads)
    groups, _, inputs = as_rows(plan.view.array(layer.weight), layer).shape
    positions = min(_POSITIONS, _ROWS_BYTES // (4 * groups * inputs))
    found = []
    for x in parts:
        rng = np.random.default_rng(0)
        rows = [
            input_rows(plan.view, layer, value, rng, n_samples=len(x), positions=positions)
            for value in values(x)
        ]
        found.append(np.concatenate(rows))
    return found


def _stretch(rows: np.ndarray, read: Stretched | None) -> np.ndarray:
    """The rows as the candidate's codes stand for them."""
    if read is None:
        return rows
    factors, offsets = per_input(read, (rows.shape[1], 0, rows.shape[2]))
    return np.asarray(((rows - offsets) * factors).astype(np.float32))


def _values(
    file: FileGraph, tensor: str, threads: int
) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
    """The tensor of the file for samples, some at a time; only what it needs is run."""

    def batches(x: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(x), BATCH):
            yield np.ascontiguousarray(x[start : start + BATCH], dtype=np.float32)

    if tensor == file.input:
        return batches
    nodes, _ = needed_for(file.nodes, [tensor])
    session: Session | None = None

    def run(x: np.ndarray) -> Iterator[np.ndarray]:
        nonlocal session
        for batch in batches(x):
            if session is None:
                inputs = {file.input: batch}
                piece = file.model(nodes, inputs=inputs, outputs=[tensor], batch=len(batch))
                session = Session(piece, threads=threads, what="a part of the model")
            (value,) = session.run({file.input: batch}, [tensor])
            yield value

    return run
