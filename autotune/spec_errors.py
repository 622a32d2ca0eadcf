"""What is wrong with a job file, in its writer's words.

Owns the translation of pydantic's errors, with the nearest known key, and of YAML's. The
format itself is `spec.py`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

# What a value must be, by pydantic's name of the error, in the words of YAML.
_WANTED = {
    "model_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "too_short": "a list of at least one",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
}


def explain(entry: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One error of pydantic about a document that should be a `root`, for its writer."""
    where = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return _unknown_key(tuple(str(part) for part in entry["loc"]), root)
    if entry["type"] == "missing":
        return f"{where}: this key is required"
    if entry["type"] in _WANTED:
        wanted = _WANTED[entry["type"]] + _unit(where, entry["input"])
        return f"{where}: must be {wanted} (got {entry['input']!r})"
    if entry["type"] == "string_pattern_mismatch":
        schemes = entry["ctx"]["pattern"].removeprefix("^(").removesuffix("):.+").split("|")
        *first, last = (f"{scheme}:" for scheme in schemes)
        return f"{where}: must begin with {', '.join(first)} or {last} (got {entry['input']!r})"
    message = str(entry["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    return f"{where}: {message} (got {entry['input']!r})"


def yaml_fault(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What the parser met and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}"


def _unit(where: str, given: object) -> str:
    """What to write in place of a number with a unit; empty for anything else."""
    text = given.strip() if isinstance(given, str) else ""
    if text.endswith("%") and text[:-1].replace(".", "", 1).isdigit():
        return f", a fraction: {float(text[:-1]) / 100:g} for {text}"
    return " of seconds" if where.endswith("_s") and text else ""


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
