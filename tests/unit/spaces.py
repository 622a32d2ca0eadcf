"""A small inventory and space for tests: a stem, a depthwise, a heavy conv, a classifier."""

from __future__ import annotations

from search_spaces import (
    Layer,
    LayerGroup,
    LayerInventory,
    LayerKind,
    Precision,
    PrunableGroup,
    RuntimeOptions,
    SearchSpace,
)


def group(name: str, macs: int, kind: LayerKind = LayerKind.CONV) -> LayerGroup:
    """One layer that can be FP32 or INT8; a Gemm also weight-only."""
    layer = Layer(
        name=name,
        kind=kind,
        op_type="Gemm" if kind is LayerKind.GEMM else "Conv",
        macs=macs,
        parameters=macs // 10,
        weight_shape=(8, 8, 3, 3),
        input_shape=(8, 16, 16),
        output_shape=(8, 16, 16),
    )
    precisions = ("fp32", "w8a8", "w8", "w4") if kind is LayerKind.GEMM else ("fp32", "w8a8")
    return LayerGroup(name=name, layers=(layer,), nodes=(f"node_{name}",), precisions=precisions)


def inventory() -> LayerInventory:
    """Four groups, two of them prunable."""
    return LayerInventory(
        model_digest="0" * 64,
        groups=(
            group("stem", 1000),
            group("dw", 50, LayerKind.DEPTHWISE_CONV),
            group("body", 9000),
            group("head", 100, LayerKind.GEMM),
        ),
        prunable_groups=(
            PrunableGroup(name="stem", channels=32, layers=("stem", "dw")),
            PrunableGroup(name="body", channels=64, layers=("body",)),
        ),
    )


def space(
    *, ratios: tuple[float, ...] = (0.25, 0.5), threads: tuple[int, ...] = (1,)
) -> SearchSpace:
    """The small inventory with every precision."""
    return SearchSpace.build(
        inventory(),
        precisions=[Precision.parse(name) for name in ("w8a8", "w8", "w4")],
        prune_ratios=ratios,
        runtimes=[RuntimeOptions(threads=n) for n in threads],
    )
