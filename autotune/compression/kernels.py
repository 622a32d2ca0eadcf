"""The kernel class of a device: how its 8-bit kernels want their codes, what can be fast there.

Owns the knowledge of processors, as pure functions of an architecture and its CPU flags; what
a device has is `device_agents`' business. An artifact is written for one kernel class: its
accuracy holds there.
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

from search_spaces import PerBlock, Precision

_X86 = frozenset({"x86_64", "amd64", "i386", "i686", "x86"})
_ARM = frozenset({"aarch64", "arm64", "armv7l", "armv8l", "armv6l", "arm"})
_X86_DOT = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
_ARM_DOT = frozenset({"asimddp", "i8mm"})
_ARM_HALF = frozenset({"asimdhp", "fphp"})

_FULL_RANGE = 127
REDUCED_RANGE = 64
# Without VNNI, x86 adds two products of 8-bit codes in 16 bits and saturates (vpmaddubsw):
# 2 x 255 x 64 is 32,640 and just fits (onnxruntime's `reduce_range` draws the same line).


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelClass:
    """The codes that the 8-bit kernels of a processor are fast and exact with.

    `signed_activations` tells s8s8 from u8s8; `largest_weight_code` is 127, or 64 where two
    products must fit into 16 bits; `has_half` says that float16 arithmetic exists.
    """

    name: str
    signed_activations: bool
    largest_weight_code: int
    has_half: bool = False

    @property
    def scheme(self) -> str:
        """Signs and bits of activations and weights: `u8s8`, `s8s8`, `u8s7` or `s8s7`."""
        weights = "s8" if self.largest_weight_code == _FULL_RANGE else "s7"
        return f"{'s8' if self.signed_activations else 'u8'}{weights}"


X86_VNNI = KernelClass(name="x86-vnni", signed_activations=False, largest_weight_code=_FULL_RANGE)
X86 = KernelClass(name="x86", signed_activations=False, largest_weight_code=REDUCED_RANGE)
ARM_DOT = KernelClass(name="arm-dot", signed_activations=True, largest_weight_code=_FULL_RANGE)
ARM_DOT_HALF = KernelClass(
    name="arm-dot-half", signed_activations=True, largest_weight_code=_FULL_RANGE, has_half=True
)
ARM = KernelClass(name="arm", signed_activations=True, largest_weight_code=REDUCED_RANGE)
OTHER = KernelClass(name="other", signed_activations=False, largest_weight_code=REDUCED_RANGE)
KERNEL_CLASSES = {c.name: c for c in (X86_VNNI, X86, ARM_DOT, ARM_DOT_HALF, ARM, OTHER)}


def kernel_class(architecture: str, cpu_flags: Collection[str]) -> KernelClass:
    """The class of a processor; an unknown architecture gets the codes that fit everywhere.

    >>> kernel_class("x86_64", ["avx2", "avx512_vnni"]).scheme
    'u8s8'
    >>> kernel_class("x86_64", ["avx2"]).scheme, kernel_class("aarch64", ["asimddp"]).scheme
    ('u8s7', 's8s8')
    """
    name, flags = architecture.lower(), set(cpu_flags)
    if name in _X86:
        return X86_VNNI if flags & _X86_DOT else X86
    if name in _ARM:
        if not flags & _ARM_DOT:
            return ARM
        return ARM_DOT_HALF if flags & _ARM_HALF else ARM_DOT
    return OTHER


class Processor(Protocol):
    """What a device's description says of its processor."""

    @property
    def architecture(self) -> str:
        """As `uname -m` gives it."""

    @property
    def cpu_flags(self) -> Collection[str]:
        """Those that decide about kernels, as Linux names them."""


def kernels_of(processor: Processor | None) -> KernelClass:
    """The class of a described processor; None gets the codes that fit everywhere."""
    if processor is None:
        return OTHER
    return kernel_class(processor.architecture, processor.cpu_flags)


def as_checked_here(kernels: KernelClass, *, architecture: str | None = None) -> KernelClass:
    """The class whose file this machine's onnxruntime fuses as the device's own fuses its.

    On x86 it leaves signed activations between Q and DQ where on Arm it takes both signs: what
    will be fused on the device is seen on the unsigned twin. `architecture` is this machine's.
    """
    if kernel_class(architecture or platform.machine(), ()).signed_activations:
        return kernels
    return replace(kernels, signed_activations=False)


def why_not_faster(
    precision: Precision, kernels: KernelClass, *, is_matrix_product: bool
) -> str | None:
    """Why the precision cannot be faster than FP32 there; None where it may be.

    Read off onnxruntime 1.31's CPU provider, the runtime that artifacts are written for: on
    one x86 core with VNNI (3x3 convolution, 128 channels, 28x28) FP32 takes 1.0 ms, w8a8 0.28,
    w8a16 1.3, fp16 1.2, and weights of 8 bits or fewer that are unpacked on loading 1.0.
    """
    if precision.is_half:
        return None if kernels.has_half else "the processor has no 16-bit float arithmetic"
    if precision.activation_bits == 16:
        return "the runtime has no kernel for 16-bit activations and computes in float"
    if not precision.is_weight_only:
        return None
    if precision.weight_bits == 1:
        return "the runtime has no kernel for binary weights and computes in float"
    if not is_matrix_product:
        return "the runtime has no convolution for packed weights and computes in float"
    if precision.granularity is not None and not isinstance(precision.granularity, PerBlock):
        return "the runtime multiplies packed matrices with block-wise scales only"
    return None
