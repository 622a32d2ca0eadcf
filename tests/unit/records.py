"""Makers of records for tests: sensible figures, everything overridable."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from device_agents.protocol import Conditions, LatencyReport, RuntimeRequest
from search_spaces import Candidate
from storage.records import AccuracyReport, TrialOutcome, TrialRecord, TrialState

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def latency(ms: float, *, half_width: float = 0.01, **changes: Any) -> LatencyReport:
    """A steady report of `ms` against a 4 ms reference."""
    ns = ms * 1e6
    figures: dict[str, Any] = {
        "p50_ns": ns,
        "p50_low_ns": ns * (1 - half_width),
        "p50_high_ns": ns * (1 + half_width),
        "p90_ns": ns * 1.05,
        "p99_ns": ns * 1.2,
        "ratio": ms / 4,
        "ratio_low": ms / 4 * (1 - half_width),
        "ratio_high": ms / 4 * (1 + half_width),
        "reference_p50_ns": 4e6,
        "reference_latency_ns": 4e6,
        "n_samples": 100,
        "n_blocks": 10,
        "is_steady": True,
        "wall_s": 1.0,
        "runtime": RuntimeRequest(),
        "runtime_version": "1.31.1",
        "before": Conditions(),
        "after": Conditions(),
    }
    return LatencyReport(**{**figures, **changes})


def accuracy(value: float, *, fp32: float = 0.95, **changes: Any) -> AccuracyReport:
    """A report on 400 search samples."""
    drop = fp32 - value
    figures: dict[str, Any] = {
        "split": "search",
        "n_samples": 400,
        "value": value,
        "value_low": value - 0.02,
        "value_high": value + 0.02,
        "fp32_value": fp32,
        "drop": drop,
        "drop_low": drop - 0.01,
        "drop_high": drop + 0.01,
        "mean_kl": max(drop, 0.0),
        "wall_s": 0.1,
    }
    return AccuracyReport(**{**figures, **changes})


def trial(
    number: int, ms: float | None, value: float | None, *, half_width: float = 0.01, **changes: Any
) -> TrialRecord:
    """A finished trial; None for `ms` or `value` leaves that figure out."""
    figures: dict[str, Any] = {
        "id": f"t-{number}",
        "job_id": "j-1",
        "number": number,
        "candidate": Candidate(prune_ratios={"stem": number / 1000}),
        "proposed_by": "optuna",
        "state": TrialState.FINISHED,
        "outcome": TrialOutcome.OK,
        "accuracy": None if value is None else accuracy(value),
        "latency": None if ms is None else latency(ms, half_width=half_width),
        "created_at": NOW,
        "finished_at": NOW,
    }
    return TrialRecord(**{**figures, **changes})
