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
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of everything kept.")
@click.option(
    "--database-url",
    help="sqlite:///PATH or postgresql+psycopg://...  [default: SQLite in the data directory]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes.")
@click.option(
    "--trust-job-code/--no-trust-job-code",
    default=None,
    help="Let jobs run Python code that they name.  [default: no]",
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
    help="Written with address and token once the service answers.",
)
def serve(ready_file: Path | None, **given: Any) -> None:
    """Run the service until it is told to stop (Ctrl-C or SIGTERM).

    It takes jobs one after the other; a restart goes on where it was. Users and agents
    authenticate with tokens; the first user token is made at the first start.
    """
    from autotune.service.server import serve as run_service
    from autotune.settings import Settings

    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    run_service(settings, ready_file=ready_file)
