"""What a process that runs a model is kept from: the network, and outliving its parent.

Owns the system calls. Who is confined, and when, is `measurement_child.py`'s choice. Run as
`python -m device_agents.isolation`: exit code 0 where the kernel allows it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h


def leave_network() -> bool:
    """Move into a network of its own, which has no way out; whether the kernel allows it.

    Root may do so at once, others inside a user namespace of their own (unshare(2)), where the
    distribution has not switched those off; the process may have one thread only then.
    """
    if sys.platform != "linux":
        return False
    unshare = ctypes.CDLL(None).unshare
    return any(unshare(flags) == 0 for flags in (CLONE_NEWNET, CLONE_NEWUSER | CLONE_NEWNET))


def die_with_parent() -> None:
    """End when the thread that started this process does, where the kernel can arrange it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def can_leave_network() -> bool:
    """Whether `leave_network` would work, tried out in a process that ends at once."""
    command = [sys.executable, "-m", "device_agents.isolation"]
    tried = subprocess.run(command, check=False, env=os.environ, capture_output=True)  # noqa: S603
    return tried.returncode == 0


if __name__ == "__main__":
    raise SystemExit(0 if leave_network() else 1)
