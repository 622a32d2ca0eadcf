"""`autotune agent`: the agent's own command line, reached through `autotune`.

On a device that has nothing but the base install the same program is `autotune-agent`.
"""

from __future__ import annotations

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[run|measure|probe] ...")
def agent(arguments: tuple[str, ...]) -> int:
    """Run the agent that measures on this device (the same as `autotune-agent`)."""
    from device_agents.cli import main

    return main(list(arguments)) or 0
