"""The limits of an answer on the command line: asked of a front, an export, or a job itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli_fakes import JOB_FILE, Call, FakeClient

LIMITS = ("--at", "p90", "--max-size", "3MB", "--max-memory", "60MB", "--max-energy", "5mJ")
KEYS = {"latency_at": "p90", "max_size": "3MB", "max_memory": "60MB", "max_energy": "5mJ"}


@pytest.mark.parametrize("command", ["front", "export"])
def test_a_question_names_its_limits(command: str, call: Call, client: FakeClient) -> None:
    assert call(command, "job-1", "--budget", "3ms", *LIMITS) == 0
    assert client.limits and all(limits == KEYS for limits in client.limits)


def test_a_job_is_submitted_with_other_limits_than_its_file_has(
    call: Call,
    client: FakeClient,
    tmp_path: Path,
) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(JOB_FILE + "max_size: 9MB\n")
    asked = ("--latency-budget", "5ms", "--max-drop", "1%", *LIMITS)
    assert call("job", "submit", str(job_file), *asked) == 0
    (spec,) = client.submitted
    assert (spec.latency_budget, spec.max_accuracy_drop) == ("5ms", 0.01)
    assert {key: getattr(spec, key) for key in KEYS} == KEYS


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max-size", "3", "write 3MB, 800kB or 2MiB"),
        ("--max-memory", "0MB", "write 3MB, 800kB or 2MiB"),
        ("--max-energy", "5 kcal", "write 5mJ, 800uJ or 0.1J"),
        ("--at", "p95", "'p50', 'p90', 'p99'"),
    ],
)
def test_a_limit_that_cannot_be_read_is_told_what_to_write(
    option: str,
    value: str,
    words: str,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("front", "job-1", option, value) == 2
    assert words in capsys.readouterr().err
