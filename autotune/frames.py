"""Trials as a pandas frame: one row each, one column per figure and per choice.

Owns the columns. pandas comes with the extra `analysis`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from autotune.api_types import Interval, Job, Shape, Trial
from autotune.errors import MissingPackage
from search_spaces import RuntimeOptions

if TYPE_CHECKING:
    import pandas as pd

_UNCHANGED = {"precision": "fp32", "prune": 0.0, **asdict(RuntimeOptions())}
"""What a choice is where a candidate does not name it, as in `search_spaces.Candidate`."""


def trials_frame(job: Job, trials: Sequence[Trial]) -> pd.DataFrame:
    """One row per trial, in the given order, with the trial's number as the index.

    An interval is three columns (`latency_ns`, `latency_ns_low`, `latency_ns_high`); a choice
    is a column of its name (`precision:GROUP`, `prune:GROUP`, `runtime` and its options). In a
    job on several devices the figures on each stand in `DEVICE:latency_ns` and so on. Units are
    those of `autotune.api_types`. What is not known is missing (None or NaN).

    Raises:
        MissingPackage: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingPackage(
            "pandas is not installed here; pip install 'edge-autotune[analysis]' brings it"
        ) from error
    names = {target.device_id: target.device_name for target in job.targets}
    rows = [_row(t, names) | c for t, c in zip(trials, choices_of(trials), strict=True)]
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["number"]
    return pd.DataFrame(rows, columns=columns).set_index("number")


def choices_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every trial's choices by name, each with all names that occur.

    What a candidate does not name is as in the source model: FP32, unpruned.
    """
    own = [_choices(trial) for trial in trials]
    names = sorted({name for choices in own for name in choices})
    return [{n: c.get(n, _UNCHANGED[n.partition(":")[0]]) for n in names} for c in own]


def _choices(trial: Trial) -> dict[str, Any]:
    candidate = trial.candidate
    runtime = candidate.get("runtime", {})
    precisions = {g.group: g.planned for g in trial.groups} | candidate.get("precisions", {})
    return {
        **{f"precision:{group}": name for group, name in precisions.items()},
        **{f"prune:{group}": ratio for group, ratio in candidate.get("prune_ratios", {}).items()},
        **runtime,
    }


def _row(trial: Trial, device_names: Mapping[str, str]) -> dict[str, Any]:
    row = _figures(trial)
    for there in trial.targets:
        name = device_names.get(there.device_id, there.device_id)
        row |= {f"{name}:{key}": value for key, value in _figures(there).items()}
    return row


def _figures(shape: Shape) -> dict[str, Any]:
    """The fields that are one figure; an interval is three."""
    row: dict[str, Any] = {}
    for name, field in type(shape).model_fields.items():
        value = getattr(shape, name)
        if field.annotation == (Interval | None):
            row[name] = None if value is None else value.value
            row[f"{name}_low"] = None if value is None else value.low
            row[f"{name}_high"] = None if value is None else value.high
        elif not isinstance(value, dict | list | Shape):
            row[name] = value
    return row
