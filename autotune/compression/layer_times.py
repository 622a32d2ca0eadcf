"""Which layer group each kernel of a profile computes.

Owns the way back from a runtime's names to the graph's: runtimes name a fused kernel after one
of its nodes or after the tensor that it makes, with marks of their own. Taking the profile is
the device's work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from autotune.errors import CompressionError
from device_agents.protocol import KernelTime, LatencyReport, Profile
from search_spaces import LayerGroup

# onnxruntime: `conv1_token_4`, `relu_nchwc`, `fused conv1`; OpenVINO: `conv1/WithoutBiases`.
_MARKS = re.compile(r"^fused |(_token_\d+|_nchwc|_nhwc)+$|/WithoutBiases.*$")
_BETWEEN = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput", "Reorder",
        "Transpose", "Convert", "FakeQuantize",
    }
)  # fmt: skip
"""Operators that carry data from one group to the next: what they take is the boundary's."""


def by_group(
    report: LatencyReport, artifact: Callable[[], bytes], groups: Iterable[LayerGroup]
) -> LatencyReport:
    """The report with the layer groups of its profile's kernels; itself without a profile.

    `artifact` gives the file that was measured, where it is asked for.
    """
    if report.profile is None or not report.profile.kernels:
        return report
    try:
        profile = with_groups(report.profile, artifact(), groups)
    except CompressionError:  # no ONNX graph: a simulated artifact
        return report
    return report.model_copy(update={"profile": profile})


def with_groups(profile: Profile, artifact: bytes, groups: Iterable[LayerGroup]) -> Profile:
    """The profile with each kernel's layer group; None for those between groups or outside.

    `artifact` is the file that was profiled: a kernel may carry the name of a tensor in it.

    Raises:
        CompressionError: the artifact is not an ONNX graph.
    """
    group_of = {node: group.name for group in groups for node in group.nodes}
    makers = makers_of(artifact)
    kernels = [_attributed(kernel, group_of, makers) for kernel in profile.kernels]
    return profile.model_copy(update={"kernels": tuple(kernels)})


def _attributed(kernel: KernelTime, group_of: dict[str, str], makers: dict[str, str]) -> KernelTime:
    name = _MARKS.sub("", kernel.name)
    node = name if name in group_of else makers.get(name, name)
    # The parts that an operator was taken apart into carry its name and theirs.
    group = group_of.get(node) or group_of.get(node.rsplit("/", 1)[0])
    if kernel.operator in _BETWEEN and name not in group_of:
        group = None
    return kernel.model_copy(update={"group": group})


def makers_of(artifact: bytes) -> dict[str, str]:
    """The node behind each tensor; behind a Q or a DQ the node whose result it carries.

    Raises:
        CompressionError: the artifact is not an ONNX graph.
    """
    import onnx  # with the first profile: the service starts without it

    try:
        graph = onnx.load_model_from_string(artifact).graph
    except Exception as error:  # protobuf's own error class depends on its build
        raise CompressionError(f"the artifact is not an ONNX model: {error}") from error
    makers: dict[str, str] = {}
    for node in graph.node:
        carried = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        name = makers.get(node.input[0], node.name) if carried else node.name
        makers.update(dict.fromkeys(node.output, name))
        if carried:
            makers.setdefault(node.name, name)
    return makers
