"""The parts of one file while it is written: nodes in order, constants by name.

Owns serialization and its reuse: a part that was made for an earlier candidate is not made
again. What the parts say is `graph_writer.py`'s business; joining them is `wire.py`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from autotune.compression.wire import Part, array_field, node_field

CONTRIB_DOMAIN = "com.microsoft"


class KeptParts:
    """Serialized nodes and constants of earlier candidates, by what shapes them.

    A layer's codes depend on its input's scale, so that they come in variants; those used
    longest ago go once all of them take more than `limit_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._n_bytes = 0
        self._parts: dict[tuple[object, ...], bytes] = {}
        self._arrays: OrderedDict[tuple[object, ...], Mapping[str, Part]] = OrderedDict()

    def part(self, key: tuple[object, ...], make: Callable[[], bytes]) -> bytes:
        """The serialized part with that key, made once."""
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = make()
        return part

    def arrays(
        self, key: tuple[object, ...], make: Callable[[], Mapping[str, np.ndarray]]
    ) -> Mapping[str, Part]:
        """The serialized constants with that key, made anew only where they had to go."""
        parts = self._arrays.get(key)
        if parts is not None:
            self._arrays.move_to_end(key)
            return parts
        parts = {name: array_field(array, name) for name, array in make().items()}
        self._arrays[key] = parts
        self._n_bytes += _size(parts)
        while self._n_bytes > self._limit_bytes and len(self._arrays) > 1:
            _, oldest = self._arrays.popitem(last=False)
            self._n_bytes -= _size(oldest)
        return parts


def _size(parts: Mapping[str, Part]) -> int:
    return sum(len(part) for part in parts.values())


class Parts:
    """One file's nodes and constants; each constant once, in the order of first use.

    `source` has the source model's constants by name, as fields of a graph.
    """

    def __init__(self, source: Mapping[str, Part], kept: KeptParts) -> None:
        self.nodes: list[bytes] = []
        self.constants: dict[str, Part] = {}
        self.needs_contrib = False
        self._source = source
        self._kept = kept

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str,
        *,
        contrib: bool = False,
        **attributes: int | float | str,
    ) -> None:
        """Append a node; its name, inputs and outputs tell it from every other one."""
        self.needs_contrib |= contrib
        domain = CONTRIB_DOMAIN if contrib else None

        def make() -> bytes:
            return node_field(
                helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes)
            )

        key = (operator, domain, name, *inputs, "->", *outputs)
        self.nodes.append(self._kept.part(key, make))

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Append a copy of the source's node with other inputs and outputs."""

        def make() -> bytes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:], copy.output[:] = inputs, outputs
            return node_field(copy)

        key = (node.op_type, node.name, *inputs, "->", *outputs)
        self.nodes.append(self._kept.part(key, make))

    def arrays(self, key: tuple[object, ...], make: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Add constants; `key` tells them from others of the same name."""
        self.constants.update(self._kept.arrays(key, make))

    def constant(self, name: str, value: float, dtype: type[np.generic]) -> str:
        """Add a number under a name that no other value has; returns the name."""
        if name not in self.constants:
            key = (name, dtype.__name__)
            self.arrays(key, lambda: {name: np.asarray(value, dtype=dtype)})
        return name

    def source_constant(self, name: str) -> None:
        """Add a constant of the source model; nothing happens where it is none."""
        if name in self._source and name not in self.constants:
            self.constants[name] = self._source[name]
