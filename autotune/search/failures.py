"""What the packages below raise, as the user's errors.

Owns the one table from their error classes to `autotune.errors`, for a job that ends with one
and for a request that does. Which status or exit code they stand for is not decided here.
"""

from __future__ import annotations

from autotune import errors
from search_spaces.errors import SearchSpaceError
from storage import errors as storage_errors

_MEANING: tuple[tuple[type[Exception], type[errors.AutotuneError]], ...] = (
    (storage_errors.NotFound, errors.NotFoundError),
    (storage_errors.InvalidToken, errors.AuthenticationError),
    (storage_errors.DatabaseFull, errors.DiskFull),
    (storage_errors.ArtifactStoreFull, errors.DiskFull),
    (storage_errors.DatabaseLocked, errors.DatabaseInUse),
    (storage_errors.ArtifactDamaged, errors.ServiceError),
    (SearchSpaceError, errors.InvalidJob),
)


def as_defect(error: Exception) -> str:
    """What a user is told of an error that nobody foresaw."""
    return f"an error inside the service: {error!r}; its log has the details"


def in_users_terms(error: Exception) -> Exception:
    """The error of `autotune.errors` that means the same; the error itself where none does."""
    for lower, upper in _MEANING:
        if isinstance(error, lower):
            return upper(str(error))
    return error
