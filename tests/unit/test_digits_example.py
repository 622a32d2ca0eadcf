"""The demo's images, model and job file: real, seeded, cached and readable by a job."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from autotune.compression.data import load_labelled_data, split_data
from autotune.compression.source import load_source_model
from autotune.spec import parse_job, read_job
from examples.digits.images import make_images
from examples.digits.prepare import EVALUATION_FILE, TRAINING_FILE, job_text, main, prepare
from examples.digits.recipes import RECIPES, ImageRecipe, TrainingRecipe

SMALL = ImageRecipe(evaluation_originals=1700, variants=1)
SHORT = TrainingRecipe(model="resnet18", epochs=1, learning_rate=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    prepare(SHORT, path, console=Console(file=io.StringIO()), images=SMALL)
    return path


def test_images_have_the_promised_shape_and_range() -> None:
    training, evaluation = make_images(ImageRecipe())
    assert training.x.shape == (2391, 3, 64, 64)
    assert evaluation.x.shape == (1000, 3, 64, 64)
    assert training.x.dtype == np.float32
    assert evaluation.y.dtype == np.int64
    assert np.array_equal(evaluation.x[:, 0], evaluation.x[:, 2])
    assert abs(float(evaluation.x.mean())) < 0.6
    assert 0.5 < float(evaluation.x.std()) < 1.5
    assert set(evaluation.y) == set(training.y) == set(range(10))


def test_the_same_recipe_makes_the_same_images_and_another_seed_others() -> None:
    first, again = make_images(SMALL)[1], make_images(SMALL)[1]
    other = make_images(ImageRecipe(evaluation_originals=1700, variants=1, seed=1))[1]
    assert np.array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)


def test_no_original_is_in_both_parts() -> None:
    plain = ImageRecipe(max_shift=0, contrast=(1, 1), coarse_noise=0, fine_noise=0)
    training, evaluation = (
        {image.tobytes() for image in part.x[:, 0]} for part in make_images(plain)
    )
    assert len(training) == 797
    assert len(evaluation) == 1000
    assert not training & evaluation


@pytest.mark.parametrize("model", sorted(RECIPES))
def test_the_job_file_is_a_valid_job(model: str) -> None:
    import yaml

    job = parse_job(yaml.safe_load(job_text(model)))
    assert job.model.source == f"torchvision:{model}"
    assert job.latency_budget == "0.5x"


def test_what_is_prepared_loads_as_model_and_data(folder: Path) -> None:
    job = read_job(folder / "resnet18.yaml")
    splits = split_data(job.data, seed=job.seed)
    assert len(splits.search) + len(splits.held_out) == 1700
    assert splits.training is not None
    assert len(splits.training) == 97
    source = load_source_model(job.model, input_shape=splits.search.sample_shape)
    assert source.num_classes == 10


def test_a_second_call_keeps_every_file_and_says_so(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    said = io.StringIO()
    prepare(SHORT, folder, console=Console(file=said, soft_wrap=True), images=SMALL)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "cached" in said.getvalue()


def test_another_recipe_trains_again_but_keeps_the_images(folder: Path) -> None:
    images = (folder / TRAINING_FILE).stat().st_mtime_ns
    weights = (folder / "resnet18.safetensors").read_bytes()
    changed = TrainingRecipe(model="resnet18", epochs=1, learning_rate=0.02)
    said = io.StringIO()
    prepare(changed, folder, console=Console(file=said, soft_wrap=True), images=SMALL)
    assert (folder / TRAINING_FILE).stat().st_mtime_ns == images
    assert (folder / "resnet18.safetensors").read_bytes() != weights
    assert "epoch 1 of 1" in said.getvalue()
    prepare(SHORT, folder, console=Console(file=io.StringIO()), images=SMALL)


def test_a_lost_file_is_made_again(folder: Path) -> None:
    original = load_labelled_data(f"npz:{folder / EVALUATION_FILE}")
    (folder / EVALUATION_FILE).unlink()
    prepare(SHORT, folder, console=Console(file=io.StringIO()), images=SMALL)
    again = load_labelled_data(f"npz:{folder / EVALUATION_FILE}")
    assert np.array_equal(original.x, again.x)
    assert not list(folder.glob("*.part"))


def test_a_job_file_that_the_user_changed_stays(folder: Path) -> None:
    job = folder / "resnet18.yaml"
    text = job.read_text(encoding="utf-8")
    job.write_text(text.replace("0.5x", "3ms"), encoding="utf-8")
    prepare(SHORT, folder, console=Console(file=io.StringIO()), images=SMALL)
    assert read_job(job).latency_budget == "3ms"
    job.write_text(text, encoding="utf-8")


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "alexnet"])
    assert "mobilenet_v2" in capsys.readouterr().err
