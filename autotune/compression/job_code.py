"""Code of a job, `python:MODULE:FUNCTION`: imported and called here, in one place.

Owns the call. Whether the job's code may run at all is for those to say who take the result
(`data.py`, `source.py`), and what they need it to be.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def call(reference: str) -> Any:
    """What `MODULE:FUNCTION` returns; modules of the working directory are found, too.

    Raises whatever the code raises.
    """
    module_name, _, function_name = reference.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    function: Any = importlib.import_module(module_name)
    for part in function_name.split("."):
        function = getattr(function, part)
    return function()
