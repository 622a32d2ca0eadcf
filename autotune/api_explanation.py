"""The shapes of an explanation in the HTTP API: why a trial is what it is, group by group.

Owns the wire format; the figures are `autotune.search.explanation`'s. They are predictions of a
model that was fitted to the job's trials, and each says how sure it is. Latencies are
nanoseconds at batch 1; accuracies are fractions from 0 to 1.
"""

from __future__ import annotations

from typing import Literal

from autotune.api_types import Interval, ModelError, Shape

EXPLANATION_VERSION = 1
# Version 1 (2026-11-21): the model and its error, groups with their choices, pruning and runtime,
# why INT8 is slower where it is.


class Estimate(Interval):
    """What the fitted model says of a figure, with its 95 % interval.

    `measured_share` is how much of the variance that the figure had before any trial the trials
    took away: 0 is what was thought beforehand, near 1 is measured.
    """

    measured_share: float


class Choice(Shape):
    """One precision for a group while all others stay as the trial has them, against FP32 for it.

    `saved_ns` is latency, boundaries included: larger is better, negative is slower than FP32.
    `lost` is accuracy: smaller is better. `kl_nats` is the stored sensitivity of the choice
    alone, None where it is not known. `n_trials` counts the trials that had the choice.
    """

    precision: str
    is_chosen: bool
    saved_ns: Estimate
    lost: Estimate
    kl_nats: float | None = None
    is_kl_estimate: bool = False
    n_trials: int


class Edge(Shape):
    """A change of precision between the group and its neighbour in graph order; what it costs."""

    neighbour: str
    cost_ns: Estimate


class GroupExplanation(Shape):
    """Why a layer group has the precision that it has in the trial.

    `saved_ns` (against FP32 for the group alone) is `by_itself_ns`, what its own kernels save,
    less `boundary_ns`, what its boundaries cost more than they would with the group in FP32;
    below 0 the choice spares boundaries. `edges` are the boundaries as the trial has them.
    `effective` is None where the file was not built, or nobody saw what is executed (then
    `effective_reason` says why). `kernel_ns`, `fp32_kernel_ns` and `int8_kernel_ns` are what
    profiles measured: of the trial and of the uniform baselines; None without one. `choices`
    begins with FP32.
    """

    group: str
    planned: str
    effective: str | None = None
    effective_reason: str | None = None
    saved_ns: Estimate
    by_itself_ns: Estimate
    boundary_ns: Estimate
    lost: Estimate
    edges: list[Edge]
    kernel_ns: float | None = None
    fp32_kernel_ns: float | None = None
    int8_kernel_ns: float | None = None
    choices: list[Choice]
    why: str


class PartExplanation(Shape):
    """What a choice about the whole model does: its pruning, or the runtime it runs in."""

    part: Literal["pruning", "runtime"]
    chosen: str
    saved_ns: Estimate
    lost: Estimate


class Explanation(Shape):
    """A trial explained on one device.

    Of latency (`latency_ns`) and accuracy drop (`drop`) there is what the model predicts and
    what was measured, None where nothing was. `basis` says what the model knows, in words;
    `int8` why uniform INT8 is slower than FP32 on the device, or that it is not.
    """

    version: int = EXPLANATION_VERSION
    job_id: str
    device_id: str
    trial: str
    number: int
    fp32_latency_ns: float
    n_fitted: int
    basis: str
    model_error: ModelError | None = None
    latency_ns: Estimate
    measured_latency_ns: Interval | None = None
    drop: Estimate
    measured_drop: Interval | None = None
    groups: list[GroupExplanation]
    parts: list[PartExplanation]
    int8: str | None = None
