"""What may be faster than FP32 on one device: what it measured, and else what is known.

Owns the verdict for a layer group. The knowledge of processors is `kernels.py`'s; the figures
come from the device (`device_agents/kernel_benchmark.py`). What a job then offers is
`autotune.search.conclusion`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from autotune.compression.kernels import KernelClass, kernels_of, why_not_faster
from device_agents.protocol import DeviceDescription, KernelSpeed, RuntimeBuild
from search_spaces import Layer, LayerGroup, LayerKind, Precision

_OPERATORS = ("conv3x3", "conv1x1", "depthwise", "matmul")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKernels:
    """A device's kernel class, the speeds that it measured, and its runtimes."""

    kernels: KernelClass
    speeds: tuple[KernelSpeed, ...] = ()
    runtimes: tuple[RuntimeBuild, ...] = ()

    def why_not_faster(
        self, precision: Precision, group: LayerGroup, *, runtimes: Collection[str]
    ) -> str | None:
        """Why the group cannot be faster in the precision in any of these runtimes.

        None where it may be. A measured figure counts where its whole interval lies on one
        side of FP32; where it does not, or there is none, the table decides.
        """
        table = why_not_faster(precision, self.kernels, is_matrix_product=group.is_matrix_product)
        reasons = []
        for runtime in runtimes:
            figures = self._figures(runtime, precision, group)
            if any(high < 1 for _, _, high in figures):
                return None
            is_complete = len(figures) >= (1 if precision.is_weight_only else len(_OPERATORS))
            slower = is_complete and all(low > 1 for _, low, _ in figures)
            if not slower and table is None:
                return None
            reasons.append(_measured(runtime, figures) if slower else table)
        return reasons[0]

    def _figures(
        self, runtime: str, precision: Precision, group: LayerGroup
    ) -> list[tuple[float, float, float]]:
        """Ratio to FP32 with its bounds of the operators that say something about the group.

        Packed weights concern a layer alone. 8-bit and 16-bit activations run through many
        layers: a kind that is slower by itself saves what changing to FP32 and back would cost
        (depthwise layers in mobilenet_v2), so that the verdict is about all kinds together, and
        needs a figure of each.
        """
        if precision != precision.plain:
            return []
        name = precision.name
        if precision.is_int8:
            name += f"/{'s8s8' if self.kernels.signed_activations else 'u8s8'}"
        own = {_operator(layer) for layer in group.layers}
        return [
            figure
            for speed in self.speeds
            if (speed.runtime, speed.precision) == (runtime, name)
            and (
                own == {speed.operator}
                if precision.is_weight_only
                else speed.operator in _OPERATORS
            )
            and (figure := _figure(speed)) is not None
        ]


def device_kernels(description: DeviceDescription) -> DeviceKernels:
    """The kernels of a device that enrolled."""
    return DeviceKernels(
        kernels=kernels_of(description),
        speeds=description.kernel_speeds,
        runtimes=description.runtimes,
    )


def _figure(speed: KernelSpeed) -> tuple[float, float, float] | None:
    if speed.ratio is None or speed.ratio_low is None or speed.ratio_high is None:
        return None
    return speed.ratio, speed.ratio_low, speed.ratio_high


def _measured(runtime: str, figures: list[tuple[float, float, float]]) -> str:
    ratio, low, high = min(figures, key=lambda x: x[0])
    return (
        f"the device measured at least {ratio:.3g} ({low:.3g} to {high:.3g}) of FP32's time for "
        f"it in {runtime}"
    )


def _operator(layer: Layer) -> str | None:
    """The kind of the kernel benchmark's models; None where there is none."""
    if layer.kind is LayerKind.CONV:
        return "conv1x1" if set(layer.weight_shape[2:]) == {1} else "conv3x3"
    if layer.kind is LayerKind.DEPTHWISE_CONV:
        return "depthwise"
    return "matmul" if layer.kind in (LayerKind.GEMM, LayerKind.MATMUL) else None
