"""The probe of one runtime: loads it and writes its build as one line of JSON.

Run as `python -m device_agents.runtimes NAME` by `device.probe_runtimes`, in a process that
may die. Exit code 1: the runtime does not load here.
"""

from __future__ import annotations

import json
import sys

from device_agents.errors import RuntimeUnavailable
from device_agents.runtimes import load_runtime


def probe(name: str) -> int:
    """Write the build of the runtime of that name; the process's exit code."""
    try:
        runtime = load_runtime(name)
    except RuntimeUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    build = {
        "name": name,
        "version": runtime.version,
        "providers": list(runtime.providers()),
        "options": list(getattr(runtime, "options", ())),
    }
    sys.stdout.write(json.dumps(build) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(probe(sys.argv[1]))
