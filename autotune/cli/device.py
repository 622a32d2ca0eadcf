"""`autotune device`: the devices that measure, and how to add one."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import click

from autotune.cli.parameters import DIGEST
from autotune.cli.session import Session, shared_options

if TYPE_CHECKING:
    from autotune.api_types import Device


@click.group()
def device() -> None:
    """Enroll, list, show and revoke devices; see what crashed them."""


@device.command("ls")
@shared_options
@click.pass_obj
def list_devices(session: Session) -> None:
    """List the enrolled devices, and whether they are online."""
    from autotune.cli.output import print_rows
    from autotune.cli.views.devices import DEVICES

    devices = session.client().devices()
    print_rows(DEVICES, devices, output_format=session.output_format, to=sys.stdout)
    if not devices:
        click.echo(
            "no device has enrolled yet; `autotune device enroll` prints the command that does it",
            err=True,
        )


@device.command("show")
@click.argument("reference", metavar="DEVICE")
@shared_options
@click.pass_obj
def show(session: Session, reference: str) -> None:
    """Show a device: hardware, runtimes, and faster precisions.

    DEVICE is an id, the unique start of one, or a name.
    """
    from autotune.cli.output import print_one, print_rows
    from autotune.cli.views.devices import DEVICE, KERNEL_SPEEDS

    shown = session.client().device(reference)
    print_one(DEVICE, shown, output_format=session.output_format, to=sys.stdout)
    speeds = shown.description.get("kernel_speeds", [])
    if session.output_format == "table" and speeds:
        click.echo()
        print_rows(KERNEL_SPEEDS, speeds, output_format="table", to=sys.stdout)


@device.command("enroll")
@click.option(
    "--pool",
    help="Pool of identical devices that this one joins; it begins with the first one.  "
    "[default: none]",
)
@click.option("--name", help="Name of the device.  [default: its host name]")
@click.option(
    "--service-url",
    help="Address under which the device reaches the service.  [default: the one used here]",
)
@shared_options
@click.pass_obj
def enroll(session: Session, pool: str | None, name: str | None, service_url: str | None) -> None:
    """Print the command that makes a device measure for the service.

    The command holds a token that enrolls one device, once, within the time shown.
    """
    from autotune.client import is_loopback

    client = session.client()
    token = client.enrolment_token(pool)
    url = service_url or client.url
    if is_loopback(url):
        click.echo(
            f"{url} is reached from this machine alone; for another device pass --service-url "
            "with the address under which it sees the service",
            err=True,
        )
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


@device.command("rotate")
@click.argument("reference", metavar="DEVICE")
@shared_options
@click.pass_obj
def rotate(session: Session, reference: str) -> None:
    """Give a device's agent a new key.

    It gets it with its next heartbeat, as it does once a day anyway. The old key works until the
    new one was used, so that a lost answer locks nobody out.
    """
    _change(session, session.client().rotate_device_key(reference), "gets a new key")


@device.command("revoke")
@click.argument("reference", metavar="DEVICE")
@shared_options
@click.pass_obj
def revoke(session: Session, reference: str) -> None:
    """End the key of a device's agent: it measures no more.

    The agent is told and stops; what it is measuring goes back to the queue. To have the device
    back, enroll it again.
    """
    _change(session, session.client().revoke_device(reference), "has no valid key any more")


@device.command("resume")
@click.argument("reference", metavar="DEVICE")
@shared_options
@click.pass_obj
def resume(session: Session, reference: str) -> None:
    """Give a drained device work again, once it is repaired."""
    _change(session, session.client().resume_device(reference), "gets work again")


@device.command("quarantine")
@click.option(
    "--clear",
    type=DIGEST,
    metavar="DIGEST",
    help="Let the artifacts whose sha256 begins so (6 digits or more) be tried again.",
)
@shared_options
@click.pass_obj
def quarantine(session: Session, clear: str | None) -> None:
    """List the artifacts kept from the devices that they crash.

    An artifact goes there when it crashed two devices of a kind, or one of them three times.
    """
    from autotune.cli.output import print_rows
    from autotune.cli.views.devices import QUARANTINE

    client = session.client()
    found = client.quarantine() if clear is None else client.clear_quarantine(clear)
    if clear is not None:
        click.echo("cleared; these may be tried again:", err=True)
    print_rows(QUARANTINE, found, output_format=session.output_format, to=sys.stdout)


def _change(session: Session, changed: Device, what: str) -> None:
    from autotune.cli.output import print_one
    from autotune.cli.views.devices import DEVICE

    if session.output_format == "table":
        click.echo(f"device {changed.name} {what}", err=True)
    else:
        print_one(DEVICE, changed, output_format=session.output_format, to=sys.stdout)
