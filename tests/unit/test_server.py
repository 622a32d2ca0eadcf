"""Starting a service: what the machine refuses, in the user's words."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import DatabaseInUse, DiskFull, InvalidSettings, ServiceError
from autotune.service import server
from autotune.service.security import hash_secret, local_token, new_secret, write_private
from autotune.settings import Settings
from storage.database import open_database
from storage.errors import ArtifactStoreFull, DatabaseFull, DatabaseLocked, DatabaseUnavailable
from storage.repository import Repository
from tests.running_service import WaitingRunner


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (DatabaseLocked("another service owns it"), DatabaseInUse),
        (DatabaseFull("full"), DiskFull),
        (DatabaseUnavailable("no answer"), ServiceError),
        (ArtifactStoreFull("full"), DiskFull),
        (OSError(errno.ENOSPC, "no space left"), DiskFull),
        (PermissionError(errno.EACCES, "not yours"), InvalidSettings),
    ],
)
def test_what_the_machine_refuses_is_said_in_the_users_words(
    raised: Exception, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "open_database", failing(raised))
    with pytest.raises(expected):
        server.serve(Settings(data_dir=tmp_path, port=0), make_runner=lambda *_: WaitingRunner())


def test_a_disk_without_room_for_the_address_ends_the_start_in_the_users_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "write_private", failing(OSError(errno.ENOSPC, "no space left")))
    with pytest.raises(DiskFull, match="free some space"):
        server.serve(Settings(data_dir=tmp_path, port=0), make_runner=lambda *_: WaitingRunner())


def test_a_log_on_a_full_disk_does_not_stop_who_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.sys.stderr, "write", failing(OSError(errno.ENOSPC, "full")))
    server.say("stopping")


def test_a_runner_that_cannot_start_ends_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = WaitingRunner()
    monkeypatch.setattr(runner, "start", failing(RuntimeError("no threads left")))
    with pytest.raises(ServiceError, match="could not start"):
        server.serve(Settings(data_dir=tmp_path, port=0), make_runner=lambda *_: runner)
    assert not (tmp_path / "service.json").exists()


def test_an_address_that_is_not_of_this_machine_is_named(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, host="192.0.2.1", port=0, insecure=True)
    with pytest.raises(InvalidSettings, match=r"192\.0\.2\.1"):
        server.serve(settings, make_runner=lambda *_: WaitingRunner())


def test_a_failed_start_gives_the_database_back(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, host="192.0.2.1", port=0, insecure=True)
    with pytest.raises(InvalidSettings):
        server.serve(settings, make_runner=lambda *_: WaitingRunner())
    open_database(settings.database).close()


def test_half_uploads_of_a_killed_service_are_removed(tmp_path: Path) -> None:
    for name in ("incoming", "bases"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    with open_database("sqlite://") as database:
        server._make_context(Settings(data_dir=tmp_path), database, lambda *_: WaitingRunner())
    assert not (tmp_path / "incoming").exists()
    assert (tmp_path / "bases" / "part").exists()


def test_the_service_file_of_another_process_stays(tmp_path: Path) -> None:
    place = tmp_path / "service.json"
    place.write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": os.getpid() + 1}))
    server._withdraw(place)
    assert place.exists()


# Tokens


def test_the_local_token_is_made_once(tmp_path: Path) -> None:
    with open_database("sqlite://") as database:
        repository = Repository(database)
        first = local_token(repository, tmp_path / "token")
        second = local_token(repository, tmp_path / "token")
        assert (first.is_new, second.is_new) == (True, False)
        assert first.token == second.token
        assert repository.has_user_token(hash_secret(first.token))


def test_a_token_of_another_database_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("eat_of-another-database\n")
    with open_database("sqlite://") as database:
        made = local_token(Repository(database), tmp_path / "token")
    assert made.is_new
    assert (tmp_path / "token").read_text().strip() == made.token


def test_a_secret_has_256_random_bits_and_says_what_it_is() -> None:
    secrets = {new_secret("eat") for _ in range(100)}
    assert len(secrets) == 100
    assert {len(secret) for secret in secrets} == {len("eat_") + 43}  # 256 bits in base64
    assert all(secret.startswith("eat_") for secret in secrets)


def test_a_private_file_is_its_owners_even_where_one_was_open_to_all(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    path.chmod(0o666)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
