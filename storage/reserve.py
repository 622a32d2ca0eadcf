"""Room kept back on the disk, given up when it is full.

Owns one file of zeros. A full disk could otherwise not even take the few pages that say why a
job failed; what is written into the room that it leaves is the caller's business.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

RESERVE_BYTES: Final = 1 << 20  # a job's end is some 20 pages of 4 KiB; the rest is for the log


class DiskReserve:
    """The file at `path`; it comes and goes, and nothing depends on its being there."""

    def __init__(self, path: Path, *, size_bytes: int = RESERVE_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def hold(self) -> None:
        """Keep the room back, where there still is that much."""
        try:
            with self._path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, self._size_bytes)
        except OSError:  # full already, or a file system that cannot
            self.release()

    def release(self) -> None:
        """Give the room up."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
