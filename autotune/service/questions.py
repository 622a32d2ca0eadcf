"""A question about a job that is asked now: its own limits with others in their place.

Owns how a question is read. What was measured answers it; nothing runs again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from autotune.errors import InvalidJob, JobNotReady
from autotune.limits import LatencyBudget, amounts
from device_agents.protocol import Quantile
from storage.records import JobRecord


class Question(BaseModel):
    """The keys of a job file that say what its answer must keep; what is left out is the job's."""

    model_config = ConfigDict(extra="forbid")

    latency_at: Annotated[Quantile | None, Field(description="where the budget holds")] = None
    max_accuracy_drop: Annotated[float | None, Field(ge=0, le=1)] = None
    max_size: Annotated[str | None, Field(description="`3MB`")] = None
    max_memory: Annotated[str | None, Field(description="`60MB`")] = None
    max_energy: Annotated[str | None, Field(description="`5mJ`")] = None

    @property
    def is_asked(self) -> bool:
        """Something is not the job's own."""
        return self.overrides() != {}

    def overrides(self) -> dict[str, str | float]:
        """The keys that are given."""
        keys = Question.model_fields.keys()
        return {k: v for k in keys if (v := getattr(self, k)) is not None}


def asked_of(job: JobRecord, question: Question, budget: str | None) -> JobRecord:
    """The job as if it had asked that; a budget is each of its devices' own.

    Raises:
        InvalidJob: a limit cannot be read.
        JobNotReady: the budget is a share of an FP32 latency that is not measured yet.
    """
    changed = replace(job, spec={**job.spec, **question.overrides()})
    try:
        amounts(changed.spec)
        read = None if budget is None else LatencyBudget.parse(budget)
    except ValueError as error:
        raise InvalidJob(str(error)) from error
    return changed if read is None else _with_budget(changed, read, budget or "")


def _with_budget(job: JobRecord, budget: LatencyBudget, text: str) -> JobRecord:
    def bound(reference_latency_ns: float | None) -> float:
        if budget.absolute_ns is None and reference_latency_ns is None:
            raise JobNotReady(
                f"job {job.id} has not measured its FP32 model yet, so {text} of it is not known"
            )
        return budget.nanoseconds(fp32_latency_ns=reference_latency_ns or 0.0)

    return replace(
        job,
        latency_budget_ns=bound(job.reference_latency_ns),
        further_targets=tuple(
            replace(target, latency_budget_ns=bound(target.reference_latency_ns))
            for target in job.further_targets
        ),
    )
