import inspect

import pytest

from autotune import errors
from autotune.service.problems import problem_of
from search_spaces.errors import InvalidCandidate
from storage import errors as storage_errors


def every(module: object, root: type[Exception]) -> list[type[Exception]]:
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass)]
    return [c for c in classes if issubclass(c, root)]


@pytest.mark.parametrize("kind", every(errors, errors.AutotuneError))
def test_an_error_keeps_its_name_and_its_words(kind: type[Exception]) -> None:
    problem = problem_of(kind("what to do"))
    assert (problem.error, problem.detail) == (kind.__name__, "what to do")
    assert problem.status >= 400


@pytest.mark.parametrize("kind", every(storage_errors, storage_errors.StorageError))
def test_what_storage_raises_reaches_the_client_as_its_own_error(kind: type[Exception]) -> None:
    made = (
        kind("what to do", existing_id="t-1")  # type: ignore[call-arg]
        if kind is storage_errors.DuplicateTrial
        else kind("what to do")
    )
    problem = problem_of(made)
    assert issubclass(getattr(errors, problem.error), errors.AutotuneError)
    assert problem.detail == "what to do"


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (storage_errors.NotFound("x"), 404, "NotFoundError"),
        (storage_errors.InvalidToken("x"), 401, "AuthenticationError"),
        (storage_errors.StaleLease("x"), 409, "ServiceError"),
        (storage_errors.DatabaseFull("x"), 507, "DiskFull"),
        (storage_errors.DatabaseUnavailable("x"), 503, "ServiceError"),
        (storage_errors.ArtifactStoreFull("x"), 507, "DiskFull"),
        (InvalidCandidate("x"), 422, "InvalidJob"),
        (errors.UntrustedCode("x"), 403, "UntrustedCode"),
        (errors.UpgradeRequired("x"), 426, "UpgradeRequired"),
    ],
)
def test_the_status_says_what_kind_of_error_it_is(error: Exception, status: int, name: str) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.error) == (status, name)


def test_an_unforeseen_error_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    problem = problem_of(KeyError("private"))
    assert problem.status == 500
    assert "private" not in problem.detail
    assert "private" in caplog.text
