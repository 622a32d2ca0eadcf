"""Errors of the storage package, one root, few leaves."""


class StorageError(Exception):
    """The database or the artifact store could not do what was asked."""


class NotFound(StorageError):
    """No record has that id; `ls` lists the ones there are."""


class DuplicateTrial(StorageError):
    """The job already has a trial for this candidate; read `existing_id` instead of measuring."""

    def __init__(self, message: str, *, existing_id: str) -> None:
        super().__init__(message)
        self.existing_id = existing_id


class StaleLease(StorageError):
    """The lease is no longer current; the result was kept for audit and not accepted."""


class InvalidToken(StorageError):
    """The token is unknown, used up, expired or revoked; ask for a new one."""


class ReplacedKey(InvalidToken):
    """An agent's key from before its last rotation: somebody has a copy of its state folder."""


class DatabaseLocked(StorageError):
    """Another service owns this SQLite file; stop it, or give this one its own database."""


class DatabaseUnavailable(StorageError):
    """The database does not answer or its schema is newer than this release."""


class DatabaseFull(DatabaseUnavailable):
    """The disk that holds the database is full; free some space and resume the job."""


class ArtifactStoreFull(StorageError):
    """The disk that holds the artifacts is full; free some space and resume the job."""


class ArtifactDamaged(StorageError):
    """The stored bytes no longer have their sha256; the file was altered or the disk failed."""
