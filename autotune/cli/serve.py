"""`autotune serve`: the service that jobs and agents talk to.

Owns the options; every one left out keeps the value of `autotune.settings`, which reads the
environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port; 0 takes a free one.  [default: 8577]",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder of the database, the artifacts and the token.  "
    "[default: ~/.local/share/edge-autotune]",
)
@click.option(
    "--database-url",
    help="sqlite:///PATH or postgresql+psycopg://...  [default: SQLite in the data directory]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that build and evaluate candidates.  [default: one per usable core]",
)
@click.option(
    "--trust-job-code/--no-trust-job-code",
    default=None,
    help="Run Python code that jobs name (`python:` sources and data).  [default: no]",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain (PEM).")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Private key (PEM).")
@click.option(
    "--insecure",
    is_flag=True,
    default=None,
    help="Listen beyond loopback without TLS; tokens then travel in the clear.",
)
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path),
    help="File to write address and token into (JSON) once the service answers.",
)
def serve(ready_file: Path | None, **given: Any) -> None:
    """Run the service until it is told to stop (Ctrl-C or SIGTERM).

    It takes jobs one after the other; a restart goes on where it was. Users and agents
    authenticate with tokens; the first user token is made at the first start and kept in the data
    directory. Every option but --ready-file can be set in the environment: AUTOTUNE_PORT for
    --port.
    """
    from autotune.service.server import serve as run_service
    from autotune.settings import Settings

    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    run_service(settings, ready_file=ready_file)
