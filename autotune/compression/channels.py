"""How many channels a pruned group keeps: the floor, and the multiples that kernels like.

Pure arithmetic and its checks, for torch modules and ONNX graphs alike. Which channels stay is
`importance.py`'s, their removal `pruning.py`'s and `onnx_pruning.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from autotune.errors import CompressionError

MIN_CHANNELS = 8
"""No group is pruned below this: one vector of 8 floats, the narrowest AVX2 kernel."""

MIN_PRUNABLE_CHANNELS = 16
"""Narrower groups are not offered: half of 15 channels rounds to the floor of 8 or to nothing."""


def channel_multiple(cpu_flags: Collection[str]) -> int:
    """The multiple that channels are rounded to on a device with these CPU flags.

    16 with AVX-512, else 8: the channels per block of onnxruntime's convolution kernels
    (`NchwcBlockSize` in its mlas/lib/platform.cpp). On Arm it has blocks only where it was
    built with them; 8 leaves the NEON kernels, 4 floats wide, no remainder.

    >>> channel_multiple(("avx2", "avx512f")), channel_multiple(("asimd", "asimddp"))
    (16, 8)
    """
    return 16 if "avx512f" in cpu_flags else 8


def kept_channels(channels: int, ratio: float, *, round_to: int = 8, block: int = 1) -> int:
    """How many of `channels` stay at a prune ratio: the nearest multiple of `round_to`.

    Halves round up (the larger model). A group narrower than twice `round_to` is rounded to
    half of it, and so on. Never below `MIN_CHANNELS` or `round_to`, never above `channels`;
    always whole blocks of `block` channels. `round_to` is the device's `channel_multiple`.

    >>> kept_channels(96, 0.25), kept_channels(64, 0.3), kept_channels(24, 0.9)
    (72, 48, 8)
    >>> kept_channels(104, 0.5, round_to=16, block=8), kept_channels(72, 0.5, block=24)
    (48, 48)
    """
    if ratio <= 0.0:
        return channels
    multiple = round_to
    while multiple > 1 and channels < 2 * math.lcm(multiple, block):
        multiple //= 2
    unit = math.lcm(multiple, block)
    rounded = math.floor(channels * (1.0 - ratio) / unit + 0.5) * unit
    floor = math.ceil(max(MIN_CHANNELS, round_to) / block) * block
    return min(channels, max(floor, rounded))


def require_known(ratios: Mapping[str, float], groups: Collection[str]) -> None:
    """Return if every ratio is a fraction and names one of the prunable groups.

    Raises:
        CompressionError: the message names the group or the ratio, and what is allowed.
    """
    for name, ratio in ratios.items():
        if name not in groups:
            raise CompressionError(
                f"no prunable group is called {name!r}; there are: " + (", ".join(groups) or "none")
            )
        if not 0.0 <= ratio < 1.0:
            raise CompressionError(
                f"prune ratio {ratio} of group {name!r} is not a fraction in [0, 1)"
            )
