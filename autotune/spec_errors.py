"""What is wrong with a job file, in its writer's words.

Owns the translation of pydantic's errors, with the nearest known key. The format itself is
`spec.py`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

# What pydantic calls a class or a tuple is one of these in YAML.
_SHAPES = {
    "model_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
}


def explain(entry: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One error of pydantic about a document that should be a `root`, for its writer."""
    where = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return _unknown_key(tuple(str(part) for part in entry["loc"]), root)
    if entry["type"] == "missing":
        return f"{where}: this key is required"
    if entry["type"] in _SHAPES:
        return f"{where}: must be {_SHAPES[entry['type']]} (got {entry['input']!r})"
    if entry["type"] == "string_pattern_mismatch":
        schemes = entry["ctx"]["pattern"].removeprefix("^(").removesuffix("):.+").split("|")
        *first, last = (f"{scheme}:" for scheme in schemes)
        return f"{where}: must begin with {', '.join(first)} or {last} (got {entry['input']!r})"
    message = str(entry["msg"]).removeprefix("Value error, ")
    return f"{where}: {message} (got {entry['input']!r})"


def _unknown_key(location: tuple[str, ...], root: type[BaseModel]) -> str:
    *parents, key = location
    section = root
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    known: Iterable[str] = section.model_fields
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{'.'.join(location)}: unknown key {key!r}; {hint}"
