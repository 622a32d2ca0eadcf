"""The record of a sensitivity: the damage of one choice for one group, all else FP32.

Owns its shape and its stored format. Who measures an entry is `autotune.compression`'s
business, which are measured and what follows from them `autotune.search`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SENSITIVITY_VERSION = 2
# Version 1 (2026-11-21): group, precision, mean_kl, drop, n_samples; every entry measured.
# Version 2 (2026-11-21): prune_ratio, sqnr_db, removed_share, is_estimate and wall_s beside
# them; mean_kl and drop may be absent.


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The damage of one choice alone: of a precision, or of a prune ratio.

    `mean_kl` is in nats against FP32's outputs, smaller is better; None until it is measured
    or estimated. `is_estimate`: it follows from cheaper figures and from other entries, no
    output was compared. `drop` is the loss of top-1 as a fraction (negative: better than
    FP32), None where nothing was run. `sqnr_db`: signal to quantization noise at the group's
    own output, larger is better. `removed_share`: the fraction of the group's squared
    weights that the prune ratio removes. `wall_s` is what it cost.
    """

    group: str
    precision: str | None = None
    prune_ratio: float | None = None
    sqnr_db: float | None = None
    removed_share: float | None = None
    mean_kl: float | None = None
    is_estimate: bool = False
    drop: float | None = None
    n_samples: int = 0
    wall_s: float = 0.0

    @property
    def choice(self) -> str | float:
        """The precision's name, or the prune ratio as a fraction."""
        return self.precision if self.precision is not None else self.prune_ratio or 0.0

    @property
    def key(self) -> tuple[str, str | float]:
        """What identifies the entry within a job."""
        return self.group, self.choice

    @property
    def is_measured(self) -> bool:
        """Its divergence comes from outputs that were compared."""
        return self.mean_kl is not None and not self.is_estimate

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with the format's version."""
        return {"version": SENSITIVITY_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Sensitivity:
        """The entry that `to_json` wrote, in this version or an earlier one.

        Raises:
            ValueError: a later version wrote it.
        """
        facts = dict(document)
        version = facts.pop("version", 1)
        if version > SENSITIVITY_VERSION:
            raise ValueError(f"version {version} is newer than {SENSITIVITY_VERSION}")
        return cls(**facts)
