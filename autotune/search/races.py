"""What the candidates of a job race against, and by what they are judged beforehand.

FP32 is what everything is compared with, and uniform INT8 on the first runtime options tells which
samples compression shifts at all (`compression/racing.py`): both are shown every sample. The
others race, by what uniform INT8 does to each sample as soon as that is known: the baselines that
are built beside it do without. It is known of the kernel class that an artifact is written for, as
its accuracy is. What is built on a pruned base races by that base in FP32 instead, which the
workers know (`compression_worker.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autotune.compression.racing import Race, Shown
from autotune.search.front import REFERENCE_DROP
from autotune.spec import JobSpec
from search_spaces import Candidate, SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Races:
    """The races of one job; what they learn they keep, shared by all that hold them.

    `uniform` is uniform INT8, by which the others race; None where nothing can be quantized so.
    """

    race: Race
    uniform: Candidate | None
    _shown: dict[str, Shown | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def of(self, candidate: Candidate, kernels: str) -> Race | None:
        """What it races against where it is written for that kernel class; None: it does not."""
        is_fp32 = not candidate.precisions and not candidate.prune_ratios
        if is_fp32 or candidate == self.uniform:
            return None
        return replace(self.race, auxiliary=self._shown.get(kernels))

    def learn(self, kernels: str, shown: Shown | None) -> None:
        """What uniform INT8 does to each sample there; None where that cannot be had."""
        # Copies: an array from a worker may hold on to all that came with it.
        self._shown[kernels] = shown and Shown(
            margins=shown.margins.copy(), divergences=shown.divergences.copy()
        )

    def has_learned(self, kernels: str) -> bool:
        """Nothing more is to be learned of that kernel class."""
        return self.uniform is None or kernels in self._shown


def races_of(spec: JobSpec, space: SearchSpace) -> Races:
    """The races of a job in that space."""
    uniform = space.uniform_int8(space.runtimes[0])
    return Races(
        race=race_of(max_accuracy_drop=spec.max_accuracy_drop, seed=spec.seed),
        uniform=uniform if uniform.precisions else None,
    )


def race_of(*, max_accuracy_drop: float | None, seed: int) -> Race:
    """What the candidates of a job race against.

    The drop that the job allows; without one, that of the front's reference box.
    """
    return Race(limit=REFERENCE_DROP if max_accuracy_drop is None else max_accuracy_drop, seed=seed)
