"""Names of records: short, lowercase, sortable by the time they were made.

An id is a prefix that tells the noun, a dash, and 13 characters of Crockford's base 32
(https://www.crockford.com/base32.html): 8 of milliseconds since 2026 (enough for 34 years)
and 5 of randomness. Artifacts have no id of this kind: their sha256 is their name. That of a
trial's measurement ends in a digest of what is asked (`autotune/search/fleet.py`), by which it is
found again after a restart.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Final

JOB: Final = "j"
TRIAL: Final = "t"
MEASUREMENT: Final = "m"
DEVICE: Final = "d"
AGENT: Final = "a"
LEASE: Final = "l"

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_EPOCH_MS: Final = 1_767_225_600_000  # 2026-01-01T00:00:00Z
_TIME_CHARACTERS: Final = 8
_RANDOM_CHARACTERS: Final = 5
_RANDOM_BITS: Final = 5 * _RANDOM_CHARACTERS

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """An id that no other call returned, larger than every earlier one of this process.

    >>> first, second = new_id("t"), new_id("t")
    >>> first < second, first[:2], len(first)
    (True, 't-', 15)
    """
    global _last  # ids of one process only grow, also within a millisecond
    with _lock:
        now_ms = max(time.time_ns() // 1_000_000 - _EPOCH_MS, 0)
        _last = max(_last + 1, (now_ms << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS))
        return f"{prefix}-{_encode(_last)}"


def _encode(number: int) -> str:
    length = _TIME_CHARACTERS + _RANDOM_CHARACTERS
    shifts = range(5 * (length - 1), -1, -5)
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in shifts)
