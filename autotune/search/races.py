"""What the candidates of a job race against, and by what they are judged beforehand.

FP32 is what everything is compared with, and uniform INT8 tells which samples compression shifts
at all (`compression/racing.py`): both are shown every sample. The others race, from uniform
INT8's margins on, as soon as these are known: the margins are of the kernel class that an
artifact is written for, as its accuracy is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from autotune.compression.racing import Race
from autotune.search.front import REFERENCE_DROP
from autotune.spec import JobSpec
from search_spaces import Candidate, SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Races:
    """The races of one job. `auxiliary` is uniform INT8; margins by kernel class, `(n,)`."""

    race: Race
    auxiliary: Candidate
    _margins: dict[str, np.ndarray] = field(default_factory=dict, init=False)

    def of(self, candidate: Candidate, kernels: str) -> Race | None:
        """What it races against where it is written for that kernel class; None: it does not."""
        is_fp32 = not candidate.precisions and not candidate.prune_ratios
        if is_fp32 or candidate == self.auxiliary:
            return None
        return replace(self.race, auxiliary=self._margins.get(kernels))

    def keep(self, candidate: Candidate, kernels: str, margins: np.ndarray | None) -> None:
        """Remember what the auxiliary does to each sample; of another candidate nothing."""
        if candidate == self.auxiliary and margins is not None:
            self._margins[kernels] = margins

    def lack(self, kernels: str) -> bool:
        """The margins of that kernel class are not known."""
        return kernels not in self._margins


def races_of(spec: JobSpec, space: SearchSpace) -> Races:
    """The races of a job in that space."""
    return Races(
        race=race_of(max_accuracy_drop=spec.max_accuracy_drop, seed=spec.seed),
        auxiliary=space.uniform_int8(space.runtimes[0]),
    )


def race_of(*, max_accuracy_drop: float | None, seed: int) -> Race:
    """What the candidates of a job race against.

    The drop that the job allows; without one, that of the front's reference box.
    """
    return Race(limit=REFERENCE_DROP if max_accuracy_drop is None else max_accuracy_drop, seed=seed)
