"""What the repository acknowledged survives SIGKILL, and what it did not is whole or absent.

A child process writes without pause and says on its standard output what was acknowledged;
it is killed after a number of acknowledgements, at whatever it was doing by then.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from search_spaces import INT8, Candidate
from storage.artifacts import ArtifactStore
from storage.database import open_database
from storage.repository import Repository

WRITER = """
import itertools, sys
from pathlib import Path
from search_spaces import INT8, Candidate
from storage.artifacts import ArtifactStore
from storage.database import open_database
from storage.records import TrialState
from storage.repository import Repository

folder = Path(sys.argv[1])
store = ArtifactStore(folder / "artifacts")
repository = Repository(open_database(f"sqlite:///{folder / 'autotune.db'}"))
job = repository.create_job(spec={}, name="crash")
for n in itertools.count():
    trial = repository.add_trial(
        job.id, Candidate(precisions={f"conv{n}": INT8}), proposed_by="optuna"
    )
    stored = store.put(b"%d" % n * 20_000)
    repository.record_artifact(stored.sha256, stored.size_bytes, "model")
    repository.update_trial(
        trial.id, state=TrialState.FINISHED, artifact_sha256=stored.sha256,
        compression={"padding": "x" * 5_000},
    )
    event = repository.append_event(job.id, "trial", {"number": n})
    print(trial.id, stored.sha256, event.id, flush=True)
"""


def acknowledged_before_the_kill(folder: Path, *, lines: int) -> list[list[str]]:
    """Run the writer, kill it after so many acknowledgements; everything that it said."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(lines)]
        writer.kill()
        said += writer.stdout.readlines()
    return [line.split() for line in said if line.endswith("\n")]


@pytest.mark.parametrize("lines", [1, 7, 20])
def test_a_killed_writer_leaves_every_acknowledged_write(tmp_path: Path, lines: int) -> None:
    acknowledged = acknowledged_before_the_kill(tmp_path, lines=lines)
    assert len(acknowledged) >= lines
    with open_database(f"sqlite:///{tmp_path / 'autotune.db'}") as database:
        repository, store = Repository(database), ArtifactStore(tmp_path / "artifacts")
        job = repository.get_job("crash")
        trials = {trial.id: trial for trial in repository.list_trials(job.id)}
        events = repository.list_events(job.id, limit=100_000)
        for n, (trial_id, sha256, event_id) in enumerate(acknowledged):
            assert trials[trial_id].number == n
            assert trials[trial_id].artifact_sha256 == sha256
            assert store.read(sha256) == b"%d" % n * 20_000
            assert events[n].id == int(event_id)


def test_a_database_whose_writer_was_killed_is_whole_and_takes_writes(tmp_path: Path) -> None:
    path = tmp_path / "autotune.db"
    acknowledged = acknowledged_before_the_kill(tmp_path, lines=5)
    with open_database(f"sqlite:///{path}") as database:
        repository = Repository(database)
        job = repository.get_job("crash")
        trials = repository.list_trials(job.id)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        assert len(trials) - len(acknowledged) in (0, 1)  # at most the one in flight
        new = repository.add_trial(
            job.id, Candidate(precisions={"new": INT8}), proposed_by="optuna"
        )
        assert new.number == len(trials)
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
    raw.close()
