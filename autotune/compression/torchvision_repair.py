"""The one place that imports torchvision.

A torchvision whose compiled operators do not fit the installed torch (a CUDA build beside a
CPU torch) fails at import, although its models, transforms and datasets need none of them.
Only then, and only for that reason, the two missing operator schemas are declared; where the
compiled operators load, nothing is touched.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

from autotune.errors import InvalidModel

_MISSING_OPERATOR = "torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A torch Library withdraws its schemas when it is collected, so it lives as long as the process.
_declared: list[torch.library.Library] = []


@functools.cache
def import_torchvision() -> ModuleType:
    """The torchvision module, with `torchvision.models` loaded.

    Raises:
        InvalidModel: torchvision is not installed or fails for another reason.
    """
    try:
        return _load()
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise InvalidModel(f"torchvision cannot be imported: {error}") from error
    except ImportError as error:
        raise InvalidModel(
            f"torchvision cannot be imported: {error}; install edge-autotune[service]"
        ) from error
    _forget_half_imported()
    _declare_schemas()
    return _load()


def _load() -> ModuleType:
    module = importlib.import_module("torchvision")
    importlib.import_module("torchvision.models")
    return module


def _declare_schemas() -> None:
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)


def _forget_half_imported() -> None:
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
