"""The search space: an inventory's groups times the choices that a job and a device allow.

Every choice list is ordered (precisions by falling bits, ratios rising, threads rising), so
that a sampler may treat a choice as an ordered integer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_spaces.candidate import Candidate
from search_spaces.choices import FP32, INT8, PerBlock, Precision, RuntimeOptions
from search_spaces.errors import InvalidCandidate, InvalidChoice
from search_spaces.layers import LayerGroup, LayerInventory

SPACE_VERSION = 2
# Version 1 (2026-11-21): precisions and prune ratios per group, runtimes.
# Version 2 (2026-11-21): graph_level, memory_arena and spinning of a runtime; those of version 1
# are the usual ones.


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Ordered choices: per layer group, per prunable group, and for the runtime."""

    precisions: Mapping[str, tuple[Precision, ...]]
    prune_ratios: Mapping[str, tuple[float, ...]]
    runtimes: tuple[RuntimeOptions, ...]

    @classmethod
    def build(
        cls,
        inventory: LayerInventory,
        *,
        precisions: Sequence[Precision],
        prune_ratios: Sequence[float] = (0.0,),
        runtimes: Sequence[RuntimeOptions] = (RuntimeOptions(),),
        is_offered: Callable[[LayerGroup, Precision], bool] | None = None,
    ) -> SearchSpace:
        """The inventory times the choices; each group keeps those it can take.

        FP32 and a ratio of 0.0 are always offered: leaving a group alone is always possible.
        Of the others a group gets those for which `is_offered` is true (None: all).

        Raises:
            InvalidChoice: a ratio is outside [0, 1), or there is no runtime.
        """
        wrong = [ratio for ratio in prune_ratios if not 0.0 <= ratio < 1.0]
        if wrong:
            raise InvalidChoice(f"prune ratio {wrong[0]} is not a fraction in [0, 1)")
        if not runtimes:
            raise InvalidChoice("a space needs at least one runtime option")
        ratios = tuple(sorted({0.0, *prune_ratios}))
        return cls(
            precisions={
                group.name: _descending(
                    {
                        precision
                        for precision in (FP32, *precisions)
                        if precision == FP32
                        or (
                            can_take(group, precision)
                            and (is_offered is None or is_offered(group, precision))
                        )
                    }
                )
                for group in inventory.groups
            },
            prune_ratios={group.name: ratios for group in inventory.prunable_groups}
            if len(ratios) > 1
            else {},
            runtimes=tuple(sorted(set(runtimes))),
        )

    @property
    def n_candidates(self) -> int:
        """How many different candidates there are."""
        sizes = [len(c) for c in self.precisions.values()]
        sizes += [len(c) for c in self.prune_ratios.values()]
        return math.prod(sizes) * len(self.runtimes)

    def fp32(self, runtime: RuntimeOptions | None = None) -> Candidate:
        """The source model as it is."""
        return Candidate(runtime=runtime or self.runtimes[0])

    def uniform(self, precision: Precision, runtime: RuntimeOptions | None = None) -> Candidate:
        """Every group that can take the precision takes it; the others stay FP32."""
        return Candidate(
            precisions={n: precision for n, c in self.precisions.items() if precision in c},
            runtime=runtime or self.runtimes[0],
        )

    def uniform_int8(self, runtime: RuntimeOptions | None = None) -> Candidate:
        """What post-training quantization tools give by default.

        A group that is offered INT8 with other granularity or symmetry alone takes that.
        """
        chosen = {
            name: INT8 if INT8 in choices else next((p for p in choices if p.is_int8), FP32)
            for name, choices in self.precisions.items()
        }
        return Candidate(precisions=chosen, runtime=runtime or self.runtimes[0])

    def uniform_prune_ratios(self, ratio: float) -> dict[str, float]:
        """Each prunable group at its largest offered ratio that does not exceed `ratio`."""
        return {
            name: max((c for c in choices if c <= ratio), default=0.0)
            for name, choices in self.prune_ratios.items()
        }

    def require(self, candidate: Candidate) -> None:
        """Check that the candidate is a point of this space.

        Raises:
            InvalidCandidate: it names an unknown group or a choice that is not offered.
        """
        for name, precision in candidate.precisions.items():
            if name not in self.precisions:
                raise InvalidCandidate(f"the space has no layer group {name!r}")
            if precision not in self.precisions[name]:
                offered = ", ".join(p.name for p in self.precisions[name])
                raise InvalidCandidate(
                    f"group {name!r} is not offered {precision.name}; it takes {offered}"
                )
        for name, ratio in candidate.prune_ratios.items():
            if ratio not in self.prune_ratios.get(name, (0.0,)):
                offered = ", ".join(str(r) for r in self.prune_ratios.get(name, (0.0,)))
                raise InvalidCandidate(
                    f"prunable group {name!r} is not offered ratio {ratio}; it takes {offered}"
                )
        if candidate.runtime not in self.runtimes:
            raise InvalidCandidate(f"runtime {candidate.runtime} is not one of the space's")

    def sample(self, rng: random.Random) -> Candidate:
        """A candidate drawn uniformly, every choice on its own."""
        return Candidate(
            precisions={name: rng.choice(c) for name, c in self.precisions.items()},
            prune_ratios={name: rng.choice(c) for name, c in self.prune_ratios.items()},
            runtime=rng.choice(self.runtimes),
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with the format's version."""
        return {
            "version": SPACE_VERSION,
            "precisions": {n: [p.name for p in c] for n, c in self.precisions.items()},
            "prune_ratios": {n: list(c) for n, c in self.prune_ratios.items()},
            "runtimes": [options.to_json() for options in self.runtimes],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SearchSpace:
        """The space that `to_json` wrote."""
        return cls(
            precisions={
                n: tuple(Precision.parse(p) for p in c) for n, c in document["precisions"].items()
            },
            prune_ratios={n: tuple(c) for n, c in document["prune_ratios"].items()},
            runtimes=tuple(RuntimeOptions(**r) for r in document["runtimes"]),
        )


def can_take(group: LayerGroup, precision: Precision) -> bool:
    """The inventory lists the precision's bits, and blocks find a matrix product."""
    is_blocked = isinstance(precision.granularity, PerBlock)
    return precision.plain.name in group.precisions and (group.is_matrix_product or not is_blocked)


def _descending(precisions: set[Precision]) -> tuple[Precision, ...]:
    return tuple(
        sorted(precisions, key=lambda p: (p.weight_bits + p.activation_bits, p), reverse=True)
    )
