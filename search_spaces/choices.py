"""The things a search may choose: a precision per layer group, and runtime options.

Owns the names of precisions and what they stand for. Whether a runtime really executes one is
the compressor's and the device's business, not this module's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from search_spaces.errors import InvalidChoice

DEFAULT_BLOCK = 32
"""Weights per scale of a block-wise matrix: the smallest that onnxruntime 1.31's MatMulNBits has
in all its kernels; smaller blocks are more accurate."""

_BLOCKS = (16, 32, 64, 128, 256)
# What MatMulNBits takes: a power of two from 16 on (its specification in com.microsoft).
_KINDS = ((32, 32), (16, 16), (8, 8), (8, 16), (8, 32), (4, 32), (2, 32), (1, 32))
_NAME = re.compile(r"^w(\d+)(?:a(\d+))?((?:-[a-z0-9]+)*)$")
_ALIASES = {"float32": "fp32", "float16": "fp16", "w16a16": "fp16", "int8": "w8a8"}
_HOW_TO_WRITE = (
    "write fp32, fp16, w8a8 (INT8), w8a16, or weight-only w8, w4, w2, w1; with -tensor, -channel "
    "or -block64 for what shares a scale, and -symmetric or -asymmetric, as in w4-block64"
)


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for all weights of a layer."""

    @property
    def name(self) -> str:
        """The part of a precision's name."""
        return "tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for the weights of each output channel."""

    @property
    def name(self) -> str:
        """The part of a precision's name."""
        return "channel"


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale for every `size` weights along the input of a matrix product."""

    size: int = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        if self.size not in _BLOCKS:
            listed = ", ".join(str(size) for size in _BLOCKS)
            raise InvalidChoice(f"a block of {self.size} weights has no kernel; take {listed}")

    @property
    def name(self) -> str:
        """The part of a precision's name."""
        return f"block{self.size}"


Granularity = PerTensor | PerChannel | PerBlock


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits of a layer group's weights and of its activations, and how codes map to numbers.

    Both 32 or both 16 mean float. `activation_bits=32` with fewer weight bits is weight-only
    quantization: weights are stored small and activations stay float.

    `granularity` says which weights share a scale; None is what the precision has by default:
    blocks of 32 in a weight-only matrix product, else output channels. `symmetric` says
    whether zero lies in the middle of the codes: those of the weights in a weight-only
    precision (default: it does), those of the activations in one that quantizes them
    (default: it does not; their weights always are). Writing a default out changes nothing.

    >>> Precision(8, 8).name, Precision(4, 32).name, Precision(16, 16).name
    ('w8a8', 'w4', 'fp16')
    >>> Precision.parse("w4-block64-asymmetric")
    Precision(weight_bits=4, activation_bits=32, granularity=PerBlock(size=64), symmetric=False)
    >>> Precision.parse("w8a8-channel") == Precision(8, 8)
    True
    """

    weight_bits: int
    activation_bits: int
    granularity: Granularity | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        bits = (self.weight_bits, self.activation_bits)
        if bits not in _KINDS:
            raise InvalidChoice(
                f"no precision has {bits[0]}-bit weights and {bits[1]}-bit activations; "
                f"{_HOW_TO_WRITE}"
            )
        has_codes = self.weight_bits in (2, 4, 8)
        if not has_codes and (
            self.granularity not in (None, self._default()) or self.symmetric is not None
        ):
            raise InvalidChoice(f"{self._bits_name} has neither granularity nor symmetry to choose")
        if not self.is_weight_only and isinstance(self.granularity, PerBlock):
            raise InvalidChoice(
                f"{self._bits_name} has no block-wise kernel; blocks are for weight-only w8, w4, w2"
            )
        if self.granularity == self._default():
            object.__setattr__(self, "granularity", None)
        if not has_codes or self.symmetric == self.is_weight_only:
            object.__setattr__(self, "symmetric", None)

    @property
    def name(self) -> str:
        """The short name used in job files, tables and canonical JSON."""
        parts = [self._bits_name]
        if self.granularity is not None:
            parts.append(self.granularity.name)
        if self.symmetric is not None:
            parts.append("symmetric" if self.symmetric else "asymmetric")
        return "-".join(parts)

    @property
    def plain(self) -> Precision:
        """The precision with the same bits and nothing else chosen."""
        return Precision(self.weight_bits, self.activation_bits)

    @property
    def is_float(self) -> bool:
        """The source model's own precision: nothing is rounded."""
        return self.weight_bits == 32

    @property
    def is_half(self) -> bool:
        """Weights and activations are 16-bit floats."""
        return (self.weight_bits, self.activation_bits) == (16, 16)

    @property
    def is_weight_only(self) -> bool:
        """Weights are quantized, activations stay in float."""
        return self.weight_bits < 16 and self.activation_bits == 32

    @property
    def is_int8(self) -> bool:
        """Weights and activations are 8-bit: the layer can run on integer kernels."""
        return self.activation_bits == 8

    @property
    def is_symmetric(self) -> bool:
        """`symmetric` with its default filled in."""
        return self.is_weight_only if self.symmetric is None else self.symmetric

    @classmethod
    def parse(cls, name: str) -> Precision:
        """The precision of a short name; `int8` is read as `w8a8`, `float16` as `fp16`.

        Raises:
            InvalidChoice: the name is none; the message says how one is written.
        """
        lowered = name.strip().lower()
        lowered = _ALIASES.get(lowered, lowered)
        if lowered in ("fp32", "fp16"):
            return FP32 if lowered == "fp32" else FP16
        match = _NAME.match(lowered)
        if match is None:
            raise InvalidChoice(f"{name!r} is not a precision; {_HOW_TO_WRITE}")
        granularity, symmetric = _options(name, match[3].split("-")[1:])
        return cls(int(match[1]), int(match[2] or 32), granularity, symmetric)

    def __lt__(self, other: Precision) -> bool:
        """Fewer weight bits first, then fewer activation bits, then by name."""
        return self._order() < other._order()

    def __str__(self) -> str:
        return self.name

    @property
    def _bits_name(self) -> str:
        if self.weight_bits in (16, 32):
            return f"fp{self.weight_bits}"
        suffix = "" if self.activation_bits == 32 else f"a{self.activation_bits}"
        return f"w{self.weight_bits}{suffix}"

    def _default(self) -> Granularity:
        is_block_wise = self.is_weight_only and self.weight_bits > 1
        return PerBlock() if is_block_wise else PerChannel()

    def _order(self) -> tuple[int, int, str]:
        return self.weight_bits, self.activation_bits, self.name


def _options(name: str, words: list[str]) -> tuple[Granularity | None, bool | None]:
    """Granularity and symmetry, each given at most once."""
    granularity: Granularity | None = None
    symmetric: bool | None = None
    for word in words:
        if word in ("symmetric", "asymmetric") and symmetric is None:
            symmetric = word == "symmetric"
        elif word in ("tensor", "channel") and granularity is None:
            granularity = PerTensor() if word == "tensor" else PerChannel()
        elif word[:5] == "block" and word[5:].isdigit() and granularity is None:
            granularity = PerBlock(int(word[5:]))
        else:
            raise InvalidChoice(
                f"{name!r} is not a precision: {word!r} is no part; {_HOW_TO_WRITE}"
            )
    return granularity, symmetric


FP32 = Precision(32, 32)
FP16 = Precision(16, 16)
INT8 = Precision(8, 8)
W8A16 = Precision(8, 16)
W8 = Precision(8, 32)
W4 = Precision(4, 32)
W2 = Precision(2, 32)
W1 = Precision(1, 32)


GRAPH_LEVELS = ("all", "layout", "extended", "basic", "disabled")
"""How far onnxruntime rewrites a graph before it runs it, farthest first (its documentation,
"Graph Optimizations in ONNX Runtime"). Another runtime has `all`, whatever it does by itself."""

USUAL_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """How the runtime is started on the device; it changes latency, never the artifact.

    `provider` is the execution provider, by onnxruntime's names for all runtimes; `threads`
    compute one inference. `memory_arena`: the runtime keeps freed memory for the next
    inference; `spinning`: threads that wait for work keep their core busy, which says something
    with two threads or more.

    Ordered by runtime, provider (the processor first) and threads; what is off by default
    comes last, so that the first of several options is the plainest.

    >>> RuntimeOptions(threads=2, spinning=False).to_json()
    {'runtime': 'onnxruntime', 'provider': 'CPUExecutionProvider', 'threads': 2, 'spinning': False}
    """

    runtime: str = "onnxruntime"
    provider: str = USUAL_PROVIDER
    threads: int = 1
    graph_level: str = GRAPH_LEVELS[0]
    memory_arena: bool = True
    spinning: bool = True

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise InvalidChoice(f"threads is {self.threads}; it must be 1 or more")
        if self.graph_level not in GRAPH_LEVELS:
            raise InvalidChoice(
                f"graph level {self.graph_level!r} is not known; write {', '.join(GRAPH_LEVELS)}"
            )

    @property
    def unusual(self) -> dict[str, Any]:
        """The options beside provider and threads that are not what a plain session has."""
        plain = RuntimeOptions()
        return {
            name: value
            for name in ("graph_level", "memory_arena", "spinning")
            if (value := getattr(self, name)) != getattr(plain, name)
        }

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; unusual options alone are written out, so that digests last."""
        return {
            "runtime": self.runtime,
            "provider": self.provider,
            "threads": self.threads,
            **self.unusual,
        }

    def __lt__(self, other: RuntimeOptions) -> bool:
        return self._order() < other._order()

    def _order(self) -> tuple[Any, ...]:
        return (
            self.runtime,
            (self.provider != USUAL_PROVIDER, self.provider),
            self.threads,
            GRAPH_LEVELS.index(self.graph_level),
            not self.memory_arena,
            not self.spinning,
        )
