"""What every command shares: where the service is, who asks, and how to print.

Owns the options `--url`, `--token` and `-o`, accepted before and after the command's name.
Connecting is `autotune.client`'s work; printing is `output.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from autotune.client import Client

FORMATS = ("table", "json", "jsonl", "csv")

_Command = TypeVar("_Command", bound=Callable[..., Any])


def connect(url: str, token: str) -> Client:
    """The client of the service at `url`."""
    from autotune.client import Client

    return Client(url, token)


@dataclass(slots=True)
class Session:
    """The shared options of one call. `connect` is replaced by tests."""

    url: str | None = None
    token: str | None = None
    output_format: str = "table"
    debug: bool = False
    connect: Callable[[str, str], Client] = field(default=connect)

    def client(self) -> Client:
        """A client of the service asked for, or of the local one.

        Raises:
            ServiceError: no address is given and no local service has left one.
            AuthenticationError: no token is given and none is known for the address.
        """
        url, token = self.url, self.token
        if url is None or token is None:
            from autotune.cli.local import local_service

            url, token = local_service(url, token)
        return self.connect(url, token)


def _store(name: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
    def callback(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            setattr(ctx.ensure_object(Session), name, value)

    return callback


def format_option(command: _Command) -> _Command:
    """Add `-o`."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(FORMATS),
        expose_value=False,
        callback=_store("output_format"),
        help="How to print data: table (for people), json, jsonl or csv.  [default: table]",
    )(command)


def shared_options(command: _Command) -> _Command:
    """Add `--url`, `--token` and `-o`."""
    url = click.option(
        "--url",
        envvar="AUTOTUNE_URL",
        expose_value=False,
        callback=_store("url"),
        help="Address of the service.  [env: AUTOTUNE_URL; default: the local one]",
    )
    token = click.option(
        "--token",
        envvar="AUTOTUNE_TOKEN",
        expose_value=False,
        callback=_store("token"),
        help="User token.  [env: AUTOTUNE_TOKEN; default: the local service's]",
    )
    return url(token(format_option(command)))
