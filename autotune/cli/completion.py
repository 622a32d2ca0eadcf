"""`autotune completion`: the script that makes a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

# Behind a backspace click keeps the lines as they are; a docstring could not hold one.
_HELP = """Print the completion script of a shell.

\b
bash: autotune completion bash >> ~/.bashrc
zsh:  autotune completion zsh >> ~/.zshrc
fish: autotune completion fish > ~/.config/fish/completions/autotune.fish
"""


@click.command(help=_HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script; where it goes is in the help."""
    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"no completion is known for {shell}")
    root = ctx.find_root().command
    click.echo(script(root, {}, "autotune", "_AUTOTUNE_COMPLETE").source())
