"""What may be searched: layer inventories, choices, spaces and candidates.

Standard library only: this package is the vocabulary that the service, the search and the
storage share, so it must import anywhere. Nothing here touches a model file or a device.
"""

from search_spaces.candidate import Candidate
from search_spaces.choices import (
    FP16,
    FP32,
    GRAPH_LEVELS,
    INT8,
    USUAL_PROVIDER,
    W1,
    W2,
    W4,
    W8,
    W8A16,
    PerBlock,
    PerChannel,
    PerTensor,
    Precision,
    RuntimeOptions,
)
from search_spaces.layers import (
    FloatOperator,
    Layer,
    LayerGroup,
    LayerInventory,
    LayerKind,
    LayerPattern,
    PrunableGroup,
)
from search_spaces.space import SearchSpace, can_take

__all__ = [
    "FP16",
    "FP32",
    "GRAPH_LEVELS",
    "INT8",
    "USUAL_PROVIDER",
    "W1",
    "W2",
    "W4",
    "W8",
    "W8A16",
    "Candidate",
    "FloatOperator",
    "Layer",
    "LayerGroup",
    "LayerInventory",
    "LayerKind",
    "LayerPattern",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "Precision",
    "PrunableGroup",
    "RuntimeOptions",
    "SearchSpace",
    "can_take",
]
