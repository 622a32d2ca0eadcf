"""Which job belongs to which job file, so that `autotune tune` can go on after an interruption.

Owns one small JSON file in the data directory. The jobs themselves are in the database; an
entry that is lost costs nothing but the convenience.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autotune.spec import FILE_SCHEMES, JobSpec

LEDGER_VERSION = 1
# Version 1 (2026-11-21): spec digest -> job id and whether its answer was handed over.


class Ledger:
    """The file at `path`, made with its first entry."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def undelivered(self, spec: JobSpec) -> str | None:
        """The id of the spec's last job, if its answer was never handed over."""
        entry = self._entries().get(spec_digest(spec))
        if entry is None or entry.get("delivered"):
            return None
        return str(entry["job"])

    def set_submitted(self, spec: JobSpec, job_id: str) -> None:
        """Remember a new job of the spec."""
        self._write(spec, {"job": job_id, "delivered": False})

    def set_delivered(self, spec: JobSpec) -> None:
        """The answer of the spec's last job has been handed over; the next call starts anew."""
        entry = self._entries().get(spec_digest(spec))
        if entry is not None:
            self._write(spec, {**entry, "delivered": True})

    def _entries(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(self._path.read_text(encoding="utf-8"))
            if document.get("version") == LEDGER_VERSION:
                return dict(document["jobs"])
        return {}

    def _write(self, spec: JobSpec, entry: dict[str, Any]) -> None:
        jobs = {**self._entries(), spec_digest(spec): entry}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"version": LEDGER_VERSION, "jobs": jobs}, indent=2))
        part.replace(self._path)


def spec_digest(spec: JobSpec) -> str:
    """sha256 over the spec and over size and time of change of every file that it names.

    A model trained again under the same path makes another job.
    """
    files = sorted(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(spec)
    )
    text = json.dumps([spec.model_dump(mode="json"), files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(spec: JobSpec) -> Iterator[Path]:
    references = (spec.model.source, spec.data.evaluation, spec.data.training or "")
    named = [r.partition(":")[2] for r in references if r.partition(":")[0] in FILE_SCHEMES]
    for path in map(Path, [*named, *([spec.model.weights] if spec.model.weights else [])]):
        if path.is_dir():
            yield from (entry for entry in path.rglob("*") if entry.is_file())
        elif path.is_file():
            yield path
