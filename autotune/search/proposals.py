"""Who proposes in the search phase: the warm start first, then the fitted model and Optuna.

Owns the mixture and nothing else: the same trials give the same proposals. `planner.py`,
`landscape.py` and `sampler.py` have the ideas, `tuning.py` decides how many are tried.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from autotune.search import landscape, planner
from autotune.search.feasibility import ANY, Limits
from autotune.search.front import reference_drop
from autotune.search.improvement import Promise
from autotune.search.landscape import Encoding, Fitted, Knowledge
from autotune.search.planner import Proposal
from autotune.search.priors import NOTHING, Earlier
from autotune.search.sampler import Sampler
from autotune.search.sizes import group_bytes
from search_spaces import FP32, Candidate, LayerInventory, SearchSpace
from storage.records import TrialRecord

_log = logging.getLogger(__name__)

BATCH = 4
"""Proposals made at once: enough to keep two workers busy, few enough to learn from."""

OPTUNA_EVERY, OPTUNA_EVERY_BESIDE = 8, 2
"""Of the candidates after the warm start one of so many is Optuna's; the latter where figures
count that the model does not know.

In replays the share costs: mean regret on the simulated fifty groups (12 seeds) is 0.162 +- 0.002
with every fourth, 0.157 +- 0.003 with every eighth and 0.152 +- 0.003 with none; on the measured
tables it is 0.022, 0.024 and 0.023 +- 0.001 on resnet18 (60 seeds), 0.015 +- 0.005, 0.019 +- 0.010
and 0.003 +- 0.002 on efficientnet_b0 (200, 60 and 200), 0 on the others. As insurance against
models that are wrong throughout it is weak: with their prior knowledge permuted (30 seeds),
regret on resnet18 is 0.28 with every fourth and 0.26 with none, on efficientnet_b0 0.54 and 0.58.
"""

_WARM = ("earlier", "sensitivity", "size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """The proposals of one job.

    `bases` are the prune ratios that could be made; `damage` is the sensitivity of (group,
    precision), mean KL in nats; `beside` are the objectives beside accuracy and latency.
    `on_fitted` gets the models that proposals are made by.
    """

    space: SearchSpace
    inventory: LayerInventory
    bases: Sequence[Mapping[str, float]]
    damage: Mapping[tuple[str, str], float]
    seed: int
    limits: Limits = ANY
    max_accuracy_drop: float | None = None
    beside: tuple[str, ...] = ()
    earlier: Earlier = NOTHING
    on_fitted: Callable[[Fitted], None] = lambda _: None

    def warm_start(self, trials: Sequence[TrialRecord]) -> list[Proposal]:
        """What structure suggests, most promising first; nothing that was tried.

        Where earlier jobs have searched this model it is their front instead, fastest first.
        Where size counts or is limited, candidates for falling file sizes come between those
        for latency.
        """
        known = _digests(trials)
        if self.earlier.front:
            again = [t.candidate for t in self.earlier.front if t.candidate.digest not in known]
            return [Proposal(candidate=c, proposed_by="earlier") for c in again]
        warm = planner.first_candidates(self.space, self.inventory, self.damage, self.bases)
        ladders = [[Proposal(candidate=c, proposed_by="sensitivity") for c in warm]]
        if self._seeks_small:
            small = planner.size_ladder(
                self.space, self.inventory, self.damage, within=self._weights_limit(trials)
            )
            ladders.append([Proposal(candidate=c, proposed_by="size") for c in small])
        mixed = [p for row in zip_longest(*ladders) for p in row if p is not None]
        new: dict[str, Proposal] = {}
        for proposal in mixed:
            if proposal.candidate.digest not in known:
                new.setdefault(proposal.candidate.digest, proposal)
        return list(new.values())

    def warm_trials_left(self, trials: Sequence[TrialRecord], *, budget: int) -> int:
        """How many of `warm_start` are still due in a job of `budget` trials.

        A quarter of what the baselines leave, the rest is for what that teaches; a second
        ladder, of sizes, doubles it. None once the model has proposed: a job that goes on, or
        is extended, does so with what it has learnt. It depends on the trials alone, so that a
        restart changes no proposal.
        """
        n_baselines, n_warm, n_refined = _counts(trials)
        if n_refined:
            return 0
        share = 2 if self._seeks_small else 4
        return max(max(BATCH, (budget - n_baselines) // share) - n_warm, 0)

    def refine(
        self,
        trials: Sequence[TrialRecord],
        *,
        budget: int = landscape.LONG_BUDGET,
        size: int = BATCH,
    ) -> list[Proposal]:
        """A batch of `size`: most of it from the model fitted to the trials, the rest Optuna's.

        `budget` is how many trials the job has in all.

        The model knows two figures, so that Optuna has half where others count or are limited.
        Where none do, what the model is sure to be beaten is not measured for Optuna's sake.
        Empty where nothing new is left.
        """
        encoding = Encoding(space=self.space, bases=({}, *self.bases))
        _, _, n_refined = _counts(trials)
        every = OPTUNA_EVERY_BESIDE if self._has_further_figures else OPTUNA_EVERY
        n = size - optunas_part(n_refined, size, every=every)
        promising, fitted = self._promising(encoding, trials, n, budget=budget)
        known = _digests(trials) | {candidate.digest for candidate, _ in promising}

        def is_unwanted(candidate: Candidate) -> bool:
            if candidate.digest in known:
                return True
            return fitted is not None and fitted.is_hopeless(candidate)

        sampler = Sampler(
            encoding=encoding,
            seed=self.seed,
            limits=self.limits,
            max_accuracy_drop=self.max_accuracy_drop,
            beside=self.beside,
        )
        asked = _sampled(sampler, trials, size - len(promising), is_unwanted)
        return [
            *(
                Proposal(candidate=c, proposed_by=promise.origin, gain=promise.gain)
                for c, promise in promising
            ),
            *(Proposal(candidate=c, proposed_by="optuna") for c in asked),
        ]

    def _promising(
        self, encoding: Encoding, trials: Sequence[TrialRecord], n: int, *, budget: int
    ) -> tuple[list[tuple[Candidate, Promise]], Fitted | None]:
        """The fitted model's proposals, and the model where it knows all figures that count.

        Neither where it fails: Optuna goes on without it.
        """
        told: list[Fitted] = []

        def tell(fitted: Fitted) -> None:
            told.append(fitted)
            self.on_fitted(fitted)

        try:
            found = landscape.propose(
                encoding,
                Knowledge(inventory=self.inventory, damage=self.damage, taught=self.earlier.taught),
                trials,
                n=n,
                seed=self.seed,
                budget=budget,
                largest_drop=reference_drop(self.max_accuracy_drop),
                earlier=self.earlier,
                on_fitted=tell,
            )
        except (ArithmeticError, ValueError):  # LinAlgError is a ValueError
            _log.warning("the models could not be fitted; Optuna alone proposes", exc_info=True)
            return [], None
        return found, told[0] if told and not self._has_further_figures else None

    @property
    def _seeks_small(self) -> bool:
        return "size" in self.beside or self.limits.size_bytes is not None

    @property
    def _has_further_figures(self) -> bool:
        limits = self.limits
        limited = (limits.size_bytes, limits.memory_bytes, limits.energy_joules)
        return bool(self.beside) or any(limit is not None for limit in limited)

    def _weights_limit(self, trials: Sequence[TrialRecord]) -> float | None:
        """What the weights may take of the largest file; None where it is not limited or known.

        The rest of a file, such as its graph, is what FP32's has beside its weights.
        """
        fp32 = self.space.fp32()
        sizes = (t.artifact_size_bytes for t in trials if t.candidate == fp32)
        file_bytes = next((size for size in sizes if size is not None), None)
        if self.limits.size_bytes is None or file_bytes is None:
            return None
        weights = sum(group_bytes(group, FP32) for group in self.inventory.groups)
        return self.limits.size_bytes - max(file_bytes - weights, 0)


def optunas_part(n_before: int, n: int, *, every: int) -> int:
    """How many of the next `n` candidates after the first `n_before` are Optuna's.

    >>> [optunas_part(n_before, 4, every=8) for n_before in (0, 4, 8, 12)]
    [0, 1, 0, 1]
    """
    return (n_before + n) // every - n_before // every


def _counts(trials: Sequence[TrialRecord]) -> tuple[int, int, int]:
    """How many trials are baselines, of the warm start, and proposed after it."""
    by = Counter(trial.proposed_by for trial in trials)
    n_warm = sum(by[name] for name in _WARM)
    return by["baseline"], n_warm, by.total() - by["baseline"] - n_warm


def _sampled(
    sampler: Sampler,
    trials: Sequence[TrialRecord],
    n: int,
    is_unwanted: Callable[[Candidate], bool],
) -> list[Candidate]:
    """The sampler's proposals; none where it fails, for the model's own go on without it."""
    try:
        return sampler.propose(trials, n, is_unwanted=is_unwanted)
    except Exception:  # noqa: BLE001 - whatever Optuna raises, it is one of two who propose
        _log.warning("Optuna's sampler failed; the model alone proposes", exc_info=True)
        return []


def _digests(trials: Sequence[TrialRecord]) -> set[str]:
    return {trial.candidate.digest for trial in trials}
