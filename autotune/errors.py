"""Errors of the autotune package: one root; each leaf carries the command line's exit code.

A failed candidate is a trial with an outcome and a reason, never one of these.
"""

from __future__ import annotations

from typing import ClassVar


class AutotuneError(Exception):
    """Something the user can act on; the message says what was wrong and what to do next."""

    exit_code: ClassVar[int] = 1


class InvalidJob(AutotuneError):
    """The job file is not valid; the message names the key, the value and what is allowed."""

    exit_code = 2


class InvalidModel(AutotuneError):
    """The source model cannot be loaded or does not fit the data."""

    exit_code = 3


class InvalidData(AutotuneError):
    """The labelled data cannot be read or is not usable."""

    exit_code = 4


class UntrustedCode(AutotuneError):
    """The job would run code of its own; pass `--trust-job-code` if you trust it."""

    exit_code = 5


class NotFoundError(AutotuneError):
    """No job, trial or device has that name; `ls` lists the ones there are."""

    exit_code = 6


class ServiceError(AutotuneError):
    """The service answered with an error or not at all."""

    exit_code = 7


class UpgradeRequired(AutotuneError):
    """The agent speaks a version of the protocol that the service does not."""

    exit_code = 17


class AuthenticationError(AutotuneError):
    """The token is missing, wrong or revoked."""

    exit_code = 8


class AddressInUse(AutotuneError):
    """The port is taken by another program; choose another with `--port`."""

    exit_code = 9


class DatabaseInUse(AutotuneError):
    """Another service owns the SQLite file."""

    exit_code = 10


class DiskFull(AutotuneError):
    """No room is left on the disk; free some space and resume."""

    exit_code = 11


class DeviceUnavailable(AutotuneError):
    """The device is unknown, offline or cannot run what the job asks."""

    exit_code = 12


class JobNotReady(AutotuneError):
    """The job has no answer yet (or never will); the message says in which state it is."""

    exit_code = 13


class CompressionError(AutotuneError):
    """A candidate could not be built; the message names the group and the cause."""

    exit_code = 14


class BundleError(AutotuneError):
    """A bundle cannot be written or read, or its digests do not match."""

    exit_code = 15


class InvalidSettings(AutotuneError):
    """A setting of the service is not valid or not safe; the message says what is allowed."""

    exit_code = 16


class MissingPackage(AutotuneError):
    """An optional package is not installed; the message says how to get it."""

    exit_code = 18


class StudyError(AutotuneError):
    """An Optuna study cannot be written: its name is taken, or the storage cannot be used."""

    exit_code = 19
