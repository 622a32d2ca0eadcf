"""Submits a job, follows it, asks two budgets and exports: `python -m examples.python_client.tune`.

Needs `autotune.client` alone, so it runs where torch is not installed. The service is the
one at `AUTOTUNE_URL`, with a user token in `AUTOTUNE_TOKEN`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from autotune.api_types import Front, Trial
from autotune.client import Client
from autotune.errors import AutotuneError
from autotune.spec import read_job

DEFAULT_URL = "http://127.0.0.1:8577"


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code is that of the error, if there is one."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.python_client.tune",
        description="Tune a model through the service at AUTOTUNE_URL, with AUTOTUNE_TOKEN.",
    )
    parser.add_argument("job", type=Path, metavar="JOB.yaml", help="the job file")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bundle.zip"),
        metavar="PATH",
        help="the bundle: a folder, or a file that ends in .zip (%(default)s)",
    )
    parser.add_argument("--budget", help="another budget to ask for at the end, such as 3ms")
    options = parser.parse_args(arguments)
    url = os.environ.get("AUTOTUNE_URL", DEFAULT_URL)
    try:
        with Client(url, os.environ.get("AUTOTUNE_TOKEN", "")) as client:
            tune(client, options.job, options.out, budget=options.budget)
    except AutotuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def tune(client: Client, job_file: Path, out: Path, *, budget: str | None = None) -> None:
    """From job file to bundle; progress goes to stderr, the fronts to stdout."""
    job = client.submit(read_job(job_file))
    for event in client.events(job.id):
        print(f"{event.created_at:%H:%M:%S} {event.kind}", file=sys.stderr)
    job = client.wait(job.id)
    if job.result is None:
        raise AutotuneError(f"job {job.id} ended as {job.state}: {job.reason}")
    print_front(client.front(job.id))
    if budget is not None:  # another budget costs no measurement: the trials are all kept
        print_front(client.front(job.id, budget=budget))
    print(f"bundle: {client.export(job.id, out)}")


def print_front(front: Front) -> None:
    """One line per trial, fastest first; the answer is marked."""
    for trial in front.trials:
        mark = "*" if front.answer is not None and trial.id == front.answer.id else " "
        print(f"{mark} trial {trial.number:3}  {_latency(trial)}  {_accuracy(trial)}")
    print(front.explanation)


def _latency(trial: Trial) -> str:
    if trial.latency_ns is None:
        return "not measured"
    low, high = trial.latency_ns.low / 1e6, trial.latency_ns.high / 1e6
    return f"{trial.latency_ns.value / 1e6:.3f} ms [{low:.3f}, {high:.3f}]"


def _accuracy(trial: Trial) -> str:
    if trial.accuracy is None:
        return "no accuracy"
    return f"accuracy {trial.accuracy.value:.1%} (n={trial.accuracy_samples})"


if __name__ == "__main__":
    raise SystemExit(main())
