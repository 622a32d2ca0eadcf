"""The files that a job names: paths and uploads."""

from pathlib import Path

import pytest

from autotune.spec import parse_job, read_job, resolve_uploads, upload_of

DIGEST = "0123456789abcdef" * 4


def document(**data: str) -> dict[str, object]:
    return {
        "model": {"source": f"onnx:sha256:{DIGEST}", "weights": f"sha256:{DIGEST}"},
        "data": {"evaluation": f"npz:sha256:{DIGEST}", **data},
    }


def test_every_upload_becomes_the_path_of_its_file() -> None:
    spec = parse_job(document(training="imagefolder:/images"))
    resolved = resolve_uploads(spec, lambda sha256: Path("/store") / sha256)
    assert resolved.model.source == f"onnx:/store/{DIGEST}"
    assert resolved.model.weights == f"/store/{DIGEST}"
    assert resolved.data.evaluation == f"npz:/store/{DIGEST}"
    assert resolved.data.training == "imagefolder:/images"


def test_an_upload_that_is_missing_is_the_stores_error() -> None:
    def missing(sha256: str) -> Path:
        raise LookupError(sha256)

    with pytest.raises(LookupError, match=DIGEST):
        resolve_uploads(parse_job(document()), missing)


def test_code_and_names_are_no_files() -> None:
    spec = parse_job(
        {"model": {"source": "torchvision:resnet18"}, "data": {"evaluation": "python:m:f"}}
    )
    assert resolve_uploads(spec, lambda sha256: Path("/never")) == spec


@pytest.mark.parametrize(
    "path", ["/data.npz", f"sha256:{DIGEST[:-1]}", f"sha256:{DIGEST.upper()}", f"./sha256:{DIGEST}"]
)
def test_only_a_whole_digest_is_an_upload(path: str) -> None:
    assert upload_of(path) is None


def test_a_job_file_may_name_uploads_beside_paths(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: {{source: 'onnx:model.onnx'}}\ndata: {{evaluation: 'npz:sha256:{DIGEST}'}}\n"
    )
    spec = read_job(path)
    assert spec.model.source == f"onnx:{tmp_path}/model.onnx"
    assert spec.data.evaluation == f"npz:sha256:{DIGEST}"
