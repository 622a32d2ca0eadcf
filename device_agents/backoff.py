"""How long to wait before trying again.

Owns the arithmetic only. What is tried again, and for how long, is the caller's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Exponential back-off with full jitter (Brooker 2015): between 0 and a doubling bound.

    Full jitter spreads a fleet that lost the service at one moment over the whole interval.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    uniform: Callable[[float, float], float] = random.uniform
    _n_failures: int = 0

    def next_s(self) -> float:
        """How long to wait now, in seconds."""
        bound = min(self.longest_s, self.first_s * 2**self._n_failures)
        self._n_failures = min(self._n_failures + 1, 30)
        return self.uniform(0, bound)

    def reset(self) -> None:
        """It worked: start from the shortest wait again."""
        self._n_failures = 0
