from pathlib import Path

import pytest

from autotune.errors import InvalidSettings
from autotune.settings import Settings, default_data_dir


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA_DIR", "DATABASE_URL", "HOST", "PORT", "WORKERS", "TRUST_JOB_CODE"):
        monkeypatch.delenv(f"AUTOTUNE_{name}", raising=False)


def test_the_default_listens_to_this_machine_only() -> None:
    settings = Settings()
    assert (settings.host, settings.is_loopback) == ("127.0.0.1", True)
    assert not settings.trust_job_code


def test_the_environment_sets_what_the_caller_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_PORT", "9000")
    monkeypatch.setenv("AUTOTUNE_WORKERS", "3")
    settings = Settings(port=9001)
    assert (settings.port, settings.workers) == (9001, 3)


def test_a_wrong_value_is_told_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_PORT", "abc")
    told = r"^port is 'abc': must be a valid integer \(in the environment: AUTOTUNE_PORT\)$"
    with pytest.raises(InvalidSettings, match=told):
        Settings()


def test_the_data_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "edge-autotune"


def test_a_relative_xdg_directory_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".local/share/edge-autotune"


def test_a_relative_data_directory_is_made_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(data_dir=Path("here"))
    assert settings.data_dir == tmp_path / "here"
    assert settings.database == f"sqlite:///{tmp_path}/here/autotune.db"


def test_a_given_database_is_taken() -> None:
    url = "postgresql+psycopg://me@db/tuning"
    assert Settings(database_url=url).database == url


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_another_address_needs_tls_or_a_flag(host: str) -> None:
    with pytest.raises(InvalidSettings, match=r"--tls-cert.*--insecure"):
        Settings(host=host)
    assert Settings(host=host, insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_neither(host: str) -> None:
    assert Settings(host=host).is_loopback


def test_tls_opens_another_address(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.touch()
    key.touch()
    assert Settings(host="0.0.0.0", tls_cert=certificate, tls_key=key).uses_tls


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="give both"):
        Settings(tls_cert=tmp_path / "cert.pem")


def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "cert.pem"
    with pytest.raises(InvalidSettings, match=str(missing)):
        Settings(tls_cert=missing, tls_key=missing)


@pytest.mark.parametrize(
    ("name", "value"), [("port", 70000), ("workers", 0), ("lease_ttl_s", -1), ("colour", "red")]
)
def test_a_value_that_is_not_allowed_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidSettings, match=rf"{name} is {value!r}"):
        Settings(**{name: value})


def test_a_lease_outlives_a_late_heartbeat() -> None:
    with pytest.raises(InvalidSettings, match="one late heartbeat"):
        Settings(heartbeat_s=10, lease_ttl_s=15)


def test_a_wrong_setting_has_an_exit_code_of_its_own() -> None:
    assert InvalidSettings.exit_code == 16
