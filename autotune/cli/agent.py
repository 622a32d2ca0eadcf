"""`autotune agent`: the agent's own commands, reached through `autotune`.

Owns nothing but the name: on a device with the base install alone they are `autotune-agent`.
"""

from __future__ import annotations

import click

from device_agents.cli import main

agent = click.Group(
    name="agent",
    commands=main.commands,
    help=f"{main.help} The same as `autotune-agent`.",
    epilog=main.epilog,
)
