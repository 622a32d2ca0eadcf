"""`autotune serve` as a process: how it starts, what it refuses, how it ends."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from autotune.client import Client
from autotune.errors import AddressInUse, DatabaseInUse, InvalidSettings
from autotune.spec import parse_job
from device_agents.protocol import PROTOCOL_VERSION
from tests.running_service import job_document
from tests.unit import fabricated_job

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0
STOP_S = 30.0


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    token: str
    data_dir: Path

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit code and everything that was said."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=STOP_S)
        return self.process.returncode, said


# The same process without a search in it, for what must not depend on one.
WITHOUT_SEARCH = """
import sys
from pathlib import Path
from autotune.service.server import serve
from autotune.settings import Settings
from tests.running_service import WaitingRunner
data_dir = Path(sys.argv[1])
settings = Settings(data_dir=data_dir, port=0)
serve(settings, ready_file=data_dir / "ready.json", make_runner=lambda *_: WaitingRunner())
"""


def command(data_dir: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "autotune.cli", "serve", "--data-dir", str(data_dir)]
    return [*words, "--workers", "1", *(options or ("--port", "0"))]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AUTOTUNE_")}
    return {**kept, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def served(data_dir: Path, *options: str, with_search: bool = True) -> Iterator[Served]:
    ready = data_dir / "ready.json"
    ready.unlink(missing_ok=True)
    words = [*command(data_dir, *options), "--ready-file", str(ready)]
    process = subprocess.Popen(
        words if with_search else [sys.executable, "-c", WITHOUT_SEARCH, str(data_dir)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    try:
        tick = threading.Event()
        for _ in range(int(START_S / 0.1)):
            if ready.exists() or process.poll() is not None:
                break
            tick.wait(0.1)
        assert process.poll() is None, process.communicate()[1]
        place = json.loads(ready.read_text())
        yield Served(process, place["url"], place["token"], data_dir)
    finally:
        process.kill()
        process.communicate()


def refused(data_dir: Path, *options: str) -> tuple[int, str]:
    ran = subprocess.run(
        command(data_dir, *options),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=START_S,
        check=False,
    )
    assert ran.stdout == ""
    return ran.returncode, ran.stderr


def test_a_service_lives_from_its_first_start_through_a_restart(tmp_path: Path) -> None:
    with served(tmp_path, with_search=False) as first:
        with Client(first.url, first.token) as client:
            job = client.submit(parse_job(job_document(device="nowhere")))
        place = json.loads((tmp_path / "service.json").read_text())
        assert place == {"url": first.url, "pid": first.process.pid}
        assert (tmp_path / "token").read_text().strip() == first.token
        for name in ("token", "ready.json", "service.json"):
            assert (tmp_path / name).stat().st_mode & 0o077 == 0
        code, said = first.stop()
    assert code == 0
    assert first.token in said
    assert not (tmp_path / "service.json").exists()

    with served(tmp_path, with_search=False) as second:
        with Client(second.url, first.token) as client:
            assert client.job(job.id).name == job.name
        code, said = second.stop(signal.SIGINT)
    assert code == 0
    assert first.token not in said


def test_whoever_waits_is_let_go_at_the_end(tmp_path: Path) -> None:
    with (
        served(tmp_path, with_search=False) as service,
        Client(service.url, service.token) as client,
    ):
        enrolment = {
            "protocol_version": PROTOCOL_VERSION,
            "token": client.enrolment_token().token,
            "device": fabricated_job.device().description.model_dump(mode="json"),
        }
        reply = httpx.post(f"{service.url}/v1/agent/enrol", json=enrolment, trust_env=False)
        answers: list[int] = []

        def wait_for_work() -> None:
            answer = httpx.post(
                f"{service.url}/v1/agent/lease",
                json={"protocol_version": PROTOCOL_VERSION, "wait_s": 60},
                headers={"Authorization": f"Bearer {reply.json()['agent_key']}"},
                timeout=90,
                trust_env=False,
            )
            answers.append(answer.status_code)

        agent = threading.Thread(target=wait_for_work)
        agent.start()
        job = client.submit(parse_job(job_document(device="nowhere")))
        stream = f"/v1/jobs/{job.id}/events"
        bearer = {"Authorization": f"Bearer {service.token}"}
        with httpx.stream("GET", service.url + stream, headers=bearer, trust_env=False) as events:
            code, _ = service.stop()
            told = events.read()
        agent.join(STOP_S)
    assert (code, answers) == (0, [204])
    assert b"event: end" not in told  # the job has not ended: a client should come back


def test_a_second_service_on_the_same_file_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as first:
        code, said = refused(tmp_path)
        assert code == DatabaseInUse.exit_code
        assert str(tmp_path / "autotune.db") in said
        assert str(first.process.pid) in said
        with Client(first.url, first.token) as client:
            assert client.health().status == "ok"
        assert json.loads((tmp_path / "service.json").read_text())["pid"] == first.process.pid


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said = refused(tmp_path, "--port", str(port))
    assert code == AddressInUse.exit_code
    assert f"127.0.0.1:{port}" in said
    assert "--port" in said


def test_another_address_is_refused_without_tls(tmp_path: Path) -> None:
    code, said = refused(tmp_path, "--host", "0.0.0.0", "--port", "0")
    assert code == InvalidSettings.exit_code
    assert "--insecure" in said
    assert list(tmp_path.iterdir()) == []


def test_another_address_is_taken_by_the_explicit_flag(tmp_path: Path) -> None:
    with (
        served(tmp_path, "--host", "0.0.0.0", "--port", "0", "--insecure") as service,
        Client(service.url, service.token) as client,
    ):
        assert service.url.startswith("http://127.0.0.1:")
        assert client.jobs() == []
        code, _ = service.stop()
    assert code == 0


def test_a_data_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("precious")
    code, said = refused(taken)
    assert code == InvalidSettings.exit_code
    assert str(taken) in said
    assert "Traceback" not in said


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_is_spoken_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    tls = ("--port", "0", "--tls-cert", str(certificate), "--tls-key", str(key))
    with served(tmp_path / "data", *tls) as service:
        assert service.url.startswith("https://")
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{service.url}/v1/health", verify=ssl.create_default_context())
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with Client(service.url, service.token) as client:
            assert client.health().status == "ok"


def test_damaged_tls_files_are_named(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("not a certificate")
    code, said = refused(
        tmp_path / "data", "--port", "0", "--tls-cert", str(junk), "--tls-key", str(junk)
    )
    assert code == InvalidSettings.exit_code
    assert str(junk) in said
