"""The options that say what an answer must keep, shared by the commands that ask for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import click

from autotune.cli.parameters import BUDGET, FRACTION, Amount

if TYPE_CHECKING:
    from autotune.limits import FurtherLimits
    from autotune.spec import JobSpec

P = ParamSpec("P")
R = TypeVar("R")

_DROP = "Largest acceptable loss of accuracy against FP32: 1% or 0.01.  [default: the job's own]"
_AMOUNTS = {
    "max_size": "Largest acceptable file: 3MB, 800kB or 2MiB.  [default: the job's own]",
    "max_memory": "Largest acceptable peak memory of a process that serves the model: 60MB.  "
    "[default: the job's own]",
    "max_energy": "Most energy that an inference may take, on a device with a sensor: 5mJ.  "
    "[default: the job's own]",
}


def limit_options(budget: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Adds the options; `budget` is the name of the one for the latency."""
    options = [
        click.option(
            f"--{budget}",
            "budget",
            type=BUDGET,
            help="Latency budget: 3ms, 800us, or 0.5x of FP32.  [default: the job's own]",
        ),
        click.option(
            "--at",
            type=click.Choice(["p50", "p90", "p99"]),
            help="Quantile of the latency that must be in the budget.  [default: the job's own]",
        ),
        click.option("--max-drop", type=FRACTION, help=_DROP),
        *(
            click.option(f"--{key.replace('_', '-')}", type=Amount(key), help=text)
            for key, text in _AMOUNTS.items()
        ),
    ]

    def add(command: Callable[P, R]) -> Callable[P, R]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def further_limits(given: dict[str, Any]) -> FurtherLimits:
    """The options beside the budget that are given, by a job file's keys."""
    keys = {"at": "latency_at", "max_drop": "max_accuracy_drop"} | {key: key for key in _AMOUNTS}
    found = {key: given[name] for name, key in keys.items() if given[name] is not None}
    return cast("FurtherLimits", found)


def within(spec: JobSpec, given: dict[str, Any]) -> JobSpec:
    """The job with the limits of these options in place of its own.

    Raises:
        InvalidJob: together they make no job.
    """
    from autotune.spec import parse_job

    budget = {} if given["budget"] is None else {"latency_budget": given["budget"]}
    changes = {**budget, **further_limits(given)}
    return parse_job({**spec.model_dump(mode="json"), **changes}) if changes else spec
