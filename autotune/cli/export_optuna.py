"""`autotune export-optuna`: a job as a study in an Optuna storage."""

from __future__ import annotations

import click

from autotune.cli.session import Session, shared_options


@click.command("export-optuna")
@click.argument("job", metavar="JOB")
@click.argument("storage", metavar="STORAGE")
@click.option("--name", help="What to call the study.  [default: the job's name and id]")
@shared_options
@click.pass_obj
def export_optuna(session: Session, job: str, storage: str, name: str | None) -> None:
    """Write a job's trials as a study into an Optuna storage; print the study's name.

    STORAGE is an address such as sqlite:///study.db. `optuna-dashboard sqlite:///study.db`
    shows it. A study of that name which is there already is left alone.
    """
    from autotune.studies import study_of

    client = session.client()
    shown = client.job(job)
    study = study_of(shown, client.trials(shown.id), storage=storage, name=name)
    click.echo(f"{len(study.trials)} trials written to {storage}", err=True)
    click.echo(study.study_name)
