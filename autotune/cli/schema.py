"""`autotune schema`: the JSON Schema of the job file, for editors and generators."""

from __future__ import annotations

import click


@click.command()
def schema() -> None:
    """Print the JSON Schema of the job file.

    An editor with YAML support completes and checks job files with it; the same text is
    published as docs/job.schema.json.
    """
    from autotune.spec import job_schema_text

    click.echo(job_schema_text(), nl=False)
