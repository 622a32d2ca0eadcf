"""A downloaded bundle on the user's disk: all of it or nothing, and never over something else.

Owns the writing only. Bundles are made and read in `autotune/export/bundle.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from autotune import errors


def write_bundle(path: Path, content: bytes) -> Path:
    """Put the archive `content` at `path`: as it is for a `.zip`, else unpacked as a folder.

    Raises:
        BundleError: something that is no bundle is there, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            return _replace_file(path, content)
        return _replace_folder(path, content)
    except (OSError, zipfile.BadZipFile) as error:
        raise errors.BundleError(f"cannot write the bundle {path}: {error}") from error


def _replace_file(path: Path, content: bytes) -> Path:
    if path.exists() and not zipfile.is_zipfile(path):
        raise errors.BundleError(f"{path} is not a bundle; it is left alone. Name another path")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _replace_folder(path: Path, content: bytes) -> Path:
    """Unpack beside `path`, then put it in place, so that no half bundle is ever seen."""
    if path.exists() and not _is_bundle_or_empty(path):
        raise errors.BundleError(f"{path} is not a bundle; it is left alone. Name another path")
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                if Path(name).name != name:
                    raise errors.BundleError(f"the bundle holds {name!r}, which is not its own")
            archive.extractall(part)
        part.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _is_bundle_or_empty(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return True
    with contextlib.suppress(OSError, ValueError):
        return isinstance(json.loads((path / "reports.json").read_text(encoding="utf-8")), dict)
    return False
