"""The room that is kept back for a full disk."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from storage.reserve import DiskReserve


def test_the_room_is_really_taken_and_given_up(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "reserve", size_bytes=1 << 16)
    reserve.hold()
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= 1 << 16
    reserve.release()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_already_keeps_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    DiskReserve(tmp_path / "reserve").hold()
    assert list(tmp_path.iterdir()) == []
