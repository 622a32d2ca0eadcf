"""What one job's phases need from the service that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autotune.search.fleet import Fleet, QuietWindow
from autotune.search.proposals import Proposals
from autotune.search.workers import WorkerPool
from autotune.spec import JobSpec
from device_agents.protocol import DeviceDescription
from storage.artifacts import ArtifactStore
from storage.repository import Repository

if TYPE_CHECKING:
    from autotune.compression.data import DataSplits


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a tuning needs from the service around it."""

    repository: Repository
    artifacts: ArtifactStore
    fleet: Fleet
    window: QuietWindow
    trust_job_code: bool
    make_pool: Callable[[JobSpec, DataSplits, Sequence[DeviceDescription]], WorkerPool]
    """The devices are those that candidates are compressed for, the primary target first."""
    should_stop: Callable[[], bool]
    make_room: Callable[[], None]
    """The disk is full: give up what is kept back, so that the job's end can be written."""
    make_proposals: Callable[..., Proposals] = Proposals
    """Who proposes in the search phase, made with the arguments of `Proposals`."""
