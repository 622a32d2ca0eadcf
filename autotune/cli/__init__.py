"""The command line: `autotune` and its subcommands, one file per noun.

Owns words, tables and exit codes; it computes nothing. Commands load when they are called,
and heavy libraries inside them, so that `--help` answers at once. Data goes to stdout, talk
to stderr. What a command asks for is done by the service behind `autotune.client`.
"""

from __future__ import annotations

from autotune.cli.root import cli, main

__all__ = ["cli", "main"]
