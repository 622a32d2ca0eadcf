"""Weights of a torch module: read from a file without unpickling, held against the module.

Owns the reading of `.pt` and `.safetensors` files and what is said of weights that do not fit.
Which model they belong to is `source.py`'s business.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autotune.errors import InvalidModel

_LISTED = 3
"""Keys that a message names; the rest is counted."""


def read_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """The state_dict in a file; `.safetensors` or what `torch.save` writes, told by content.

    A state_dict under `state_dict`, `model_state_dict` or `model` is found; a leading
    `module.` (of DataParallel) is removed.

    Raises:
        InvalidModel: there is no such file, it is damaged, of another kind, or holds more
            than tensors.
    """
    if not path.is_file():
        raise InvalidModel(f"the weights file {path} does not exist")
    state = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise InvalidModel(f"{path} does not hold a state_dict (a mapping of names to tensors)")
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InvalidModel(
            f"{path} is no state_dict: {_listed(others)} are not tensors; save "
            "model.state_dict() alone"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def load_weights(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], *, where: str, model: str
) -> None:
    """Copy the weights into the module; every parameter and buffer must be there.

    `where` and `model` name the file and the model in messages. A missing
    `num_batches_tracked` does no harm: it counts training steps.

    Raises:
        InvalidModel: keys that are missing, of another shape or unexpected, a few of each.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    reshaped = [
        f"{k!r} has shape {tuple(state[k].shape)}, the model needs {tuple(tensor.shape)}"
        for k, tensor in own.items()
        if k in state and state[k].shape != tensor.shape
    ]
    unexpected = [k for k in state if k not in own]
    faults = []
    if missing:
        faults.append(f"they have no {_listed([repr(k) for k in missing])}")
    if reshaped:
        faults.append(_listed(reshaped, between="; "))
    if unexpected:
        faults.append(f"the model does not have {_listed([repr(k) for k in unexpected])}")
    if faults:
        raise InvalidModel(
            f"the weights {where!r} do not fit {model!r}: {'; '.join(faults)}. "
            + _advice(any(key in state for key in own), missing, reshaped)
        )
    for key, tensor in own.items():
        if not tensor.is_floating_point() or key not in state:
            continue
        bad = int((~torch.isfinite(state[key].float())).sum())
        if bad:
            raise InvalidModel(
                f"{key!r} holds {bad} values that are NaN or infinite in the weights {where!r}; "
                "train the model again or take an earlier checkpoint"
            )
    module.load_state_dict({key: state.get(key, tensor) for key, tensor in own.items()})


def _advice(is_similar: bool, missing: Sequence[str], reshaped: Sequence[str]) -> str:
    if not is_similar:
        return "Not one key agrees: they belong to another model, or carry a prefix to remove"
    if len(reshaped) <= 2 and not missing:
        return "Give the num_classes with which they were trained, or the weights of this model"
    return "Name the model that they were saved from, or give the weights of this one"


def _listed(names: Sequence[str], *, between: str = ", ") -> str:
    """The first few, and how many more there are."""
    shown = between.join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(sorted(load_file(path).items()))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidModel(
            f"{path} is not a whole .safetensors file (truncated or damaged?); copy or save it "
            "again"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_torch_file(path):
            raise _not_weights(path) from error
        raise InvalidModel(
            f"{path} holds more than tensors and is not unpickled; save the state_dict alone, "
            "or as .safetensors"
        ) from error
    except Exception as error:
        # torch raises several unrelated classes for a damaged file
        raise _not_weights(path) from error


def _not_weights(path: Path) -> InvalidModel:
    return InvalidModel(
        f"{path} is neither a whole file of torch.save nor of safetensors (truncated or of "
        "another kind?); copy or save it again"
    )


def _is_torch_file(path: Path) -> bool:
    """What torch writes is a zip; before version 1.6 it was a pickle, protocol 2."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _is_safetensors(path: Path) -> bool:
    """By content, because an upload has no suffix: eight bytes of length, then a JSON object.

    The safetensors format specification; a torch file begins with a zip's or a pickle's mark.
    """
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and not head.startswith((b"PK", b"\x80"))
