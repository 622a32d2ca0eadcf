"""The things a search may choose: a precision per layer group, and runtime options.

Owns the names of precisions. Whether a runtime really executes one is the compressor's
and the device's business, not this module's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from search_spaces.errors import InvalidChoice

_BITS = (1, 2, 4, 8, 16, 32)
_NAME = re.compile(r"^w(\d+)(?:a(\d+))?$")


@dataclass(frozen=True, slots=True, order=True)
class Precision:
    """Bits of a layer group's weights and of its activations.

    32 means float. `activation_bits=32` with fewer weight bits is weight-only quantization:
    weights are stored small and the arithmetic stays in float.

    >>> Precision(8, 8).name, Precision(4, 32).name, Precision(32, 32).name
    ('w8a8', 'w4', 'fp32')
    >>> Precision.parse("w8a8") == Precision(8, 8)
    True
    """

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        if self.weight_bits not in _BITS or self.activation_bits not in (8, 16, 32):
            raise InvalidChoice(
                f"no precision has {self.weight_bits}-bit weights and "
                f"{self.activation_bits}-bit activations; weights take {_BITS} bits, "
                "activations 8, 16 or 32"
            )

    @property
    def name(self) -> str:
        """The short name used in job files, tables and canonical JSON."""
        if (self.weight_bits, self.activation_bits) == (32, 32):
            return "fp32"
        if self.activation_bits == 32:
            return f"w{self.weight_bits}"
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def is_float(self) -> bool:
        """Nothing is quantized."""
        return self.weight_bits == 32 and self.activation_bits == 32

    @property
    def is_weight_only(self) -> bool:
        """Weights are quantized, activations stay in float."""
        return self.weight_bits < 16 and self.activation_bits == 32

    @classmethod
    def parse(cls, name: str) -> Precision:
        """The precision of a short name; `int8` is read as `w8a8`.

        Raises:
            InvalidChoice: the name is not one of `fp32`, `w8a8`, `w8`, `w4` and their like.
        """
        lowered = name.strip().lower()
        if lowered in ("fp32", "float32"):
            return FP32
        if lowered == "int8":
            return INT8
        match = _NAME.match(lowered)
        if match is None:
            raise InvalidChoice(
                f"{name!r} is not a precision; write fp32, w8a8 (INT8), w8 or w4 (weight-only)"
            )
        return cls(int(match[1]), int(match[2] or 32))

    def __str__(self) -> str:
        return self.name


FP32 = Precision(32, 32)
INT8 = Precision(8, 8)
W8 = Precision(8, 32)
W4 = Precision(4, 32)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RuntimeOptions:
    """How the runtime is started on the device; it changes latency, never the artifact."""

    runtime: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise InvalidChoice(f"threads is {self.threads}; it must be 1 or more")
