"""`autotune schema`: the job file's JSON Schema, and the reference of all that has a name."""

from __future__ import annotations

import click


@click.command()
@click.option(
    "--reference",
    is_flag=True,
    help="Print the reference of commands, exit codes, settings and keys, as Markdown, instead.",
)
def schema(reference: bool) -> None:
    """Print the JSON Schema of the job file.

    An editor with YAML support completes and checks job files with it; the same text is
    published as autotune/docs/job.schema.json.
    """
    if reference:
        from autotune.cli.reference import reference_text

        click.echo(reference_text(), nl=False)
        return
    from autotune.spec import job_schema_text

    click.echo(job_schema_text(), nl=False)
