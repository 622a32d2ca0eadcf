"""Labelled data: what is read, how it is split, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autotune.compression.data import (
    DataSplits,
    LabelledData,
    load_labelled_data,
    require_fit,
    split_data,
)
from autotune.errors import InvalidData, UntrustedCode
from autotune.spec import DataSpec
from tests.unit.compression_models import labelled, samples, tiny_source, tiny_splits


def write(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def numbered(n: int, classes: int = 4) -> dict[str, np.ndarray]:
    """Samples that carry their own number, so that parts can be compared."""
    return {"x": np.arange(n, dtype=np.float32).reshape(n, 1), "y": np.arange(n) % classes}


def rows(part: LabelledData | np.ndarray | None) -> set[int]:
    assert part is not None
    x = part.x if isinstance(part, LabelledData) else part
    return {int(v) for v in x[:, 0]}


def test_parts_are_disjoint_and_complete(tmp_path: Path) -> None:
    spec = DataSpec(evaluation=write(tmp_path / "e.npz", **numbered(200)), calibration_samples=20)
    splits = split_data(spec, seed=0)
    parts = [rows(splits.calibration), rows(splits.search), rows(splits.held_out)]
    assert sum(map(len, parts)) == 200 == len(set().union(*parts))
    assert len(splits.held_out) == round(0.6 * 180)
    assert splits.training is None


def test_every_part_has_the_classes_in_equal_shares(tmp_path: Path) -> None:
    spec = DataSpec(evaluation=write(tmp_path / "e.npz", **numbered(400)), calibration_samples=40)
    splits = split_data(spec, seed=3)
    for part in (splits.search, splits.held_out):
        counts = np.bincount(part.y, minlength=4)
        assert np.ptp(counts) <= 3, counts


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    spec = DataSpec(evaluation=write(tmp_path / "e.npz", **numbered(100)))
    first, again, other = (rows(split_data(spec, seed=s).search) for s in (1, 1, 2))
    assert first == again != other


def test_calibration_comes_out_of_the_training_data(tmp_path: Path) -> None:
    training = numbered(50)
    training["x"] = training["x"] + 1000
    spec = DataSpec(
        evaluation=write(tmp_path / "e.npz", **numbered(100)),
        training=write(tmp_path / "t.npz", **training),
        calibration_samples=10,
    )
    splits = split_data(spec, seed=0)
    assert len(splits.calibration) == 10
    assert min(rows(splits.calibration)) >= 1000
    assert len(splits.search) + len(splits.held_out) == 100


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "there are no samples"),
        ({"x": np.zeros((4, 3)), "y": np.zeros(3, int)}, r"x has shape \(4, 3\) and y \(3,\)"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, -1])}, "label -1 is negative"),
        ({"x": np.array([[1.0], [np.nan]]), "y": np.zeros(2, int)}, "first one at position 1"),
        ({"x": np.zeros((2, 3)), "y": np.array([0.0, 0.5])}, "whole class numbers"),
        ({"x": np.zeros((2, 3))}, "has no array 'y'; it holds x"),
        ({"x": np.array([["a"], ["b"]]), "y": np.zeros(2, int)}, "x must be numbers"),
        ({"x": np.zeros((2, 3)), "y": np.array(["cat", "dog"])}, "y class numbers, not .*<U3"),
        ({"x": np.zeros((2, 0, 3)), "y": np.zeros(2, int)}, r"\(2, 0, 3\); a sample holds not one"),
        ({"x": np.array([[1.0], [1e300]]), "y": np.zeros(2, int)}, "float32 ends at 3.4e38"),
        ({"x": np.zeros((2, 3)), "y": np.array([0.0, np.nan])}, "whole class numbers"),
    ],
)
def test_unusable_data_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InvalidData, match=message):
        load_labelled_data(write(tmp_path / "d.npz", **arrays))


def test_pickled_data_is_refused(tmp_path: Path) -> None:
    reference = write(tmp_path / "d.npz", x=np.array([{}, None], object), y=np.zeros(2))
    with pytest.raises(InvalidData, match="pickled"):
        load_labelled_data(reference)


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="No such file"):
        load_labelled_data(f"npz:{tmp_path}/none.npz")
    write(tmp_path / "d.npz", **numbered(50))
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidData, match=r"not an \.npz file .* \(not a zip archive"):
        load_labelled_data(f"npz:{tmp_path}/d.npz")


def test_a_damaged_archive_is_read_or_refused_but_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, **numbered(50))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_labelled_data(f"npz:{path}")
        except InvalidData:
            refusals += 1
    assert refusals > 200


def test_what_a_function_returns_must_be_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.unit.compression_models as module

    for returned in (([[1.0], [1.0, 2.0]], [0, 1]), ([[1.0]], [object()])):
        monkeypatch.setattr(module, "ragged", lambda value=returned: value, raising=False)
        with pytest.raises(InvalidData, match="numbers"):
            load_labelled_data("python:tests.unit.compression_models:ragged", trust_job_code=True)


def test_too_few_samples_to_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="too few to split"):
        split_data(DataSpec(evaluation=write(tmp_path / "d.npz", **numbered(3))), seed=0)


def test_code_runs_only_by_consent() -> None:
    with pytest.raises(UntrustedCode, match="--trust-job-code"):
        load_labelled_data("python:builtins:dict")
    with pytest.raises(InvalidData, match="it must return x, y"):
        load_labelled_data("python:builtins:dict", trust_job_code=True)


def test_an_image_folder_is_one_class_per_folder(tmp_path: Path) -> None:
    from PIL import Image

    for name, value in (("dark", 0), ("light", 255)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (300, 260), (value, value, value)).save(tmp_path / name / "a.png")
    data = load_labelled_data(f"imagefolder:{tmp_path}")
    assert data.sample_shape == (3, 224, 224)
    assert data.y.tolist() == [0, 1]
    assert data.x[0, 0, 0, 0] == pytest.approx(-0.485 / 0.229, abs=1e-5)


def test_an_empty_image_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="not an image folder"):
        load_labelled_data(f"imagefolder:{tmp_path}")


def test_a_label_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidData, match=r"label 6, but .* gives 5 classes \(labels 0 to 4\)"):
        require_fit(tiny_source(), _with_search(labelled(21, classes=7)))


def test_samples_of_another_shape_are_refused() -> None:
    wrong = LabelledData(x=samples(4, (3, 24, 24)), y=np.zeros(4, np.int64))
    with pytest.raises(InvalidData, match=r"shape \(3, 24, 24\), but .* takes \(3, 16, 16\)"):
        require_fit(tiny_source(), _with_search(wrong))


def test_data_that_fits_is_accepted() -> None:
    require_fit(tiny_source(), tiny_splits())


def _with_search(search: LabelledData) -> DataSplits:
    return DataSplits(calibration=samples(4), training=None, search=search, held_out=labelled(4))
