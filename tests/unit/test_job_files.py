"""The files that a job names: paths and uploads."""

import re
from pathlib import Path

import pytest

from autotune.errors import InvalidJob
from autotune.spec import name_uploads, parse_job, read_job, resolve_uploads, upload_of

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


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (f"onnx:/store/{DIGEST} is damaged", "model.source and data.training is damaged"),
        (f"cannot read '/store/{DIGEST[::-1]}'", "cannot read 'data.evaluation'"),
        ("/images is no folder", "/images is no folder"),
    ],
)
def test_a_message_names_the_keys_of_the_job_and_not_the_stores_paths(
    written: str, shown: str
) -> None:
    submitted = parse_job(
        {
            "model": {"source": f"onnx:sha256:{DIGEST}", "weights": "/images"},
            "data": {
                "evaluation": f"npz:sha256:{DIGEST[::-1]}",
                "training": f"npz:sha256:{DIGEST}",
            },
        }
    )
    resolved = resolve_uploads(submitted, lambda sha256: Path("/store") / sha256)
    assert name_uploads(written, submitted, resolved) == shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": "fast"}, "search: must be a mapping of keys to values (got 'fast')"),
        ({"search": {"threads": 2}}, "search.threads: must be a list (got 2)"),
        ({"data": {"evaluation": "x.npz"}}, "must begin with npz:, imagefolder: or python:"),
        ({"model": {"source": "resnet18"}}, "must begin with torchvision:, onnx: or python:"),
        ({"search": {"trials": "many"}}, "search.trials: must be a whole number (got 'many')"),
        ({"search": {"time_s": "20m"}}, "search.time_s: must be a number of seconds (got '20m')"),
        ({"search": {"threads": []}}, "search.threads: must be a list of at least one (got [])"),
        ({"search": {"precisions": []}}, "search.precisions: must be a list of at least one"),
        ({"search": {"prune_ratios": []}}, "search.prune_ratios: must be a list of at least one"),
        ({"search": {"prune_ratios": [50]}}, "search.prune_ratios.0: must be less than 1 (got 50)"),
        ({"max_accuracy_drop": "1%"}, "must be a number, a fraction: 0.01 for 1% (got '1%')"),
        ({"max_size": 3}, "max_size: '3' is not a size; write 3MB, 800kB or 2MiB (got 3)"),
        ({"latency_at": "p95"}, "latency_at: must be 'p50', 'p90' or 'p99' (got 'p95')"),
        ({"name": 5}, "name: must be text (got 5)"),
    ],
)
def test_a_value_of_another_shape_is_told_the_right_one(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidJob, match=re.escape(words)):
        parse_job({**document(), **changes})


def test_a_file_that_is_not_yaml_is_told_the_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: {source: [}\n")
    with pytest.raises(InvalidJob, match=r"job\.yaml is not YAML: line 1, column 18: ") as caught:
        read_job(path)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"adaround": "soon"}, "rounding.adaround"),
        ({"iterations": 0}, "rounding.iterations"),
        ({"adarond": True}, "did you mean 'adaround'"),
    ],
)
def test_a_wrong_rounding_is_told_where_it_is_wrong(written: object, told: str) -> None:
    assert not parse_job(document()).rounding.adaround
    with pytest.raises(InvalidJob, match=told):
        parse_job({**document(), "rounding": written})
