"""Pruned bases on disk: what it took minutes to train is trained once per machine.

Owns the folder `bases/DIGEST` with the pruned FP32 graph, its calibration and its facts; a
file lock lets one process build while others wait. What a base is made of, and how, is
`compressor.py`'s business.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autotune.compression.calibration import Calibration
from autotune.compression.rounding import Rounding
from autotune.errors import CompressionError, DiskFull

BASE_VERSION = 4
# Version 1 (2026-11-21): model.onnx, calibration.json, base.json with facts and the file's sha256.
# Version 2 (2026-11-21): facts.pruning; the recovery says why it stopped.
# Version 3 (2026-11-21): rounding.npz with rounded weights, facts.post_training; calibration.json
# holds histograms, each channel's range and the method of each tensor's.
# Version 4 (2026-11-21): rounding.npz holds each output's step too.
# 2026-11-22: reduced.npz beside it, where a device asked for codes that end at 64; written later
# than the rest, so that no sha256 holds it.

REDUCED_FILE = "reduced.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """What a pruned base is and what it cost; the empty ratios are the source model itself.

    `macs` (one sample) and `parameters` count the layers with weights. `pruning` says how
    channels were ranked and rounded and how many stayed, None where nothing was pruned.
    `recovery` is the recovery training's report, None where there was none; `note` says why.
    `post_training` has uniform INT8's divergence on the calibration samples, in nats, as kept
    (`mean_kl`) and with plain ranges and nearest codes (`plain_kl`).
    """

    digest: str
    prune_ratios: Mapping[str, float] = field(default_factory=dict)
    macs: int
    parameters: int
    pruning: Mapping[str, Any] | None = None
    recovery_epochs: int = 0
    recovery_s: float = 0.0
    recovery: Mapping[str, Any] | None = None
    note: str | None = None
    post_training: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> BaseFacts:
        """The facts that `to_json` wrote."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A pruned FP32 graph's file, the ranges of its tensors and its rounded 8-bit weights."""

    facts: BaseFacts
    file: bytes
    calibration: Calibration
    rounding: Rounding = field(default_factory=Rounding)


class BaseStore:
    """Bases by digest, under one folder that several processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "bases"

    def get_or_make(self, digest: str, make: Callable[[], Base]) -> Base:
        """The stored base; made, stored and returned where there is none (or a damaged one).

        Raises:
            DiskFull: there is no room for it.
            CompressionError: the folder cannot be written; or whatever `make` raises.
        """
        found = self._read(digest)
        if found is not None:
            return found
        with self._locked(digest):
            found = self._read(digest)
            if found is None:
                found = make()
                self._write(digest, found)
        return found

    def reduced_rounding(self, digest: str, make: Callable[[], Rounding]) -> Rounding:
        """A stored base's weights rounded for reduced range; made where there are none yet.

        Raises:
            DiskFull: there is no room for them.
            CompressionError: the folder cannot be written; or whatever `make` raises.
        """
        path = self._folder / digest / REDUCED_FILE
        with self._locked(digest):
            with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
                return Rounding.from_bytes(path.read_bytes())
            found = make()
            with _disk_errors(self._folder):
                part = path.with_suffix(".part")  # no other process: the lock is held
                part.write_bytes(found.to_bytes())
                part.replace(path)
            return found

    def _read(self, digest: str) -> Base | None:
        folder = self._folder / digest
        try:
            facts = json.loads((folder / "base.json").read_text(encoding="utf-8"))
            data = (folder / "model.onnx").read_bytes()
            text = (folder / "calibration.json").read_text(encoding="utf-8")
            if facts["version"] != BASE_VERSION:
                return None
            rounding = (folder / "rounding.npz").read_bytes()
        except (OSError, ValueError):
            return None
        if facts["sha256"] != _sha256(data, text.encode(), rounding):
            return None
        return Base(
            facts=BaseFacts.from_json(facts["facts"]),
            file=data,
            calibration=Calibration.from_text(text),
            rounding=Rounding.from_bytes(rounding),
        )

    def _write(self, digest: str, base: Base) -> None:
        data, text, rounding = base.file, base.calibration.to_text(), base.rounding.to_bytes()
        facts = {
            "version": BASE_VERSION,
            "sha256": _sha256(data, text.encode(), rounding),
            "facts": base.facts.to_json(),
        }
        with _disk_errors(self._folder):
            part = Path(tempfile.mkdtemp(prefix=f"{digest[:12]}.part-", dir=self._folder))
            try:
                (part / "model.onnx").write_bytes(data)
                (part / "calibration.json").write_text(text, encoding="utf-8")
                (part / "rounding.npz").write_bytes(rounding)
                (part / "base.json").write_text(json.dumps(facts), encoding="utf-8")
                target = self._folder / digest
                shutil.rmtree(target, ignore_errors=True)  # a damaged one, or none
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """Across processes; the system releases the lock of one that dies."""
        with _disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._folder / f"{digest}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no room is left for a pruned model under {folder}; free some space and resume"
            ) from error
        raise CompressionError(f"cannot write under {folder}: {error}") from error
