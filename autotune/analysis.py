"""A job with its trials at hand: as an Optuna study, as pandas frames, explained.

Owns which trials are asked for. The study is `studies.py`'s, the columns are `frames.py`'s;
neither optuna nor pandas is imported before a method needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pydantic import PrivateAttr

from autotune import api_types, frames, studies
from autotune.api_explanation import Explanation
from autotune.errors import ServiceError

if TYPE_CHECKING:
    import optuna
    import pandas as pd


class JobReader(Protocol):
    """The part of `autotune.client.Client` that a job asks."""

    def trials(self, reference: str, /) -> list[api_types.Trial]:
        """A job's trials, by number."""

    def front(self, reference: str, /) -> api_types.Front:
        """A job's front with its answer."""

    def explain(self, reference: str, trial: str | int | None = None, /) -> Explanation:
        """Why a trial is what it is."""


class Job(api_types.Job):
    """A job as the client returns it: the shape, and its trials through that client."""

    _reader: JobReader | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Remember the client, which validates answers with itself as the context."""
        self._reader = context

    def to_optuna_study(self) -> optuna.Study:
        """The job as an Optuna study in memory, with all its trials; see `studies.study_of`.

        Raises:
            MissingPackage: optuna is not installed.
            ServiceError: the service does not answer.
        """
        return studies.study_of(self, self._asked.trials(self.id))

    def trials_frame(self) -> pd.DataFrame:
        """The job's trials by number, a column per figure and choice; see `frames`.

        Raises:
            MissingPackage: pandas is not installed.
            ServiceError: the service does not answer.
        """
        return frames.trials_frame(self, self._asked.trials(self.id))

    def front_frame(self) -> pd.DataFrame:
        """The members of the job's front, fastest first, with the same columns.

        Raises:
            MissingPackage: pandas is not installed.
            ServiceError: the service does not answer.
        """
        return frames.trials_frame(self, self._asked.front(self.id).trials)

    def explain(self, trial: str | int | None = None) -> Explanation:
        """Why a trial (the winner, where none is named) is what it is, by layer group.

        Raises:
            JobNotReady: the job has not measured its FP32 model yet.
            ServiceError: the service does not answer.
        """
        return self._asked.explain(self.id, trial)

    @property
    def _asked(self) -> JobReader:
        if self._reader is None:
            raise ServiceError(
                f"job {self.id} was not read through a client, so that its trials cannot be "
                "asked for; take it from Client.job"
            )
        return self._reader
