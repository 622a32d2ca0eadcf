"""`autotune device`: the devices that measure, and how to add one."""

from __future__ import annotations

import shlex
import sys

import click

from autotune.cli.session import Session, shared_options


@click.group()
def device() -> None:
    """List, enroll and show devices."""


@device.command("ls")
@shared_options
@click.pass_obj
def list_devices(session: Session) -> None:
    """List the devices that enrolled, and whether their agents are there."""
    from autotune.cli.output import print_rows
    from autotune.cli.views.devices import DEVICES

    devices = session.client().devices()
    print_rows(DEVICES, devices, output_format=session.output_format, to=sys.stdout)


@device.command("show")
@click.argument("reference", metavar="DEVICE")
@shared_options
@click.pass_obj
def show(session: Session, reference: str) -> None:
    """Show what one device is and what it can run.

    DEVICE is an id, the unique start of one, or a name.
    """
    from autotune.cli.output import print_one
    from autotune.cli.views.devices import DEVICE

    shown = session.client().device(reference)
    print_one(DEVICE, shown, output_format=session.output_format, to=sys.stdout)


@device.command("enroll")
@click.option("--pool", help="Name of a set of identical devices that this one joins.")
@click.option("--name", help="Name of the device.  [default: its host name]")
@click.option(
    "--service-url",
    help="Address under which the device reaches the service.  [default: the one used here]",
)
@shared_options
@click.pass_obj
def enroll(session: Session, pool: str | None, name: str | None, service_url: str | None) -> None:
    """Print the one command to run on a device, to make it measure for this service.

    The command holds a token that enrolls one device, once, within the time shown.
    """
    client = session.client()
    token = client.enrolment_token(pool)
    url = service_url or client.url
    words = ["autotune-agent", "run", "--service", url, "--token", token.token]
    if name is not None:
        words += ["--name", name]
    minutes = token.expires_in_s / 60
    click.echo(f"run this on the device within {minutes:.0f} min; it works once:", err=True)
    if session.output_format == "table":
        click.echo(shlex.join(words))
    else:
        from autotune.cli.output import print_one
        from autotune.cli.views.devices import ENROLMENTS

        row = (shlex.join(words), token)
        print_one(ENROLMENTS, row, output_format=session.output_format, to=sys.stdout)
