"""One trial on each of a job's several devices."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.api_types import JobTarget, TrialOnTarget
from autotune.cli import figures
from autotune.cli.output import Column, Field, View


def targets_view(targets: Sequence[JobTarget]) -> View[TrialOnTarget]:
    """The view of a job on these devices."""
    names = {target.device_id: target.device_name for target in targets}

    def device(there: TrialOnTarget) -> str:
        return names.get(there.device_id, there.device_id)

    def outcome(there: TrialOnTarget) -> str:
        known = there.outcome or figures.MISSING
        return f"{known}: {there.reason}" if there.reason else known

    return View(
        columns=[
            Column(title="on", text=device),
            Column(title="outcome", text=outcome),
            Column(
                title="lost points [95 %]",
                text=lambda t: figures.percent(t.held_out_accuracy_drop or t.accuracy_drop),
                right=True,
            ),
            Column(
                title="p50 ms [95 %]",
                text=lambda t: figures.milliseconds(t.confirmed_latency_ns or t.latency_ns),
                right=True,
            ),
            Column(
                title="x FP32 [95 %]",
                text=lambda t: figures.interval(t.confirmed_fp32_ratio or t.fp32_ratio),
                right=True,
            ),
            Column(
                title="in budget",
                text=lambda t: {None: figures.MISSING, True: "yes", False: "no"}[t.is_feasible],
            ),
            Column(title="kernels", text=lambda t: t.kernels or figures.MISSING),
        ],
        fields=[Field(name="device", value=device)],
        document=lambda there: there.model_dump(mode="json"),
    )
