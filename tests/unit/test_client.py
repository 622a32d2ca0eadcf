"""The client against a service that is a function: connection, retries, errors, streams."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from autotune import errors
from autotune.client import Client
from autotune.responses import parse_events
from autotune.spec import parse_job

Answer = Callable[[httpx.Request], httpx.Response]
EVENT = {"job_id": "j", "kind": "phase", "payload": {}, "created_at": "2026-11-21T09:00:00Z"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("autotune.client.time.sleep", slept.append)
    return slept


def client(answer: Answer, url: str = "http://service") -> Client:
    return Client(url, "token", transport=httpx.MockTransport(answer))


def problem(error: str, status: int = 409, detail: str = "what was wrong") -> httpx.Response:
    body = {"title": "Title", "status": status, "detail": detail, "error": error}
    return httpx.Response(status, json=body)


@pytest.mark.parametrize("kind", errors.AutotuneError.__subclasses__())
def test_a_problem_is_raised_as_the_class_that_it_names(
    kind: type[errors.AutotuneError],
) -> None:
    with pytest.raises(errors.AutotuneError) as caught:
        client(lambda _: problem(kind.__name__)).job("j")
    assert type(caught.value) is kind
    assert str(caught.value) == "what was wrong"


@pytest.mark.parametrize("name", ["Unknown", "annotations", "ClassVar", "__doc__"])
def test_a_problem_of_another_name_is_a_service_error(name: str) -> None:
    with pytest.raises(errors.ServiceError, match="what was wrong"):
        client(lambda _: problem(name)).job("j")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, errors.AuthenticationError),
        (404, errors.NotFoundError),
        (413, errors.InvalidData),
        (418, errors.ServiceError),
    ],
)
def test_an_answer_that_is_no_problem_is_judged_by_its_status(
    status: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=str(status)):
        client(lambda _: httpx.Response(status, text="<html>")).device("d")


def test_an_answer_of_another_program_is_a_service_error() -> None:
    with pytest.raises(errors.ServiceError, match="is it an edge-autotune service"):
        client(lambda _: httpx.Response(200, text="hello")).jobs()


def test_the_token_travels_as_a_bearer() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer token"
        return httpx.Response(200, json=[])

    assert client(answer).jobs() == []


@pytest.mark.parametrize("token", ["", "  ", "two\nlines", "schlüssel"])
def test_a_token_that_cannot_be_one_is_said_before_anything_is_sent(token: str) -> None:
    with pytest.raises(errors.AuthenticationError, match="serve` says where its own lies"):
        Client("http://service", token)


def test_an_address_that_cannot_be_one_is_a_service_error() -> None:
    with pytest.raises(errors.ServiceError, match="not the address"):
        Client("http://[::1", "token")


def test_a_refused_connection_names_the_address_and_the_next_step(no_waiting: list[float]) -> None:
    with pytest.raises(errors.ServiceError, match=r"127\.0\.0\.1:1 .*`autotune serve`"):
        Client("http://127.0.0.1:1", "token").jobs()
    assert no_waiting == [0.2, 0.5, 1.0]


def test_reading_is_tried_again_when_the_connection_breaks() -> None:
    attempts: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        attempts.append(request.method)
        if len(attempts) < 3:
            raise httpx.RemoteProtocolError("gone")
        return httpx.Response(200, json=[])

    assert client(answer).devices() == []
    assert len(attempts) == 3


def test_a_busy_service_is_asked_again_and_then_believed() -> None:
    attempts: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        attempts.append(request.method)
        return problem("DatabaseInUse", 503)

    with pytest.raises(errors.DatabaseInUse):
        client(answer).jobs()
    assert len(attempts) == 4


def test_a_change_is_sent_once_only() -> None:
    attempts: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        attempts.append(request.method)
        raise httpx.ReadError("gone")

    with pytest.raises(errors.ServiceError, match="cannot be reached"):
        client(answer).cancel("j")
    assert attempts == ["POST"]


def test_an_answer_that_takes_too_long_is_a_service_error() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("30 s", request=request)

    with pytest.raises(errors.ServiceError, match="did not answer GET"):
        client(answer).job("j")


@pytest.mark.parametrize("reference", ["../x", "a b", "a/b", "ü?#"])
def test_a_reference_stays_one_segment(reference: str) -> None:
    seen: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path)
        return problem("NotFoundError", 404)

    with pytest.raises(errors.NotFoundError):
        client(answer).trial(reference, reference)
    assert seen[0].count(b"/") == len(["v1", "jobs", "J", "trials", "T"])


def test_a_front_is_asked_with_what_was_given_only() -> None:
    asked: list[dict[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        return problem("JobNotReady")

    for options in ({}, {"budget": "3ms"}, {"max_drop": 0.0}):
        with pytest.raises(errors.JobNotReady):
            client(answer).front("j", **options)  # type: ignore[arg-type]
    assert asked == [{}, {"latency_budget": "3ms"}, {"max_accuracy_drop": "0.0"}]


# Events


def stream(*events: dict[str, Any], end: bool) -> httpx.Response:
    frames = [f"id: {event['id']}\ndata: {json.dumps(event)}\n\n" for event in events]
    text = ": hello\n\n" + "".join(frames) + ("event: end\ndata: {}\n\n" if end else "")
    return httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})


def test_a_broken_stream_goes_on_after_the_last_event() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["last-event-id"])
        if len(asked) == 1:
            return stream({**EVENT, "id": 4}, {**EVENT, "id": 7}, end=False)
        if len(asked) == 2:
            raise httpx.ConnectError("restarting")
        if len(asked) == 3:
            return httpx.Response(503)
        return stream({**EVENT, "id": 9}, end=True)

    assert [event.id for event in client(answer).events("j")] == [4, 7, 9]
    assert asked == ["0", "7", "7", "7"]


def test_a_stream_of_a_job_that_is_not_there_raises_at_once(no_waiting: list[float]) -> None:
    with pytest.raises(errors.NotFoundError):
        list(client(lambda _: problem("NotFoundError", 404)).events("j"))
    assert no_waiting == []


def test_a_service_that_stays_away_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr("autotune.client.time.monotonic", lambda: float(next(now)))

    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(errors.ServiceError, match="cannot be reached"):
        list(client(answer).events("j"))


def lines(text: str) -> Iterator[str]:
    return iter(text.split("\n"))


def test_data_over_several_lines_is_one_event() -> None:
    event = json.dumps({**EVENT, "id": 1}, indent=1).replace("\n", "\ndata:")
    (found,) = parse_events(lines(f"data: {event}\n\n"))
    assert found is not None
    assert found.id == 1


def test_half_an_event_is_none() -> None:
    assert list(parse_events(lines('id: 3\ndata: {"id"'))) == []


# Waiting


def job(state: str) -> httpx.Response:
    return httpx.Response(
        200,
        json={
            "id": "j",
            "name": "job",
            "state": state,
            "phase": state,
            "spec": {},
            "progress": {
                "phase": state,
                "trials_finished": 0,
                "trials_total": 1,
                "elapsed_s": 0,
            },
            "created_at": "2026-11-21T09:00:00Z",
        },
    )


def test_wait_returns_the_job_in_its_final_state() -> None:
    states = iter(["queued", "running", "waiting_for_device", "failed"])
    assert client(lambda _: job(next(states))).wait("j").state == "failed"


def test_wait_ends_at_its_limit() -> None:
    with pytest.raises(errors.JobNotReady, match=r"running after 0\.5 s"):
        client(lambda _: job("running")).wait("j", timeout_s=0.5)


# Files


def test_only_files_that_are_here_are_uploaded(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if request.method == "HEAD":
            return httpx.Response(404)
        if request.method == "PUT":
            assert request.headers["content-length"] == "7"
            digest = request.url.path.rsplit("/", 1)[-1]
            return httpx.Response(201, json={"sha256": digest, "size_bytes": 7})
        sent = json.loads(request.content)
        assert sent["model"]["weights"].startswith("sha256:")
        assert sent["data"]["evaluation"] == f"imagefolder:{tmp_path}/images"
        assert sent["data"]["training"] == "npz:/on/the/service/data.npz"
        return job("queued")

    spec = parse_job(
        {
            "model": {"source": "torchvision:resnet18", "weights": str(weights)},
            "data": {
                "evaluation": f"imagefolder:{tmp_path}/images",
                "training": "npz:/on/the/service/data.npz",
            },
        }
    )
    assert client(answer).submit(spec).id == "j"
    assert asked == ["HEAD", "PUT", "POST"]


def test_a_file_that_cannot_be_read_is_invalid_data(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidData, match="missing"):
        client(lambda _: httpx.Response(404)).upload(tmp_path / "missing")


def archive(**files: str) -> httpx.Response:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        for name, text in files.items():
            made.writestr(name, text)
    return httpx.Response(200, content=content.getvalue())


def test_a_bundle_replaces_an_earlier_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "reports.json").write_text("{}")
    for left_behind in ("__pycache__", ".DS_Store"):
        (target / left_behind).mkdir()
    client(lambda _: archive(**{"reports.json": "{}", "model.onnx": "new"})).export("j", target)
    assert sorted(path.name for path in target.iterdir()) == ["model.onnx", "reports.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_somebody_keeps_beside_a_bundle_is_not_deleted(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    answer = client(lambda _: archive(**{"reports.json": "{}"}))
    answer.export("j", target)
    (target / "notes.txt").write_text("a day of work")
    with pytest.raises(errors.BundleError, match=r"holds notes\.txt, .* left alone"):
        answer.export("j", target)
    assert (target / "notes.txt").read_text() == "a day of work"


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "sub/file"])
def test_a_bundle_stays_inside_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.BundleError, match="not its own"):
        client(lambda _: archive(**{name: "x"})).export("j", tmp_path / "deep" / "bundle")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_file_that_is_no_bundle_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "mine.zip"
    target.write_text("not a zip")
    with pytest.raises(errors.BundleError, match="left alone"):
        client(lambda _: archive()).export("j", target)
    assert target.read_text() == "not a zip"


def test_an_answer_that_is_no_zip_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(errors.BundleError, match="cannot write"):
        client(lambda _: httpx.Response(200, content=b"junk")).export("j", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
