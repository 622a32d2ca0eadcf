"""Confirming a trial after its job is over: what is kept, and the command for it."""

from types import SimpleNamespace

import pytest

from autotune.bundle_download import write_bundle
from autotune.cli.root import run
from autotune.cli.session import Session
from autotune.export.bundle import bundle_files, bundle_zip
from autotune.search.verification import keep_confirmation
from device_agents.protocol import Outcome
from tests.unit import fabricated_job as fabricated
from tests.unit.cli_fakes import FakeClient
from tests.unit.records import accuracy, latency

HELD_OUT = accuracy(0.9, split="held_out")


@pytest.fixture
def unconfirmed(bench):
    """A finished job and a trial of it that was measured once."""
    with bench.agent():
        job = bench.run(bench.job(search={"trials": 3, "prune_ratios": [0]}))
    trial = bench.repository.list_trials(job.id)[0]
    cleared = {"confirmed_latency": None, "held_out_accuracy": None}
    return job, bench.repository.update_trial(trial.id, **cleared)


def measured(report, outcome=Outcome.OK):
    return SimpleNamespace(outcome=outcome, report=report)


def test_a_second_measurement_confirms_a_trial_that_has_none(bench, unconfirmed):
    job, trial = unconfirmed
    report = latency(3.0)
    keep_confirmation(bench.repository, job, trial, measured(report), HELD_OUT)
    kept = bench.repository.get_trial(trial.id)
    assert kept.confirmed_latency.p50_ns == report.p50_ns
    assert kept.held_out_accuracy == HELD_OUT
    last = bench.repository.list_events(job.id)[-1]
    assert (last.kind, last.payload["number"]) == ("trial_confirmed", trial.number)


@pytest.mark.parametrize(
    "bad",
    [
        measured(None, Outcome.TIMEOUT),
        measured(latency(3.0, is_steady=False)),
        measured(latency(3.0, is_steady=False), Outcome.UNSTABLE),
    ],
)
def test_a_measurement_that_went_wrong_confirms_nothing(bench, unconfirmed, bad):
    job, trial = unconfirmed
    keep_confirmation(bench.repository, job, trial, bad, HELD_OUT)
    assert bench.repository.get_trial(trial.id).confirmed_latency is None


def test_a_confirmed_trial_keeps_its_first_confirmation(bench, unconfirmed):
    job, trial = unconfirmed
    first = bench.repository.update_trial(trial.id, confirmed_latency=latency(2.0))
    keep_confirmation(bench.repository, job, first, measured(latency(3.0)), HELD_OUT)
    assert bench.repository.get_trial(trial.id).confirmed_latency == first.confirmed_latency


class Confirming(FakeClient):
    """Exports a real bundle; a verification confirms the trial where `works`."""

    works = True

    def export(self, reference, path, **asked):
        inventory = fabricated.inventory()
        files = bundle_files(
            job=fabricated.job(inventory),
            trial=fabricated.trials(inventory)[7],
            device=fabricated.device(),
            model=fabricated.linear_model(),
        )
        return write_bundle(path, bundle_zip(files))

    def trial(self, reference, number):
        shown = super().trial(reference, number)
        is_confirmed = self.works and any(call[0] == "verify" for call in self.calls)
        interval = shown.latency_ns if is_confirmed else None
        return shown.model_copy(update={"confirmed_latency_ns": interval, "targets": []})


def confirm(client):
    session = Session(connect=lambda url, token: client)
    return run(["--url", "http://s", "--token", "t", "trial", "confirm", "job-1", "#1"], session)


def test_the_command_has_the_trials_own_bytes_measured_and_shows_it(capsys):
    client = Confirming()
    assert confirm(client) == 0
    (call,) = [call for call in client.calls if call[0] == "verify"]
    assert call[2] == client.trial("job-1", "1").id
    assert "confirmed in a fresh process" in capsys.readouterr().out


def test_a_trial_that_could_not_be_confirmed_ends_with_an_error(capsys):
    client = Confirming()
    client.works = False
    assert confirm(client) != 0
    assert "could not be confirmed" in capsys.readouterr().err


def test_a_confirmed_trial_is_not_measured_again(capsys):
    client = Confirming()
    client.calls.append(("verify", "before", 0))
    assert confirm(client) == 0
    assert "is confirmed already" in capsys.readouterr().err
    assert len([call for call in client.calls if call[0] == "verify"]) == 1
