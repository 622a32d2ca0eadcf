"""The kernel class of a processor, and what can be faster there."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.compression.kernels import (
    ARM,
    ARM_DOT,
    ARM_DOT_HALF,
    KERNEL_CLASSES,
    OTHER,
    X86,
    X86_VNNI,
    KernelClass,
    kernel_class,
    kernels_of,
    why_not_faster,
)
from search_spaces import FP16, FP32, INT8, W1, W2, W4, W8, W8A16, Precision


@pytest.mark.parametrize(
    ("architecture", "flags", "expected"),
    [
        ("x86_64", ("avx2", "avx512_vnni"), X86_VNNI),
        ("AMD64", ("avx_vnni",), X86_VNNI),
        ("x86_64", ("avx2", "avx512f"), X86),
        ("aarch64", ("asimd", "asimddp"), ARM_DOT),
        ("arm64", ("asimddp", "asimdhp", "fphp"), ARM_DOT_HALF),
        ("aarch64", ("asimd",), ARM),
        ("armv7l", ("neon",), ARM),
        ("riscv64", (), OTHER),
    ],
)
def test_a_processor_has_one_class(
    architecture: str, flags: tuple[str, ...], expected: KernelClass
) -> None:
    assert kernel_class(architecture, flags) == expected


def test_no_description_gets_the_codes_that_fit_everywhere() -> None:
    assert kernels_of(None) == OTHER
    assert OTHER.scheme == "u8s7"


def test_schemes_name_signs_and_bits() -> None:
    schemes = {name: c.scheme for name, c in KERNEL_CLASSES.items()}
    assert (schemes["x86-vnni"], schemes["x86"]) == ("u8s8", "u8s7")
    assert (schemes["arm-dot"], schemes["arm"]) == ("s8s8", "s8s7")


def test_reduced_codes_never_saturate_two_products_in_16_bits() -> None:
    """vpmaddubsw adds two products of an unsigned and a signed byte in int16."""
    largest = 2 * 255 * X86.largest_weight_code
    assert largest <= np.iinfo(np.int16).max < 2 * 255 * X86_VNNI.largest_weight_code


@pytest.mark.parametrize("precision", [FP32, INT8, Precision.parse("w8a8-tensor")])
def test_fp32_and_int8_may_be_fast_everywhere(precision: Precision) -> None:
    for kernels in KERNEL_CLASSES.values():
        for is_matrix in (True, False):
            assert why_not_faster(precision, kernels, is_matrix_product=is_matrix) is None


@pytest.mark.parametrize("precision", [W8, W4, W2, Precision.parse("w4-block64")])
def test_packed_weights_may_be_fast_in_matrix_products_only(precision: Precision) -> None:
    assert why_not_faster(precision, X86_VNNI, is_matrix_product=True) is None
    reason = why_not_faster(precision, X86_VNNI, is_matrix_product=False)
    assert reason is not None
    assert "convolution" in reason


@pytest.mark.parametrize("precision", [W8A16, W1, Precision.parse("w4-channel")])
def test_what_computes_in_float_is_never_faster(precision: Precision) -> None:
    assert why_not_faster(precision, ARM_DOT, is_matrix_product=True)


def test_float16_may_be_fast_where_the_processor_has_it() -> None:
    assert why_not_faster(FP16, ARM_DOT_HALF, is_matrix_product=False) is None
    assert "16-bit float" in (why_not_faster(FP16, X86_VNNI, is_matrix_product=False) or "")
