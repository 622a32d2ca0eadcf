"""The record of what a device taught about latency, in a form that fits other models too.

Owns its shape and its stored format. How it is learnt from a job's trials and what follows from
it for the next job is `autotune.search.device_latency`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from search_spaces import RuntimeOptions

LATENCY_MODEL_VERSION = 1
# Version 1 (2026-11-21): per operator and precision, and per byte of a boundary, in one runtime.


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCost:
    """What one operator costs in one precision.

    `factor` is its time as a share of FP32's for the same layers (below 1 is faster), with its
    standard deviation. `ns_per_mac` and `ns_per_byte` (of inputs and outputs in FP32) add up to
    the time; they are None where no profile told FP32's. `n_groups` layer groups have taught it.
    """

    operator: str
    precision: str
    factor: float
    deviation: float
    ns_per_mac: float | None = None
    ns_per_byte: float | None = None
    n_groups: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """The costs on one device in one runtime with one set of options.

    `boundary_ns_per_byte` is what converting a byte of FP32 between two precisions costs, None
    where nothing has been learnt of it. `n_trials` counts the trials behind it, those of the
    jobs before included.
    """

    runtime: RuntimeOptions
    runtime_version: str
    operators: tuple[OperatorCost, ...]
    boundary_ns_per_byte: float | None = None
    boundary_deviation: float | None = None
    n_trials: int = 0

    def cost(self, operator: str, precision: str) -> OperatorCost | None:
        """What is known of that operator in that precision; None where nothing is."""
        for known in self.operators:
            if (known.operator, known.precision) == (operator, precision):
                return known
        return None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with the format's version."""
        facts = {**asdict(self), "runtime": self.runtime.to_json()}
        return {"version": LATENCY_MODEL_VERSION, **facts}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LatencyModel:
        """The model that `to_json` wrote.

        Raises:
            ValueError: a later version wrote it.
        """
        facts = dict(document)
        version = facts.pop("version")
        if version > LATENCY_MODEL_VERSION:
            raise ValueError(f"version {version} is newer than {LATENCY_MODEL_VERSION}")
        operators = tuple(OperatorCost(**entry) for entry in facts.pop("operators"))
        runtime = RuntimeOptions(**facts.pop("runtime"))
        return cls(**facts, runtime=runtime, operators=operators)
