"""Bundles: what is written comes back, what was altered does not."""

import errno
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from autotune import bundle_download
from autotune.bundle_download import write_bundle
from autotune.errors import BundleError, DiskFull
from autotune.export import run_bundle
from autotune.export.bundle import bundle_files, bundle_zip, read_bundle
from autotune.export.run_bundle import Unusable, open_session
from device_agents.runtimes import onnxruntime as measured
from search_spaces import RuntimeOptions
from tests.unit import fabricated_job as fabricated


@pytest.fixture(scope="module")
def records():
    inventory = fabricated.inventory()
    return fabricated.job(inventory), fabricated.trials(inventory)


@pytest.fixture
def export(records):
    job, trials = records

    def write(path: Path, **changes) -> Path:
        arguments = {
            "job": job,
            "trial": trials[7],
            "device": fabricated.device(),
            "model": fabricated.linear_model(),
            "fp32_trial": trials[0],
            "int8_trial": trials[1],
        }
        return write_bundle(path, bundle_zip(bundle_files(**{**arguments, **changes})))

    return write


@pytest.mark.parametrize("name", ["folder", "packed.zip"])
def test_a_bundle_comes_back_as_it_was_written(export, records, tmp_path: Path, name: str) -> None:
    bundle = read_bundle(export(tmp_path / "deep" / name))
    assert bundle.model == fabricated.linear_model()
    assert bundle.candidate == records[1][7].candidate
    assert bundle.sha256 == records[1][7].artifact_sha256


def test_the_reports_hold_every_figure_and_where_it_comes_from(export, tmp_path: Path) -> None:
    reports = read_bundle(export(tmp_path / "b")).reports
    winner = reports["figures"]["winner"]
    assert winner["accuracy"]["search"]["n_samples"] == 400
    assert winner["accuracy"]["held_out"]["n_samples"] == 600
    assert winner["latency"]["confirmed"]["n_samples"] == 960
    assert winner["latency"]["screening"]["before"]["temperature_celsius"] == 51.5
    assert "blocks" not in winner["latency"]["confirmed"]
    assert reports["figures"]["fp32"]["trial"]["number"] == 0
    assert reports["figures"]["int8"]["trial"]["number"] == 1
    provenance = reports["provenance"]
    assert provenance["job"]["id"] == "job-1"
    assert provenance["source"]["digest"] == "d" * 64
    assert provenance["device"]["fingerprint"] == "f" * 64
    assert provenance["runtime"]["version"] == "1.31.1"
    assert provenance["tools"]["onnxruntime"]
    assert reports["model"]["input_shape"] == [6]


def test_the_same_records_give_the_same_zip(export, tmp_path: Path) -> None:
    first, second = export(tmp_path / "a.zip"), export(tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()


def test_the_readme_shows_the_figures_with_interval_and_n(export, tmp_path: Path) -> None:
    text = (export(tmp_path / "b") / "README.md").read_text(encoding="utf-8")
    assert "94.10 % [92.90, 95.20]" in text
    assert "1.138 ms [1.128, 1.147]" in text
    assert "600 held-out samples" in text
    assert "960 samples in 16 blocks" in text
    assert "kitchen-pi4" in text
    assert "`model.onnx` is `torchvision:mobilenet_v2`" in text


@pytest.mark.parametrize("name", ["model.onnx", "candidate.json", "run.py"])
def test_an_altered_file_is_refused(export, tmp_path: Path, name: str) -> None:
    file = export(tmp_path / "b") / name
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(BundleError, match=f"{name} .* altered or damaged"):
        read_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", ["model.onnx", "candidate.json", "run.py", "reports.json"])
def test_a_missing_file_is_named(export, tmp_path: Path, name: str) -> None:
    (export(tmp_path / "b") / name).unlink()
    with pytest.raises(BundleError, match=f"has no {name}"):
        read_bundle(tmp_path / "b")


def test_a_missing_file_in_a_zip_is_named(export, tmp_path: Path) -> None:
    whole = export(tmp_path / "whole.zip")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "part.zip", "w") as target:
        for name in set(source.namelist()) - {"model.onnx"}:
            target.writestr(name, source.read(name))
    with pytest.raises(BundleError, match=r"has no model\.onnx"):
        read_bundle(tmp_path / "part.zip")


def test_what_is_not_a_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.zip").write_bytes(b"noise")
    with pytest.raises(BundleError, match="neither a bundle's folder nor its zip"):
        read_bundle(tmp_path / "noise.zip")
    with pytest.raises(BundleError, match="does not exist"):
        read_bundle(tmp_path / "nothing.zip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99.*upgrade"),
        ({"format": "another"}, "not a bundle"),
        ({"version": "one"}, "not a bundle"),
    ],
)
def test_another_format_or_version_is_refused(
    export, tmp_path: Path, change: dict, message: str
) -> None:
    file = export(tmp_path / "b") / "reports.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path / "b")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_json_is_refused(export, tmp_path: Path, content: str) -> None:
    (export(tmp_path / "b") / "reports.json").write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=r"reports\.json of the bundle"):
        read_bundle(tmp_path / "b")


def test_bytes_of_another_artifact_are_refused(export, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="trial 7 has the artifact"):
        export(tmp_path / "b", model=fabricated.linear_model(seed=1))
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_no_model_are_refused(export, records, tmp_path: Path) -> None:
    unbuilt = replace(records[1][7], artifact_sha256=None)
    with pytest.raises(BundleError, match="not an ONNX model"):
        export(tmp_path / "b", trial=unbuilt, model=b"\xff" * 50)


@pytest.mark.parametrize("name", ["folder", "packed.zip"])
def test_an_earlier_bundle_is_replaced(export, records, tmp_path: Path, name: str) -> None:
    export(tmp_path / name)
    unconfirmed = replace(records[1][7], confirmed_latency=None, held_out_accuracy=None)
    export(tmp_path / name, trial=unconfirmed)
    winner = read_bundle(tmp_path / name).reports["figures"]["winner"]
    assert winner["latency"]["confirmed"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_somebody_elses_folder_is_left_alone(export, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(BundleError, match="left alone"):
        export(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text(encoding="utf-8") == "years of work"


def test_somebody_elses_file_is_left_alone(export, tmp_path: Path) -> None:
    (tmp_path / "thesis.zip").write_text("not a zip at all", encoding="utf-8")
    with pytest.raises(BundleError, match="left alone"):
        export(tmp_path / "thesis.zip")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["folder", "packed.zip"])
def test_a_full_disk_leaves_the_earlier_bundle(
    export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    export(tmp_path / name)

    def full(*_arguments: object) -> None:
        raise OSError(number, "no room left")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(bundle_download.os, "fsync", full)
    with pytest.raises(DiskFull):
        export(tmp_path / name)
    assert read_bundle(tmp_path / name).model == fabricated.linear_model()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python run.py` as a stranger types it: isolated, without this project on the path."""
    return subprocess.run(
        [sys.executable, "-P", "run.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_run_py_measures_the_exported_model(export, tmp_path: Path) -> None:
    done = run(export(tmp_path / "b"), "--runs", "20")
    assert done.returncode == 0, done.stderr
    assert "is the exported file" in done.stdout
    assert "n=20, batch 1, 1 thread(s)" in done.stdout
    assert "tuned on      p50 1.138 ms [1.128, 1.147], n=960, on kitchen-pi4" in done.stdout


def test_run_py_prints_the_classes_of_samples(export, tmp_path: Path) -> None:
    folder = export(tmp_path / "b", class_names=["cat", "dog", "eel"])
    x = np.random.default_rng(5).standard_normal((40, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    done = run(folder, "--input", str(tmp_path / "x.npy"))
    weight = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    expected = [["cat", "dog", "eel"][i] for i in (x @ weight).argmax(axis=1)]
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == expected


def tuned_for(records, runtime: str, **options):
    trial = records[1][7]
    chosen = RuntimeOptions(runtime=runtime, **options)
    return replace(trial, candidate=replace(trial.candidate, runtime=chosen))


def test_run_py_starts_the_runtime_that_was_tuned_for(export, records, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra edge-autotune[openvino] is not installed")
    folder = export(tmp_path / "b", trial=tuned_for(records, "openvino", threads=2))
    done = run(folder, "--runs", "5")
    assert "batch 1, 2 thread(s), openvino 20" in done.stdout, done.stderr
    assert "pip install numpy openvino" in (folder / "README.md").read_text(encoding="utf-8")
    x = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    weight = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    shown = run(folder, "--input", str(tmp_path / "x.npy")).stdout.splitlines()
    assert [int(line.split("\t")[1]) for line in shown] == (x @ weight).argmax(axis=1).tolist()


def test_run_py_starts_the_session_that_was_measured_and_says_so(
    export, records, tmp_path: Path
) -> None:
    options = {"graph_level": "basic", "memory_arena": False, "spinning": False}
    folder = export(tmp_path / "b", trial=tuned_for(records, "onnxruntime", threads=2, **options))
    done = run(folder, "--runs", "5")
    assert ", graph level basic, no memory arena, no spinning" in done.stdout, done.stderr
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "2 threads, graph level basic, no memory arena, no spinning" in readme
    assert "Your own program must set them too" in readme
    assert read_bundle(folder).candidate.runtime.unusual == options


def test_the_readme_of_a_plain_session_asks_for_no_option(export, tmp_path: Path) -> None:
    readme = (export(tmp_path / "b") / "README.md").read_text(encoding="utf-8")
    assert "1 thread, at batch 1, in a session with default options." in readme
    assert "must set" not in readme


def test_a_session_of_run_py_has_the_options_that_were_chosen(monkeypatch) -> None:
    made = []

    def session(model: bytes, options: Any, providers: Any) -> Any:
        made.append(options)
        raise Unusable("seen")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    chosen = RuntimeOptions(threads=2, graph_level="extended", memory_arena=False, spinning=False)
    with pytest.raises(Unusable, match="seen"):
        open_session(b"", chosen.to_json())
    (options,) = made
    assert (
        options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    )
    assert not options.enable_cpu_mem_arena
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 2


def test_run_py_refuses_a_provider_that_is_not_here(export, records, tmp_path: Path) -> None:
    trial = tuned_for(records, "onnxruntime", provider="CUDAExecutionProvider")
    done = run(export(tmp_path / "b", trial=trial))
    assert done.returncode == 1
    assert "tuned for CUDAExecutionProvider, and this build of onnxruntime has" in done.stderr


def test_run_py_tells_providers_what_the_measurement_told_them() -> None:
    assert (run_bundle.OWN_THREADS, run_bundle.BEHIND) == (measured.OWN_THREADS, measured.BEHIND)


def test_run_py_names_a_runtime_that_it_cannot_start(export, records, tmp_path: Path) -> None:
    done = run(export(tmp_path / "b", trial=tuned_for(records, "vendor")))
    assert done.returncode == 1
    assert "tuned for vendor, which this script cannot start" in done.stderr


def test_run_py_refuses_an_altered_model(export, tmp_path: Path) -> None:
    folder = export(tmp_path / "b")
    (folder / "model.onnx").write_bytes(fabricated.linear_model(seed=1))
    done = run(folder)
    assert done.returncode == 1
    assert "altered or damaged" in done.stderr


@pytest.mark.parametrize("missing", ["model.onnx", "reports.json"])
def test_run_py_names_a_missing_file(
    export, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    folder = export(tmp_path / "b")
    (folder / missing).unlink()
    assert run_bundle.main([], folder=folder) == 1
    assert re.match(f"cannot read .*{missing}", capsys.readouterr().err)


def test_run_py_takes_one_bare_sample(
    export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.ones(6, dtype=np.float64))
    folder = export(tmp_path / "b")
    assert run_bundle.main(["--input", str(tmp_path / "x.npy")], folder=folder) == 0
    index, label, probability = capsys.readouterr().out.strip().split("\t")
    assert (index, label in "012", 1 / 3 <= float(probability) <= 1) == ("0", True, True)


@pytest.mark.parametrize("shape", [(2, 5), (0, 6), (6, 2)])
def test_run_py_says_which_shape_it_takes(
    export, tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    np.save(tmp_path / "x.npy", np.ones(shape, dtype=np.float32))
    folder = export(tmp_path / "b")
    assert run_bundle.main(["--input", str(tmp_path / "x.npy")], folder=folder) == 1
    assert "the model takes (n, 6)" in capsys.readouterr().err


def test_run_py_never_unpickles(export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    folder = export(tmp_path / "b")
    assert run_bundle.main(["--input", str(tmp_path / "x.npy")], folder=folder) == 1
    assert "cannot read" in capsys.readouterr().err


def test_run_py_refuses_no_runs_at_all(export, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run_bundle.main(["--runs", "0"], folder=export(tmp_path / "b"))
