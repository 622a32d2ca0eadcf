"""A job as an Optuna study and as pandas frames."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import optuna
import pytest
from optuna.trial import TrialState

from autotune.api_types import JobTarget, Trial, TrialOnTarget
from autotune.cli.root import run
from autotune.cli.session import Session
from autotune.client import Client
from autotune.errors import MissingPackage, ServiceError, StudyError
from autotune.frames import trials_frame
from autotune.studies import study_of, title
from tests.unit.cli_fakes import NOW, FakeClient, interval, make_job, make_trial

SPEC = {"max_accuracy_drop": 0.01, "search": {"objectives": ["accuracy", "latency"]}}


def trials() -> list[Trial]:
    """FP32, a mixture, one that failed before it had a file, one that runs."""
    nothing: dict[str, Any] = {"accuracy": None, "accuracy_drop": None, "latency_ns": None}
    fp32 = {"version": 1, "precisions": {}, "prune_ratios": {}, "runtime": {"threads": 1}}
    mixed = {**fp32, "precisions": {"fc": "w8a8"}, "prune_ratios": {"conv1": 0.25}}
    times = {"created_at": NOW, "finished_at": NOW + timedelta(seconds=4)}
    return [
        make_trial(0, latency_ms=4.0, candidate=fp32, proposed_by="baseline", groups=[], **times),
        make_trial(1, latency_ms=1.9, candidate=mixed, groups=[], **times),
        make_trial(2, candidate=mixed, groups=[]).model_copy(
            update={"outcome": "compression_failed", **nothing}
        ),
        make_trial(3, candidate=mixed, groups=[]).model_copy(
            update={"state": "running", "outcome": None, **nothing}
        ),
    ]


def test_a_study_has_every_trial_with_its_state_and_figures() -> None:
    study = study_of(make_job(spec=SPEC), trials())
    assert study.metric_names == ["latency_ns", "accuracy_drop"]
    states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING]
    assert [t.state for t in study.trials] == states
    assert study.trials[1].values == [1.9e6, 0.004]
    assert study.trials[1].params["precision:fc"] == "w8a8"
    assert study.trials[0].params["precision:fc"] == "fp32"
    assert study.trials[0].params["prune:conv1"] == 0.0
    assert study.trials[0].user_attrs["proposed_by"] == "baseline"
    assert study.trials[1].user_attrs["latency_ns"] == [1.9e6, 1.87e6, 1.93e6]
    assert study.trials[1].duration == timedelta(seconds=4)


def test_a_constraint_holds_where_the_intervals_upper_bound_is_inside_the_budget() -> None:
    study = study_of(make_job(spec=SPEC), trials())
    assert study.trials[0].constraints == pytest.approx(
        {"latency_budget": 4.03e6 - 2e6, "max_accuracy_drop": 0.004 - 0.01}
    )
    assert study.trials[1].constraints["latency_budget"] == pytest.approx(1.93e6 - 2e6)


def test_what_is_not_steady_is_no_result_of_a_study() -> None:
    unsteady = [make_trial(0, is_steady=False)]
    assert [t.state for t in study_of(make_job(), unsteady).trials] == [TrialState.FAIL]


def test_on_several_devices_the_latency_is_the_largest_share_of_a_budget() -> None:
    budgets = {"pi4": 4e6, "gateway": 1e6}
    targets = [
        JobTarget(device_id=name, device_name=name, latency_budget_ns=ns)
        for name, ns in budgets.items()
    ]
    on_each = [
        TrialOnTarget(device_id=name, latency_ns=interval(2e6, 0.0), accuracy=None)
        for name in budgets
    ]
    study = study_of(make_job(targets=targets), [make_trial(0, targets=on_each)])
    assert study.metric_names == ["worst_latency_share", "accuracy_drop"]
    assert study.trials[0].values == [2.0, 0.004]
    assert study.trials[0].constraints == {
        "latency_budget:pi4": -2e6,
        "latency_budget:gateway": 1e6,
    }


def test_a_stored_study_is_whole_and_a_second_one_of_its_name_is_refused(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    job = make_job(spec=SPEC)
    study_of(job, trials(), storage=storage)
    stored = optuna.load_study(study_name=title(job), storage=storage)
    assert [t.user_attrs["number"] for t in stored.trials] == [0, 1, 2, 3]
    assert stored.trials[1].constraints == study_of(job, trials()).trials[1].constraints
    with pytest.raises(StudyError, match=r"another name with --name"):
        study_of(job, trials()[:1], storage=storage)
    assert len(optuna.load_study(study_name=title(job), storage=storage).trials) == 4
    assert len(study_of(job, trials()[:1], storage=storage, name="other").trials) == 1


@pytest.mark.parametrize("storage", ["study.db", "sqlite:////no/such/folder/study.db"])
def test_what_is_no_storage_is_said_in_the_users_terms(storage: str) -> None:
    with pytest.raises(StudyError, match=r"name one such as sqlite:///study\.db"):
        study_of(make_job(), trials(), storage=storage)


def test_a_storage_that_cannot_be_used_is_named_without_its_password() -> None:
    storage = "mysql+nothing://me:secret@host/studies"
    with pytest.raises(StudyError, match=r"mysql\+nothing://me:\*\*\*@host/studies") as caught:
        study_of(make_job(), trials(), storage=storage)
    assert "secret" not in str(caught.value)


def test_a_study_that_is_there_is_named_without_its_storages_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def create_study(**_: Any) -> None:
        raise optuna.exceptions.DuplicatedStudyError

    monkeypatch.setattr(optuna, "create_study", create_study)
    with pytest.raises(StudyError, match=r"me:\*\*\*@host/studies holds a study") as caught:
        study_of(make_job(), trials(), storage="postgresql://me:secret@host/studies")
    assert "secret" not in str(caught.value)


def test_a_frame_has_a_row_per_trial_and_a_column_per_figure_and_choice() -> None:
    frame = trials_frame(make_job(), trials())
    assert frame.index.tolist() == [0, 1, 2, 3]
    assert frame.loc[1, ["latency_ns", "latency_ns_low", "latency_ns_high"]].tolist() == [
        1.9e6,
        1.87e6,
        1.93e6,
    ]
    assert frame["precision:fc"].tolist() == ["fp32", "w8a8", "w8a8", "w8a8"]
    assert frame["latency_ns"].isna().tolist() == [False, False, True, True]


def test_a_job_without_trials_is_an_empty_frame_and_an_empty_study() -> None:
    assert len(trials_frame(make_job(), [])) == 0
    assert study_of(make_job(), []).trials == []


def test_the_clients_job_asks_for_its_trials_and_its_front() -> None:
    front = {
        "job_id": "job-1",
        "latency_budget_ns": None,
        "max_accuracy_drop": None,
        "trials": [trials()[1].model_dump(mode="json")],
        "answer": None,
        "explanation": "",
    }
    answers: dict[str, Any] = {
        "/v1/jobs/job-1": make_job().model_dump(mode="json"),
        "/v1/jobs": [make_job().model_dump(mode="json")],
        "/v1/jobs/job-1/trials": [trial.model_dump(mode="json") for trial in trials()],
        "/v1/jobs/job-1/front": front,
    }
    transport = httpx.MockTransport(lambda r: httpx.Response(200, json=answers[r.url.path]))
    with Client("http://service", "token", transport=transport) as client:
        job = client.job("job-1")
        assert len(job.to_optuna_study().trials) == len(client.jobs()[0].trials_frame()) == 4
        assert job.front_frame().index.tolist() == [1]


def test_a_job_that_no_client_read_says_so() -> None:
    from autotune.analysis import Job

    with pytest.raises(ServiceError, match=r"take it from Client\.job"):
        Job(**make_job().model_dump()).trials_frame()


@pytest.mark.parametrize(("package", "make"), [("optuna", study_of), ("pandas", trials_frame)])
def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, package: str, make: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package} is not installed.*\[analysis\]"):
        make(make_job(), trials())


def test_export_optuna_writes_a_study_and_prints_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    session = Session(connect=lambda url, token: FakeClient())
    arguments = ["--url", "http://service", "--token", "secret", "export-optuna", "job-1", storage]
    assert run(arguments, session) == 0
    name = capsys.readouterr().out.strip()
    assert optuna.load_study(study_name=name, storage=storage).trials
    assert run(arguments, Session(connect=lambda url, token: FakeClient())) == StudyError.exit_code
    assert "another name with --name" in capsys.readouterr().err
