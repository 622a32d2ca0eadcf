"""What one candidate's file follows from, decided before a node is written.

Owns no decision: `placement.py` and `wide.py` say what runs on which codes, `quantization.py`
puts a plan together, `graph_writer.py` writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from autotune.compression.calibration import Calibration
from autotune.compression.equalization import Stretched
from autotune.compression.graph import GraphView
from autotune.compression.kernels import KernelClass
from autotune.compression.operators import WeightedNode
from autotune.compression.placement import Placement
from autotune.compression.rounding import Rounding
from autotune.compression.wide import WidePlacement
from search_spaces import Precision


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that one candidate's file follows from."""

    view: GraphView
    layers: Mapping[str, WeightedNode]
    calibration: Calibration
    chosen: Mapping[str, Precision]
    placement: Placement
    wide: WidePlacement
    kernels: KernelClass
    stretched: Mapping[str, Stretched] = dataclasses.field(default_factory=dict)
    """Tensors whose codes stand for stretched channels in this candidate."""
    rounding: Rounding = dataclasses.field(default_factory=Rounding)

    def symmetric_roots(self) -> set[str]:
        """The tensors whose codes are symmetric around zero, because a layer wants them so.

        A tensor without negative values has zero at the end of its codes all the same, which
        wastes none; and a range that replaces an activation must end where the activation does.
        """
        roots: set[str] = set()
        for name, precision in self.chosen.items():
            if precision.is_half or precision.activation_bits == 32 or not precision.is_symmetric:
                continue
            layer = self.layers[name]
            out = self.placement.writes.get(layer.output, layer.output)
            for tensor in (layer.input, out):
                root = self.placement.stored.get(tensor, tensor)
                held, producer = self.calibration.ranges.get(root), self.view.producer.get(root)
                is_bound = producer is not None and producer.name in self.placement.absorbed
                if held is not None and held.low < 0 and not is_bound:
                    roots.add(root)
        return roots
