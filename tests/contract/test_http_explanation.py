"""A trial's explanation over HTTP, and as the command line prints it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

import pytest

from autotune.cli import root as cli
from autotune.cli.session import Session
from autotune.errors import JobNotReady, NotFoundError
from search_spaces import FP32, INT8, RuntimeOptions, SearchSpace
from storage.records import DeviceRecord, JobRecord, JobTarget, TrialOutcome
from tests.running_service import RunningService

Call = Callable[..., tuple[int, str, str]]


def job_with_space(service: RunningService, device: DeviceRecord) -> JobRecord:
    job = service.finished_job(device)
    assert job.inventory is not None
    space = SearchSpace.build(
        job.inventory,
        precisions=(FP32, INT8),
        prune_ratios=(0.0, 0.25, 0.5),
        runtimes=[RuntimeOptions(threads=n) for n in range(1, 41)],
    )
    return service.repository.update_job(job.id, space=space)


@pytest.fixture(scope="module")
def finished(service: RunningService) -> JobRecord:
    _, device = service.enrol("gateway")
    return job_with_space(service, device)


@pytest.fixture
def call(service: RunningService, capsys: pytest.CaptureFixture[str]) -> Call:
    def invoke(*arguments: str) -> tuple[int, str, str]:
        session = Session(connect=lambda *_: service.client)
        code = cli.run(["--url", service.url, "--token", "t", *arguments], session)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return invoke


def test_the_winner_is_explained_where_no_trial_is_named(
    service: RunningService, finished: JobRecord
) -> None:
    found = service.client.explain(finished.id)
    assert found.number == 7 and found.device_id == finished.device_id
    assert finished.inventory is not None
    assert [g.group for g in found.groups] == [g.name for g in finished.inventory.groups]
    assert found.n_fitted == 38 and found.model_error is not None and found.model_error.n == 37
    assert found.measured_latency_ns is not None
    assert service.client.job(finished.id).explain() == found


def test_any_trial_is_explained_a_failed_one_by_what_is_predicted(
    service: RunningService, finished: JobRecord
) -> None:
    failed = service.client.explain(finished.id, 39)
    assert failed.measured_latency_ns is None and failed.latency_ns.value > 0
    with pytest.raises(NotFoundError, match=r"400.*or named knee, fastest, most-accurate"):
        service.client.explain(finished.id, 400)


def test_a_job_that_measured_nothing_says_so(service: RunningService) -> None:
    with pytest.raises(JobNotReady, match="nothing to explain; it is queued"):
        service.client.explain(service.submit().id)


def test_on_several_devices_it_is_the_one_where_the_trial_is_worst(
    service: RunningService,
) -> None:
    _, first = service.enrol("near")
    _, second = service.enrol("far")
    job = job_with_space(service, first)
    for trial in service.repository.list_trials(job.id):
        if trial.outcome is TrialOutcome.OK:
            service.repository.update_trial(
                trial.id,
                on=second.id,
                outcome=trial.outcome,
                accuracy=trial.accuracy,
                latency=trial.latency,
            )
    service.repository.update_job(
        job.id,
        further_targets=(
            JobTarget(device_id=second.id, latency_budget_ns=1.0, reference_latency_ns=5e6),
        ),
    )
    assert service.client.explain(job.id, 7).device_id == second.id
    asked = service.client.explain(job.id, 7, device="near")
    assert asked.device_id == first.id and asked.fp32_latency_ns == job.reference_latency_ns
    with pytest.raises(NotFoundError, match="does not measure on 'gateway'"):
        service.client.explain(job.id, 7, device="gateway")


# The command


def test_the_command_prints_each_groups_choice_with_its_reason(
    call: Call, finished: JobRecord
) -> None:
    code, out, _ = call("explain", finished.id, "#7")
    assert code == 0
    assert out.startswith("trial #7: latency measured 1.1376 [1.1285, 1.1467] ms, predicted")
    row = next(line for line in out.splitlines() if line.startswith("features.1.conv.0.0"))
    assert "±" in row and ("saves" in row or "costs" in row or "would" in row)
    assert "each of 37 trials predicted from the others" in out


def test_programs_get_a_row_per_choice_or_the_whole_document(
    call: Call, finished: JobRecord
) -> None:
    _, out, err = call("explain", finished.id, "7", "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 2 * 36 and "the model: fitted to 38 trials" in err
    for row in rows:
        assert float(row["saved_ns_low"]) <= float(row["saved_ns"]) <= float(row["saved_ns_high"])
    _, out, _ = call("explain", finished.id, "knee", "-o", "json")
    assert json.loads(out)["groups"][0]["choices"][0]["precision"] == "fp32"
