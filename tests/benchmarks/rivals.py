"""A service whose search is one of Optuna's samplers: `python -m tests.benchmarks.rivals tpe`.

For `real_search`: jobs run as ever (baselines, pruned bases, evaluation, confirmation), and only
who proposes in the search phase is another. The samplers are those of `conversation`, over the
same ordered integers as ours, told every trial's figures and what lies outside the box in which
hypervolumes are counted. Takes the options of `autotune serve` that an embedded service gives.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autotune.search.front import latency_of, ranks
from autotune.search.landscape import Encoding
from autotune.search.planner import Proposal
from autotune.search.proposals import BATCH, Proposals
from autotune.search.runner import Runner
from autotune.service.server import serve
from autotune.settings import Settings
from device_agents.device import host_id
from storage.artifacts import ArtifactStore
from storage.records import TrialRecord
from storage.repository import Repository
from tests.benchmarks import conversation
from tests.benchmarks.conversation import DRAWS, Conversation, MakeSampler

SAMPLERS = {name: conversation.SAMPLERS[name] for name in ("tpe", "nsga2")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival(Proposals):
    """Optuna by itself: it knows the space, the baselines and what it asked for."""

    sampler: MakeSampler
    conversations: list[Conversation] = field(default_factory=list)

    def warm_start(self, trials: Sequence[TrialRecord]) -> list[Proposal]:
        """Nothing: structure is what the rivals do not know."""
        return []

    def refine(
        self, trials: Sequence[TrialRecord], *, budget: int = 0, size: int = BATCH
    ) -> list[Proposal]:
        """The sampler's next points, told all that was measured."""
        encoding = Encoding(space=self.space, bases=({}, *self.bases))
        if not self.conversations:
            made = Conversation.begin(self.sampler(self.seed), encoding.sizes)
            self.conversations.append(made)
        (study,) = self.conversations
        for trial in trials:
            point = encoding.point(trial.candidate)
            if point is not None and trial.outcome is not None:
                study.tell(tuple(point.tolist()), figures_of(trial))
        points = study.ask(size, draws=DRAWS * size)
        return [Proposal(candidate=encoding.candidate(p), proposed_by="optuna") for p in points]


def figures_of(trial: TrialRecord) -> tuple[float, float] | None:
    """(ratio to FP32's latency, accuracy drop, not below 0); None where it does not rank."""
    latency, accuracy = latency_of(trial), trial.accuracy
    if latency is None or accuracy is None or not ranks(trial):
        return None
    return latency.ratio, max(accuracy.drop, 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rivals")
    parser.add_argument("method", choices=sorted(SAMPLERS))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--no-trust-job-code", action="store_true")
    given = parser.parse_args(arguments)
    sampler = SAMPLERS[given.method]

    def make_runner(repository: Repository, artifacts: ArtifactStore, settings: Settings) -> Runner:
        return Runner(
            repository,
            artifacts,
            data_dir=settings.data_dir,
            host_id=host_id(),
            make_proposals=functools.partial(Rival, sampler=sampler),
        )

    settings = Settings(data_dir=given.data_dir, port=given.port)
    serve(settings, ready_file=given.ready_file, make_runner=make_runner)
    return 0


if __name__ == "__main__":
    sys.exit(main())
