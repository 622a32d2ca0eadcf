"""An answer that was measured once says so over HTTP, and can be confirmed."""

import pytest

from storage.records import JobRecord
from tests.running_service import RunningService


@pytest.fixture
def finished(service: RunningService) -> JobRecord:
    _, device = service.enrol()
    return service.finished_job(device)


def test_a_confirmed_answer_says_so_and_no_more(
    service: RunningService, finished: JobRecord
) -> None:
    found = service.client.front(finished.id)
    assert found.answer is not None and found.answer.confirmed_latency_ns is not None
    assert found.answer_is_confirmed is True
    assert "was not confirmed" not in found.explanation


def test_an_answer_that_was_measured_once_says_so_and_how_to_confirm_it(
    service: RunningService, finished: JobRecord
) -> None:
    for trial in service.repository.list_trials(finished.id):
        service.repository.update_trial(trial.id, confirmed_latency=None, held_out_accuracy=None)
    found = service.client.front(finished.id)
    assert found.answer is not None and found.answer_is_confirmed is False
    advice = f"`autotune trial confirm {finished.id} {found.answer.number}` makes up for it"
    assert advice in found.explanation


def test_a_verification_can_name_the_trial_that_it_is_of(
    service: RunningService, finished: JobRecord
) -> None:
    device = service.repository.get_device(finished.device_id or "")
    service.runner.verification = service.verification(finished, device)
    service.client.verify(finished.id, b"model bytes", trial="7")
    assert service.runner.verified_as[-1] == "7"
