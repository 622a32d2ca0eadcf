"""The bundle: the exported winner as files or a zip, and the way back from either.

Owns the format (`BUNDLE_VERSION`) and its digests. The same records give the same bytes.
Measuring a bundle again is the service's work; running it is `run.py`'s, whose source is
`run_bundle.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import onnx

from autotune.errors import BundleError
from autotune.export import figures
from autotune.export.provenance import provenance
from device_agents.protocol import LatencyReport, RuntimeRequest
from search_spaces import Candidate
from search_spaces.errors import SearchSpaceError
from storage.records import DeviceRecord, JobRecord, TrialRecord

BUNDLE_VERSION = 1
# Version 1 (2026-11-21): model.onnx, candidate.json, reports.json, run.py, README.md.
# 2026-11-21: the runtime's graph_level, memory_arena and spinning, where they are not the usual
# ones; the bundle's own run.py heeds them, and the candidate's version keeps older readers off.
# 2026-11-22: a group's `effective` is null where nobody saw what is executed, and `seen_in` says
# where it was seen; nothing reads either back.

FORMAT = "edge-autotune bundle"
VERIFIED = ("candidate.json", "model.onnx", "run.py")
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that the format knows: a zip has no clock in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle that was read back and whose digests match.

    `reports` is the content of reports.json: `model` (digest, size, input), `figures`
    (winner, fp32 and int8, each with accuracy and latency reports) and `provenance`.
    """

    model: bytes
    candidate: Candidate
    reports: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Digest of the model's bytes."""
        return str(self.reports["model"]["sha256"])


def bundle_files(
    *,
    job: JobRecord,
    trial: TrialRecord,
    device: DeviceRecord | None,
    model: bytes,
    fp32_trial: TrialRecord | None = None,
    int8_trial: TrialRecord | None = None,
    input_name: str | None = None,
    input_shape: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, bytes]:
    """The bundle's files by name.

    `input_name` and `input_shape` (no batch axis) are read from the model where not given.

    Raises:
        BundleError: the bytes are not the trial's artifact, or not an ONNX model.
    """
    sha256 = hashlib.sha256(model).hexdigest()
    if trial.artifact_sha256 is not None and trial.artifact_sha256 != sha256:
        raise BundleError(
            f"trial {trial.number} has the artifact {trial.artifact_sha256}, "
            f"the model given has sha256 {sha256}"
        )
    name, shape = _model_input(model)
    files = {
        "candidate.json": _json_bytes(trial.candidate.to_json()),
        "model.onnx": model,
        "run.py": resources.files("autotune.export").joinpath("run_bundle.py").read_bytes(),
    }
    reports = {
        "format": FORMAT,
        "version": BUNDLE_VERSION,
        "files": {file: hashlib.sha256(files[file]).hexdigest() for file in VERIFIED},
        "model": {
            "sha256": sha256,
            "size_bytes": len(model),
            "input_name": input_name or name,
            "input_shape": list(shape if input_shape is None else input_shape),
            "input_type": "float32",
            "class_names": list(class_names) if class_names is not None else None,
            "runtime": trial.candidate.runtime.to_json(),
            "candidate_digest": trial.candidate.digest,
            "groups": [dict(entry) for entry in figures.group_precisions(trial)],
        },
        "figures": {
            "winner": _figures(trial),
            "fp32": _figures(fp32_trial),
            "int8": _figures(int8_trial),
        },
        "provenance": provenance(job, trial, device),
    }
    files["reports.json"] = _json_bytes(reports)
    files["README.md"] = _readme(
        job, trial, device, fp32_trial=fp32_trial, int8_trial=int8_trial, reports=reports
    )
    return dict(sorted(files.items()))


def bundle_zip(files: Mapping[str, bytes]) -> bytes:
    """The files as a zip; the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, wherever it is written
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def read_bundle(path: Path) -> Bundle:
    """The bundle at `path`, a folder or a zip, with every digest checked.

    Raises:
        BundleError: a file is missing, altered or of a newer version.
    """
    files = {name: _read_file(path, name) for name in (*VERIFIED, "reports.json")}
    reports = _document(path, "reports.json", files["reports.json"])
    if reports.get("format") != FORMAT or not isinstance(reports.get("version"), int):
        raise BundleError(f"{path} is not a bundle: reports.json does not say {FORMAT!r}")
    if reports["version"] > BUNDLE_VERSION:
        raise BundleError(
            f"{path} is a bundle of version {reports['version']}; this release reads version "
            f"{BUNDLE_VERSION}: upgrade edge-autotune"
        )
    for name in VERIFIED:
        _require_digest(path, name, files[name], reports)
    try:
        candidate = Candidate.from_json(_document(path, "candidate.json", files["candidate.json"]))
    except SearchSpaceError as error:
        raise BundleError(f"{path}: candidate.json: {error}") from error
    return Bundle(model=files["model.onnx"], candidate=candidate, reports=reports)


def _require_digest(path: Path, name: str, content: bytes, reports: Mapping[str, Any]) -> None:
    expected = (reports.get("files") or {}).get(name)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise BundleError(
            f"{name} of the bundle {path} has sha256 {found}, the exported one had {expected}: "
            "it was altered or damaged; export the bundle again"
        )


def _read_file(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            return (path / name).read_bytes()
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except KeyError as error:
        raise BundleError(f"the bundle {path} has no {name}") from error
    except zipfile.BadZipFile as error:
        raise BundleError(f"{path} is neither a bundle's folder nor its zip: {error}") from error
    except FileNotFoundError as error:
        missing = f"the bundle {path} has no {name}" if path.is_dir() else f"{path} does not exist"
        raise BundleError(missing) from error
    except OSError as error:
        raise BundleError(f"cannot read {name} of the bundle {path}: {error.strerror}") from error


def _document(path: Path, name: str, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise BundleError(f"{name} of the bundle {path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BundleError(f"{name} of the bundle {path} must hold an object")
    return document


def _model_input(model: bytes) -> tuple[str, tuple[int, ...]]:
    """Name and shape, without the batch axis, of the one input that is not a weight."""
    try:
        graph = onnx.load_model_from_string(model).graph
    except Exception as error:  # protobuf's own error class depends on its build
        raise BundleError(f"the artifact is not an ONNX model: {error}") from error
    weights = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise BundleError(f"the artifact has {len(inputs)} inputs; a bundle takes exactly one")
    axes = inputs[0].type.tensor_type.shape.dim
    return inputs[0].name, tuple(axis.dim_value for axis in axes[1:])


def _figures(trial: TrialRecord | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {
        "trial": {"id": trial.id, "number": trial.number, "proposed_by": trial.proposed_by},
        "artifact": {"sha256": trial.artifact_sha256, "size_bytes": trial.artifact_size_bytes},
        "accuracy": {
            "search": trial.accuracy.to_json() if trial.accuracy else None,
            "held_out": trial.held_out_accuracy.to_json() if trial.held_out_accuracy else None,
        },
        "latency": {
            "screening": _latency_json(trial.latency),
            "confirmed": _latency_json(trial.confirmed_latency),
        },
        "compression": dict(trial.compression) if trial.compression else None,
    }


def _latency_json(report: LatencyReport | None) -> dict[str, Any] | None:
    """The report without its raw samples, which stay in the database."""
    return None if report is None else report.model_dump(mode="json", exclude={"blocks"})


def _readme(
    job: JobRecord,
    trial: TrialRecord,
    device: DeviceRecord | None,
    *,
    fp32_trial: TrialRecord | None,
    int8_trial: TrialRecord | None,
    reports: Mapping[str, Any],
) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autotune", "web/templates"),
        autoescape=False,  # noqa: S701 - the output is Markdown for a file, never served as HTML
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    rows = [("FP32", fp32_trial), ("uniform INT8", int8_trial), ("**this model**", trial)]
    text = environment.get_template("bundle_readme.md").render(
        job=job,
        trial=trial,
        device=device,
        rows=[(label, row) for label, row in rows if row is not None],
        figures=figures,
        session=RuntimeRequest.model_validate(reports["model"]["runtime"]),
        plain=not trial.candidate.runtime.unusual,
        latency=figures.latency_of(trial),
        accuracy=figures.accuracy_of(trial),
        model=reports["model"],
        provenance=reports["provenance"],
    )
    return text.encode()


def _json_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
