"""Who proposes in the search phase: the warm start first, then Optuna and flips in turns.

Owns the mixture and nothing else: the same trials give the same proposals. `planner.py` and
`sampler.py` have the ideas, `tuning.py` decides how many are tried.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

from autotune.search import planner
from autotune.search.planner import Proposal
from autotune.search.sampler import Sampler
from search_spaces import LayerInventory, SearchSpace
from storage.records import TrialRecord

BATCH = 4
"""Proposals made at once: enough to keep two workers busy, few enough to learn from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """The proposals of one job.

    `bases` are the prune ratios that could be made; `damage` is the sensitivity of (group,
    precision), mean KL in nats; `by_size` says that smaller files count too.
    """

    space: SearchSpace
    inventory: LayerInventory
    bases: Sequence[Mapping[str, float]]
    damage: Mapping[tuple[str, str], float]
    seed: int
    latency_budget_ns: float | None = None
    by_size: bool = False

    def warm_start(self, trials: Sequence[TrialRecord]) -> list[Proposal]:
        """What structure suggests, most promising first; nothing that was tried.

        With `by_size` candidates for falling file sizes come between those for latency.
        """
        known = _digests(trials)
        warm = planner.first_candidates(self.space, self.inventory, self.damage, self.bases)
        ladders = [[Proposal(candidate=c, proposed_by="sensitivity") for c in warm]]
        if self.by_size:
            small = planner.size_ladder(self.space, self.inventory, self.damage)
            ladders.append([Proposal(candidate=c, proposed_by="size") for c in small])
        mixed = [p for row in zip_longest(*ladders) for p in row if p is not None]
        new: dict[str, Proposal] = {}
        for proposal in mixed:
            if proposal.candidate.digest not in known:
                new.setdefault(proposal.candidate.digest, proposal)
        return list(new.values())

    def refine(
        self,
        trials: Sequence[TrialRecord],
        flip_from: Sequence[TrialRecord],
        *,
        turn: int,
        size: int = BATCH,
    ) -> list[Proposal]:
        """A batch of `size` shared by Optuna and by single-group flips of the trials `flip_from`.

        Empty where nothing new is left.
        """
        known = _digests(trials)
        sampler = Sampler(
            space=self.space,
            bases=[{}, *self.bases],
            seed=self.seed,
            latency_budget_ns=self.latency_budget_ns,
            by_size=self.by_size,
        )
        asked = sampler.propose(trials, size // 2, is_known=lambda c: c.digest in known)
        known |= {c.digest for c in asked}
        rng = random.Random(self.seed * 1000 + turn)  # noqa: S311 - a search, not a secret
        neighbours = planner.flips(flip_from, self.space, self.damage, rng=rng)
        fresh = (c for c in neighbours if c.digest not in known)
        flipped = islice(fresh, size - len(asked))
        return [
            *(Proposal(candidate=c, proposed_by="optuna") for c in asked),
            *(Proposal(candidate=c, proposed_by="mutation") for c in flipped),
        ]


def _digests(trials: Sequence[TrialRecord]) -> set[str]:
    return {trial.candidate.digest for trial in trials}
