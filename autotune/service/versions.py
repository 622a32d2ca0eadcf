"""Which agents this service understands, by the version of the protocol that they speak.

Owns the refusal of the others, with the command to run. The versions and what changed between
them are `device_agents.protocol`'s.
"""

from __future__ import annotations

import autotune
from autotune.errors import UpgradeRequired
from device_agents.protocol import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, SPOKEN_VERSIONS

UPGRADE_HEADER = {"Upgrade": f"edge-autotune/{PROTOCOL_VERSION}"}
"""A 426 must name what to upgrade to (RFC 9110, section 15.5.22)."""


def require_version(version: int) -> None:
    """Let a message of a version that is spoken here pass.

    Raises:
        UpgradeRequired: the agent is older or newer than that; the message says what to install.
    """
    if version in SPOKEN_VERSIONS:
        return
    command = "`pip install --upgrade edge-autotune`"
    if version < OLDEST_PROTOCOL_VERSION:
        advice = f"on the device, run {command} and start the agent again"
    else:
        advice = (
            f"on the service's machine, run {command} and start it again; or on the device, "
            f"`pip install edge-autotune=={autotune.__version__}`"
        )
    spoken = f"{OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
    raise UpgradeRequired(
        f"the agent speaks protocol version {version}, this service (release "
        f"{autotune.__version__}) versions {spoken}: {advice}"
    )
