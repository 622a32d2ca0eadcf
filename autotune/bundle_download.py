"""A downloaded bundle on the user's disk: all of it or nothing, and never over something else.

Owns the writing only. Bundles are made and read in `autotune/export/bundle.py`.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from autotune import errors
from device_agents.files import NO_ROOM

_OF_NOBODY = frozenset({"__pycache__", ".DS_Store"})
"""What may lie in a bundle's folder beside its files: Python and macOS's Finder leave these."""


def write_bundle(path: Path, content: bytes) -> Path:
    """Put the archive `content` at `path`: as it is for a `.zip`, else unpacked as a folder.

    An earlier bundle there is replaced in one step. A folder that holds anything else is left
    alone: whatever somebody keeps in it would be deleted.

    Raises:
        BundleError: something that is no bundle is there, or it cannot be written.
        DiskFull: there is no room for it; what was there before still is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            _replace_file(path, content)
        else:
            _replace_folder(path, content)
    except (OSError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise errors.DiskFull(f"no room is left to write the bundle {path}") from error
        raise errors.BundleError(f"cannot write the bundle {path}: {error}") from error
    return path


def _replace_file(path: Path, content: bytes) -> None:
    if path.exists() and not zipfile.is_zipfile(path):
        raise errors.BundleError(f"{path} is not a bundle; it is left alone. Name another path")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _replace_folder(path: Path, content: bytes) -> None:
    """Unpack beside `path`, then put it in place, so that no half bundle is ever seen."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    _require_replaceable(path, {*files, *_OF_NOBODY})
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        part.chmod(0o755)
        for name, data in files.items():
            if Path(name).name != name:
                raise errors.BundleError(f"the bundle holds {name!r}, which is not its own")
            (part / name).write_bytes(data)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _require_replaceable(path: Path, own: set[str]) -> None:
    if path.exists() and not path.is_dir():
        raise errors.BundleError(f"{path} is not a bundle; it is left alone. Name another path")
    others = sorted({entry.name for entry in path.iterdir()} - own) if path.exists() else []
    if others:
        raise errors.BundleError(
            f"{path} holds {others[0]}, which is no part of a bundle; it is left alone. Name "
            "another path"
        )
